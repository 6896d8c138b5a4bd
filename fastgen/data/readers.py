"""Files of images as numpy arrays.

Nothing is unpickled, only regular files are opened, and what a file says of its size is held
against the memory of the machine before room is made for it.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import stat
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fastgen.data.splits import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

_CIFAR_ROW = 1 + 3 * 32 * 32
_CIFAR_FILE_BYTES = 10_000 * _CIFAR_ROW
_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_ARCHIVE_BYTES = 2**28
CIFAR_TRAIN = tuple(f"{_CIFAR_FOLDER}/data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = (f"{_CIFAR_FOLDER}/test_batch.bin",)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_ORIENTED = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
_GREY_MODES = ("1", "L", "LA", "La")
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_NPY_HEADER_BYTES = 2**14
_PIECE_BYTES = 2**22


@cache
def memory_bytes() -> int:
    """The machine's memory, or what the control group allows of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return machine


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzip'ed or not.

    Raises:
        DataError: it is not one, or needs more memory than there is.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with _reading(path, "fetch it again"), opened(path, "rb") as file:
        zeros, dtype, rank = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or dtype != 0x08:
            raise ValueError("it is not an IDX file of unsigned bytes")
        shape = struct.unpack(f">{rank}I", file.read(4 * rank))
        count = math.prod(shape)
        require_room(path, count, count)
        raw = _read_at_most(file, count + 1)
        if len(raw) != count:
            found = "more" if len(raw) > count else len(raw)
            raise ValueError(f"its header promises {count} bytes, {found} follow")
        return np.frombuffer(raw, np.uint8).reshape(shape)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file.

    Raises:
        DataError: it cannot be read, holds objects or what is no array, or needs more memory than
            there is.
    """
    with _reading(path, "fetch or write it again", " as .npz"):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip archive; numpy.savez writes one")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            sizes = [_array_size(archive, info) for info in members]
            require_room(path, sum(stored for stored, _ in sizes), sum(count for _, count in sizes))
            return {info.filename.removesuffix(".npy"): _array(archive, info) for info in members}


def _array_size(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    """(bytes, elements) of an array in the archive, by its header, which must fit the member."""
    with archive.open(info) as member:
        file = _Limited(member, _NPY_HEADER_BYTES)
        shape, _, dtype = read_npy_header(file, f"{info.filename} in it")
    count = math.prod(shape)
    follow = info.file_size - _NPY_HEADER_BYTES + file.left
    if min(shape, default=0) < 0 or count * dtype.itemsize != follow:
        raise ValueError(
            f"the header of {info.filename} in it promises {dtype} of shape {shape}, {follow} "
            "bytes follow"
        )
    return follow, count


def read_npy_header(file: IO[bytes] | io.RawIOBase, name: str) -> tuple[tuple, bool, np.dtype]:
    """Shape, whether it is in Fortran order, and dtype of the array that begins here in a file.

    Raises:
        ValueError: no array, of an unknown version of the format, or of Python objects.
    """
    source: Any = file
    try:
        version = np.lib.format.read_magic(source)
    except ValueError:
        raise ValueError(f"{name} is no array") from None
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(source)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(source)
    else:
        raise ValueError(f"{name} is of version {version}")
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not read")
    return shape, fortran, dtype


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def read_amat(path: Path) -> np.ndarray:
    """Rows of 784 zeros and ones in text, as the fixed binarised MNIST has them: uint8 (N, 784).

    Raises:
        DataError: something else.
    """
    with _reading(path, "fetch it again"):
        return bits_of_amat(path.read_bytes())


def bits_of_amat(text: bytes) -> np.ndarray:
    """The rows of an .amat file; ValueError where they are not 784 zeros and ones each."""
    characters = np.frombuffer(text, np.uint8)
    digits = characters > ord(" ")
    bits = characters[digits] - ord("0")
    if not bits.size or bits.size % 784 or bits.max() > 1:
        raise ValueError("it does not hold rows of 784 zeros and ones")
    return bits.reshape(-1, 784)


def read_cifar10(path: Path, members: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Files of the binary version of CIFAR-10: images (N, 3, 32, 32) uint8, labels (N,) uint8.

    Args:
        path: the .tar.gz archive, or the folder that it was unpacked in.
        members: `CIFAR_TRAIN` or `CIFAR_TEST`.

    Raises:
        DataError: a file is missing or damaged.
    """
    if path.is_dir():
        raw = b"".join(_cifar_file(path / member) for member in members)
    else:
        with _reading(path, "fetch it again"), gzip.open(path) as file:
            raw = _cifar_members(file, members)
    if len(raw) % _CIFAR_ROW:
        raise DataError(f"{path} cannot be read (it does not hold whole images); fetch it again")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, _CIFAR_ROW)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def _cifar_file(path: Path) -> bytes:
    with _reading(path, "fetch it again"), open(path, "rb") as file:
        raw = _read_at_most(file, _CIFAR_FILE_BYTES + 1)
        if len(raw) > _CIFAR_FILE_BYTES:
            raise ValueError("it holds more than 10,000 images")
        return bytes(raw)


