"""Sources: what a data set's rows are, and how a batch of them is fetched.

A source has a length, and `take(rows)` gives the batch of those rows: name -> tensor, its first
dimension that of `rows`. A row's content depends on its number alone, so that a batch can be
fetched by any process and worker, in any order, and again.

| source          | its rows                                                                  |
|-----------------|---------------------------------------------------------------------------|
| `TensorSource`  | of tensors in memory                                                      |
| `ArraySource`   | of arrays in .npy files, or stored in an .npz, read when they are asked for |
| `ImageFiles`    | image files, decoded when they are asked for, with labels or masks        |
| `Windows`       | stretches of one long sequence: tokens of a text, frames of a clip        |
| `Clips`         | stretches of several sequences                                            |
| `DatasetSource` | items of a torch Dataset                                                  |
| `Subset`        | some rows of another source, without a copy                               |

Bytes are 8-bit images: a uint8 tensor keeps its bytes until the batch is on the device, where a
value v becomes v / 255 in float32. Labels, masks and tokens are therefore int64.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from fastgen.data import readers
from fastgen.data.splits import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = dict[str, Tensor]

_LOCAL_HEADER = struct.Struct("<4s22xHH")


@runtime_checkable
class Source(Protocol):
    """Rows that can be fetched by their numbers."""

    def __len__(self) -> int:
        """How many rows there are."""

    def take(self, rows: Tensor) -> Batch:
        """The rows (B,), int64 in [0, len), in that order: name -> tensor (B, ...)."""


class TensorSource:
    """Rows of tensors in memory.

    Args:
        **tensors: name -> (N, ...); None is left out.

    Raises:
        ValueError: no tensors, or not one common N.
    """

    def __init__(self, **tensors: Tensor | None):
        self.tensors = {name: value for name, value in tensors.items() if value is not None}
        self._size = _common_length({name: len(value) for name, value in self.tensors.items()})

    def __len__(self) -> int:
        return self._size

    def take(self, rows: Tensor) -> Batch:
        return {name: value[rows] for name, value in self.tensors.items()}


class Subset:
    """Some rows of a source, in the given order.

    Args:
        source: the source; nothing of it is copied.
        rows: int64 (M,), numbers of its rows.

    Raises:
        ValueError: a number that is none of the source's rows.
    """

    def __init__(self, source: Source, rows: Tensor):
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(f"rows must be int64 (M,), got {rows.dtype} {tuple(rows.shape)}")
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(source):
            raise ValueError(
                f"rows must be in [0, {len(source)}), got [{rows.min()}, {rows.max()}]"
            )
        self.source = source
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Tensor) -> Batch:
        return self.source.take(self.rows[rows])


class FileArray:
    """An array in a file, of which rows are read, not mapped: what was read is not kept.

    Mapped pages would count as the process's own memory until the system takes them back.

    Args:
        path: a .npy file, or an .npz written by `numpy.savez` (not `savez_compressed`).
        member: which array of the .npz.

    Raises:
        DataError: no such file or array, objects, a compressed member, Fortran order, or fewer
            bytes than its header promises.
    """

    def __init__(self, path: Path, member: str | None = None):
        self.path = Path(path)
        self.member = member
        self._file: int | None = None
        try:
            with open(self.path, "rb") as file:
                if member is not None:
                    file.seek(_start_of_member(file, member))
                self.shape, fortran, dtype = readers.read_npy_header(file, "it")
                self._offset = file.tell()
                available = os.fstat(file.fileno()).st_size - self._offset
        except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
            raise DataError(f"{self} cannot be read ({error})") from error
        if not self.shape or (fortran and len(self.shape) > 1):
            raise DataError(f"{self}: rows can be read of arrays in C order alone, with rows")
        self.dtype = dtype
        self._row_bytes = dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        if self.shape[0] * self._row_bytes > available:
            raise DataError(
                f"{self}: its header promises {dtype} of shape {self.shape}, only {available} "
                "bytes follow"
            )

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}: {self.member}"

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` rows from `start` on, in the machine's byte order."""
        out = np.empty((count, *self.shape[1:]), self.dtype)
        if out.nbytes:
            self._read_into(out.data.cast("B"), start)
        return out.astype(self.dtype.newbyteorder("="), copy=False)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows (B,) one by one, in the machine's byte order."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if out.nbytes:
            raw = out.data.cast("B")
            for i, row in enumerate(rows.tolist()):
                self._read_into(raw[i * self._row_bytes : (i + 1) * self._row_bytes], row)
        return out.astype(self.dtype.newbyteorder("="), copy=False)

    def _read_into(self, target: memoryview, row: int) -> None:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        offset = self._offset + row * self._row_bytes
        while len(target):
            # a position of its own for each read: workers that were forked share the file's
            done = os.preadv(self._file, [target], offset)
            if done == 0:
                raise DataError(f"{self} has become shorter since it was opened")
            target, offset = target[done:], offset + done

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