def _cifar_members(file: io.BufferedIOBase, members: tuple[str, ...]) -> bytes:
    found: dict[str, bytes] = {}
    limited = _Limited(file, _CIFAR_ARCHIVE_BYTES)
    with tarfile.open(fileobj=limited, mode="r|") as archive:
        for info in archive:
            if info.name in members and info.isreg() and info.size <= _CIFAR_FILE_BYTES:
                content = archive.extractfile(info)
                found[info.name] = b"" if content is None else content.read()
    while limited.read(_PIECE_BYTES):
        pass  # to the checksum at the end
    missing = [name for name in members if name not in found]
    if missing:
        raise ValueError(f"it has no sound {missing[0]}")
    return b"".join(found[name] for name in members)


class _Limited(io.RawIOBase):
    """Reads a file up to so many bytes; ValueError where it goes on."""

    def __init__(self, file: IO[bytes] | io.BufferedIOBase, limit: int):
        self.file = file
        self.left = limit

    def read(self, count: int = -1, /) -> bytes:
        if self.left <= 0:
            raise ValueError("it unpacks to more than it can hold")
        piece = self.file.read(self.left if count < 0 else min(count, self.left))
        self.left -= len(piece)
        return piece


def image_files(folder: Path) -> Iterator[Path]:
    """Files below a folder with an image's suffix; what starts with a dot is left out.

    Raises:
        DataError: a folder is reached twice, through links, or cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror})") from error

    seen: dict[tuple[int, int], str] = {}
    for here, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(here)
        first = seen.setdefault((status.st_dev, status.st_ino), here)
        if first != here:
            raise DataError(f"{here} is the same folder as {first}; remove one of the links")
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in files if _is_image(name))


def holds_images(path: Path) -> bool:
    """Whether a path is an image, by its suffix, or a folder with images below it."""
    if path.is_dir():
        return not path.name.startswith(".") and any(image_files(path))
    return _is_image(path.name)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def read_folder(folder: Path) -> tuple[np.ndarray, list[str] | None]:
    """All images below a folder: (N, H, W) uint8 if all are grey, else (N, H, W, 3).

    Images in subfolders have the class of their subfolder: its name for each image.

    Raises:
        DataError: no images, several sizes, some images in subfolders and some not, a file that is
            no image, more than 8 bits a channel, transparency, animation, or more images than the
            memory holds.
    """
    paths = sorted(image_files(folder))
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    classes = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in paths]
    names = set(classes)
    if "" in names and len(names) > 1:
        raise DataError(f"{folder}: images lie both in subfolders, the classes, and beside them")
    return _stack_images(paths), None if names == {""} else classes


def _stack_images(paths: list[Path]) -> np.ndarray:
    arrays: list[np.ndarray] = []
    with refusing_bombs():
        for path in paths:
            arrays.append(_read_image(path))
            if len(arrays) == 1:
                total = len(paths) * arrays[0].size
                require_room(path.parent, total, total)
            _require_shape(path, arrays[-1], paths[0], arrays[0])
    if all(array.ndim == 2 for array in arrays):
        return np.stack(arrays)
    return np.stack([a if a.ndim == 3 else np.stack([a] * 3, -1) for a in arrays])


def _require_shape(path: Path, image: np.ndarray, first_path: Path, first: np.ndarray) -> None:
    if image.shape[:2] != first.shape[:2]:
        raise DataError(
            f"{path} is {image.shape[1]}x{image.shape[0]}, {first_path} is "
            f"{first.shape[1]}x{first.shape[0]}; bring all images to one size"
        )


def _read_image(path: Path) -> np.ndarray:
    with opened_image(path) as image:
        return np.asarray(opaque(image, path, "L" if image.mode in _GREY_MODES else "RGB"))


@contextmanager
def refusing_bombs() -> Iterator[None]:
    """Pillow's warning of too many pixels is an error inside, which takes a while to set up.

    Raises:
        DataError: Pillow is not installed.
    """
    try:
        from PIL.Image import DecompressionBombWarning
    except ImportError:
        raise DataError("image files need pillow: pip install pillow") from None
    with warnings.catch_warnings():
        warnings.simplefilter("error", DecompressionBombWarning)
        yield


@contextmanager
def opened_image(path: Path, *, deep: bool = False) -> Iterator[ImageFile]:
    """A picture in memory, turned as its EXIF says; call it inside of `refusing_bombs`.

    Args:
        path: a file of one of the image formats.
        deep: a channel may have more than 8 bits, as in a mask of many labels.

    Raises:
        DataError: something else, an animation, or a picture of more pixels than Pillow takes.
    """
    from PIL import Image, ImageOps

    with (
        _reading(path, "replace or remove it", " as an image"),
        Image.open(path, formats=_IMAGE_FORMATS) as image,
    ):
        if not deep and _is_deep(image):
            raise DataError(f"{path} has more than 8 bits a channel; convert it")
        # other pictures in a photograph of this format are previews
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise DataError(f"{path} is animated; keep one picture of it")
        image.load()
        if not _ORIENTED.isdisjoint(image.info):
            ImageOps.exif_transpose(image, in_place=True)
        yield image


def opaque(image: Image, path: Path, mode: str) -> Image:
    """The picture in a mode without transparency.

    Raises:
        DataError: a pixel is transparent.
    """
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise DataError(f"{path} has transparent pixels; lay it on a background")
    return image if image.mode == mode else image.convert(mode)


def _is_deep(image: ImageFile) -> bool:
    """Whether a channel has more than 8 bits; Pillow cuts those of colour PNGs to 8 unasked."""
    cut = image.format == "PNG" and ";16" in str(image.tile)
    return cut or image.mode.startswith(("I", "F"))


@contextmanager
def _reading(path: Path, advice: str, how: str = "") -> Iterator[None]:
    """Turn whatever fails while a file is read into a DataError that names it.

    Raises:
        DataError: also where it is no regular file, or larger than the memory.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is not a regular file")
        require_room(path, status.st_size, 0)
        yield
    except DataError:
        raise
    except Exception as error:  # decoders of damaged files raise what they like
        problem = (isinstance(error, OSError) and error.strerror) or str(error)
        problem = problem or type(error).__name__
        raise DataError(f"{path} cannot be read{how} ({problem}); {advice}") from error


def require_room(path: Path, stored: int, elements: int) -> None:
    """Refuse an array of so many bytes that becomes so many float32.

    Raises:
        DataError: that is more than the machine's memory.
    """
    needed = stored + 4 * elements
    if needed > memory_bytes():
        raise DataError(
            f"{path} needs {needed / 2**30:.3g} GiB of memory, the machine has "
            f"{memory_bytes() / 2**30:.3g}; take fewer or smaller images"
        )


def _read_at_most(file: io.BufferedIOBase, count: int) -> bytearray:
    """Up to `count` bytes; memory grows with what comes, not with what was promised."""
    raw = bytearray()
    while len(raw) < count and (piece := file.read(min(_PIECE_BYTES, count - len(raw)))):
        raw += piece
    return raw