class ArraySource:
    """Rows of arrays in files.

    Args:
        **arrays: name -> array (N, ...). Numbers that torch has no dtype for, and whole numbers
            other than uint8, become int64.

    Raises:
        ValueError: no arrays, or not one common N.
    """

    def __init__(self, **arrays: FileArray | None):
        self.arrays = {name: array for name, array in arrays.items() if array is not None}
        self._size = _common_length({name: len(array) for name, array in self.arrays.items()})

    def __len__(self) -> int:
        return self._size

    def take(self, rows: Tensor) -> Batch:
        numbers = rows.numpy()
        return {name: as_tensor(array.take(numbers)) for name, array in self.arrays.items()}


class ImageFiles:
    """Image files, decoded when they are asked for: "images" (B, C, H, W), uint8.

    Args:
        paths: the files, one for each row.
        labels: int64 (N,), given as "labels".
        masks: files of label numbers, one for each image, given as "masks" (B, H, W), int64.
        size: (H, W) that every image is brought to: the largest part of that shape in its middle,
            resized with antialiasing; masks take their nearest pixel. None: all must have the size
            of the first.
        channels: 1, 3 or 4.

    Raises:
        ValueError: no files, or not as many labels or masks as images.
        DataError: the first file is no image. `take` raises it for the file that it cannot decode,
            that has another size, or whose mask has not its size or is not one of numbers.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor | None = None,
        masks: Sequence[Path] | None = None,
        *,
        size: tuple[int, int] | None = None,
        channels: Literal[1, 3, 4] = 3,
    ):
        lengths = {"paths": len(paths)}
        lengths |= {} if labels is None else {"labels": len(labels)}
        lengths |= {} if masks is None else {"masks": len(masks)}
        if not _common_length(lengths):
            raise ValueError("paths must name at least one file, got none")
        # as one array of bytes: workers that were forked do not copy it by counting references
        self._paths = np.array([os.fsencode(path) for path in paths])
        self._masks = None if masks is None else np.array([os.fsencode(path) for path in masks])
        self.labels = labels
        self.size = size
        self.channels = channels
        with readers.refusing_bombs():
            self.shape = (channels, *(size or self._decode(Path(paths[0])).shape[:2]))

    def __len__(self) -> int:
        return len(self._paths)

    def take(self, rows: Tensor) -> Batch:
        numbers = rows.numpy()
        with readers.refusing_bombs():
            images = [self._image(path) for path in self._paths[numbers]]
            masks = [] if self._masks is None else [self._mask(p) for p in self._masks[numbers]]
        batch = {"images": torch.from_numpy(np.stack(images))}
        if self._masks is not None:
            batch["masks"] = torch.from_numpy(np.stack(masks).astype(np.int64))
        if self.labels is not None:
            batch["labels"] = self.labels[rows]
        return batch

    def _image(self, name: bytes) -> np.ndarray:
        path = Path(os.fsdecode(name))
        pixels = self._decode(path)
        if pixels.shape[:2] != self.shape[1:]:
            raise DataError(
                f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, the first image "
                f"{self.shape[2]}x{self.shape[1]}; bring all to one size, or give one to resize to"
            )
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _decode(self, path: Path) -> np.ndarray:
        """(H, W), or (H, W, C) for several channels."""
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[self.channels]
        with readers.opened_image(path) as image:
            flat = image.convert(mode) if mode == "RGBA" else readers.opaque(image, path, mode)
            return self._sized(flat)

    def _mask(self, name: bytes) -> np.ndarray:
        path = Path(os.fsdecode(name))
        with readers.opened_image(path, deep=True) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                raise DataError(
                    f"{path} is no mask: it must have one label number per pixel, not {image.mode}"
                )
            numbers = self._sized(image, nearest=True)
        if numbers.shape != self.shape[1:]:
            raise DataError(
                f"{path} must be a mask of its image's size, {self.shape[2]}x{self.shape[1]}, "
                f"got {numbers.shape[1]}x{numbers.shape[0]}"
            )
        return numbers

    def _sized(self, image: Image, *, nearest: bool = False) -> np.ndarray:
        if self.size is not None:
            from PIL.Image import Resampling

            how = Resampling.NEAREST if nearest else Resampling.BICUBIC
            image = image.resize(self.size[::-1], how, box=_middle(image.size, self.size))
        return np.asarray(image)


class Windows:
    """Stretches of one sequence: row i is what begins at i * stride, (length, ...).

    Args:
        sequence: (T, ...), a tensor in memory or an array in a file.
        length: steps of a stretch.
        stride: steps between the beginnings of two of them.
        name: of what `take` gives.

    Raises:
        ValueError: a length or stride below 1, or fewer than `length` steps.
    """

    def __init__(
        self, sequence: Tensor | FileArray, length: int, *, stride: int = 1, name: str = "tokens"
    ):
        if length < 1 or stride < 1:
            raise ValueError(f"length and stride must be at least 1, got {length} and {stride}")
        if len(sequence) < length:
            raise ValueError(f"length must be at most {len(sequence)}, the steps, got {length}")
        self.sequence = sequence
        self.length = length
        self.stride = stride
        self.name = name

    def __len__(self) -> int:
        return (len(self.sequence) - self.length) // self.stride + 1

    def take(self, rows: Tensor) -> Batch:
        return {self.name: torch.stack([self._window(row) for row in rows.tolist()])}

    def _window(self, row: int) -> Tensor:
        start = row * self.stride
        if isinstance(self.sequence, Tensor):
            return self.sequence[start : start + self.length]
        return as_tensor(self.sequence.read(start, self.length))


class Clips:
    """Stretches of several sequences, none of which crosses from one to the next.

    Args:
        sequences: (T_i, ...) each; one with fewer than `length` steps gives none.
        length, stride, name: as for `Windows`.

    Raises:
        ValueError: no sequence has `length` steps.
    """

    def __init__(
        self,
        sequences: Sequence[Tensor | FileArray],
        length: int,
        *,
        stride: int = 1,
        name: str = "frames",
    ):
        long = [sequence for sequence in sequences if len(sequence) >= length]
        if not long:
            raise ValueError(f"length must be at most the steps of some sequence, got {length}")
        self.windows = [Windows(one, length, stride=stride, name=name) for one in long]
        self.name = name
        self._ends = torch.tensor([len(part) for part in self.windows]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: Tensor) -> Batch:
        which = torch.searchsorted(self._ends, rows, right=True)
        found = []
        for i, row in zip(which.tolist(), rows.tolist(), strict=True):
            part = self.windows[i]
            found.append(part._window(row - int(self._ends[i]) + len(part)))
        return {self.name: torch.stack(found)}


class DatasetSource:
    """Items of a torch Dataset, which may not be random.

    Args:
        dataset: with a length; an item is a mapping, or a tuple for `names`.
        names: of an item's parts, where it is a tuple.

    Raises:
        TypeError: the dataset has no length, as iterable ones have none. `take` raises it where an
            item is neither, and ValueError where it has another number of parts.
    """

    def __init__(self, dataset: Any, names: Sequence[str] = ("images", "labels")):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                "dataset must have a length and items by number: a map-style torch Dataset, "
                f"got {type(dataset).__name__}"
            )
        self.dataset = dataset
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, rows: Tensor) -> Batch:
        return default_collate([self._named(self.dataset[row]) for row in rows.tolist()])

    def _named(self, item: Any) -> dict[str, Any]:
        if isinstance(item, Mapping):
            return dict(item)
        if not isinstance(item, (tuple, list)):
            raise TypeError(f"items must be mappings or tuples, got {type(item).__name__}")
        if len(item) != len(self.names):
            raise ValueError(f"items have {len(item)} parts, names {', '.join(self.names)}")
        return dict(zip(self.names, item, strict=True))


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of an array's values: uint8 and floating dtypes as they are, other numbers int64."""
    if array.dtype == np.uint8 or array.dtype in (np.float16, np.float32, np.float64):
        return torch.from_numpy(array)
    return torch.from_numpy(array.astype(np.int64))


def _start_of_member(file: Any, member: str) -> int:
    """Where an array of an .npz begins in the file; ValueError where it is compressed."""
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(f"{member}.npy")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"{member} is compressed or encrypted: write it with numpy.savez")
    file.seek(info.header_offset)
    magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != b"PK\x03\x04":
        raise ValueError("the archive is damaged")
    return info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes


def _middle(given: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box of the shape (height, width) in the middle of a picture (width, height)."""
    scale = min(given[0] / size[1], given[1] / size[0])
    left, top = (given[0] - scale * size[1]) / 2, (given[1] - scale * size[0]) / 2
    return left, top, left + scale * size[1], top + scale * size[0]


def _common_length(lengths: dict[str, int]) -> int:
    if not lengths or len(set(lengths.values())) != 1:
        raise ValueError(f"all must have one common first dimension, got {lengths}")
    return next(iter(lengths.values()))
