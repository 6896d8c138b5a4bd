"""Image data sets, whole in memory: float32 in [0, 1], shape (N, C, H, W), labels int64 (N,).

| name              | where                                   | train / validation / test          |
|-------------------|-----------------------------------------|------------------------------------|
| `digits`          | inside scikit-learn, 8x8 grey           | 80 / 10 / 10 % of a fixed shuffle  |
| `mnist`           | `ROOT/mnist/*-ubyte.gz` (IDX)           | all but 5,000 / last 5,000 / t10k  |
| `fashion-mnist`   | `ROOT/fashion-mnist/*-ubyte.gz` (IDX)   | as `mnist`                         |
| `binarized-mnist` | `ROOT/binarized_mnist.npz`              | the file's own (Larochelle split)  |
| `cifar10`         | `ROOT/cifar10.npz` or `cifar10_4000.npz`| the file's own, or as `digits`     |
| `NAME.npz`        | `ROOT/NAME.npz`, or that path           | the file's own, or as `digits`     |

An `.npz` file holds either the arrays `train`, `valid` and `test`, with `train_labels` and so on
where there are labels, or one array `images` (or a single array of any name) with an optional
`labels`. Images are uint8 in [0, 255] or floats in [0, 1], shaped (N, H, W), (N, H, W, C) or (N, C,
H, W) with C of 1 or 3.
"""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_SPLIT_SEED = 20260101
_MNIST_VALID = 5_000


class DataError(ValueError):
    """The data asked for is missing or not what it should be; the message says what to do."""


@dataclass
class ImageSplit:
    """Images (N, C, H, W), float32 in [0, 1], and labels (N,), int64, or None."""

    images: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class ImageDataset:
    """The three splits of one data set; `num_classes` is None without labels."""

    name: str
    train: ImageSplit
    valid: ImageSplit
    test: ImageSplit
    num_classes: int | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def resolve_data_root(root: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder with the data files: `root`, else that of FASTGEN_DATA, else None."""
    chosen = root or os.environ.get("FASTGEN_DATA")
    return Path(chosen).expanduser().absolute() if chosen else None


def load_images(name: str, root: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Load a data set by name (table above).

    Args:
        name: a name of `DATASETS`, or an `.npz` file.
        root: folder that holds the files; by default the environment variable FASTGEN_DATA.

    Raises:
        DataError: unknown name, missing or damaged file, or arrays that are not images.
    """
    folder = resolve_data_root(root)
    if name in DATASETS:
        return DATASETS[name](name, folder)
    if name.endswith(".npz"):
        return _load_npz(name, _find(folder, name))
    known = ", ".join(DATASETS)
    raise DataError(f"data set {name!r} is not known; known: {known}, or the path of an .npz file")


def _load_digits(name: str, root: Path | None) -> ImageDataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("data set 'digits' needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)
    return _split_by_permutation(name, images, torch.from_numpy(digits.target.astype(np.int64)))


def _load_mnist(name: str, root: Path | None) -> ImageDataset:
    def part(prefix: str) -> tuple[Tensor, Tensor]:
        images = _read_idx(_find(root, f"{name}/{prefix}-images-idx3-ubyte.gz"))
        labels = _read_idx(_find(root, f"{name}/{prefix}-labels-idx1-ubyte.gz"))
        return _to_unit_nchw(images, name), torch.from_numpy(labels.astype(np.int64))

    images, labels = part("train")
    count = max(len(images) - _MNIST_VALID, 0)
    train, valid = (
        ImageSplit(images[rows], labels[rows]) for rows in (slice(count), slice(count, None))
    )
    return _dataset(name, [train, valid, ImageSplit(*part("t10k"))])


def _load_binarized_mnist(name: str, root: Path | None) -> ImageDataset:
    path = _find(root, "binarized_mnist.npz")
    arrays = _read_npz(path)
    splits = []
    for key in ("train", "valid", "test"):
        packed = arrays.get(key)
        if packed is None or packed.ndim != 2 or packed.shape[1] != 98 or packed.dtype != np.uint8:
            raise DataError(f"{path}: expected uint8 {key} of shape (N, 98), 784 packed bits a row")
        bits = np.unpackbits(packed, axis=1).reshape(-1, 1, 28, 28)
        splits.append(ImageSplit(torch.from_numpy(bits.astype(np.float32))))
    return _dataset(name, splits)


def _load_cifar10(name: str, root: Path | None) -> ImageDataset:
    return _load_npz(name, _find(root, "cifar10.npz", "cifar10_4000.npz"))


DATASETS: dict[str, Callable[[str, Path | None], ImageDataset]] = {
    "digits": _load_digits,
    "mnist": _load_mnist,
    "fashion-mnist": _load_mnist,
    "binarized-mnist": _load_binarized_mnist,
    "cifar10": _load_cifar10,
}


def _find(root: Path | None, *names: str) -> Path:
    folders = [root] if root is not None else []
    if names[0].endswith(".npz"):
        folders.append(Path.cwd())
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    wanted = " or ".join(names)
    if root is None:
        raise DataError(
            f"{wanted} not found: no data folder is set; give --data-root DIR or FASTGEN_DATA=DIR"
        )
    looked = " and ".join(str(folder) for folder in folders)
    raise DataError(
        f"{wanted} not found in {looked}; put it there or give another folder with --data-root DIR"
    )


def _read_idx(path: Path) -> np.ndarray:
    try:
        raw = gzip.decompress(path.read_bytes())
        zeros, dtype, rank = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
        if zeros != 0 or dtype != 0x08:
            raise ValueError("it is not an IDX file of unsigned bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as .npz ({error}); fetch or write it again"
        ) from error


def _load_npz(name: str, path: Path) -> ImageDataset:
    arrays = _read_npz(path)
    label_keys = [key for key in arrays if key == "labels" or key.endswith("_labels")]
    labels = {key: _to_labels(arrays.pop(key), path, key) for key in label_keys}
    if {"train", "valid", "test"} <= arrays.keys():
        splits = [
            ImageSplit(_to_unit_nchw(arrays[key], path), labels.get(f"{key}_labels"))
            for key in ("train", "valid", "test")
        ]
        return _dataset(name, splits)
    if "images" not in arrays and len(arrays) != 1:
        found = ", ".join(arrays) or "no arrays"
        raise DataError(f"{path}: expected train, valid and test, or images; found {found}")
    images = arrays["images"] if "images" in arrays else next(iter(arrays.values()))
    return _split_by_permutation(name, _to_unit_nchw(images, path), labels.get("labels"))


def _to_labels(array: np.ndarray, path: Path, key: str) -> Tensor:
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and array.min() < 0):
        raise DataError(
            f"{path}: {key} must be non-negative integers of shape (N,), not {array.dtype} "
            f"{array.shape}"
        )
    return torch.from_numpy(array.astype(np.int64))


def _to_unit_nchw(array: np.ndarray, source: object) -> Tensor:
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[-1] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise DataError(
            f"{source}: expected images (N, H, W), (N, H, W, C) or (N, C, H, W), not {array.shape}"
        )
    if array.dtype == np.uint8:
        return torch.from_numpy(array.astype(np.float32, order="C")).div_(255)
    if array.dtype.kind != "f" or (array.size and not (array.min() >= 0 and array.max() <= 1)):
        raise DataError(f"{source}: expected uint8 images, or floats in [0, 1], not {array.dtype}")
    return torch.from_numpy(array.astype(np.float32, order="C"))


def _split_by_permutation(name: str, images: Tensor, labels: Tensor | None) -> ImageDataset:
    _check_labels(name, ImageSplit(images, labels))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    held_out = len(images) // 10
    parts = order.split([len(images) - 2 * held_out, held_out, held_out])
    splits = [ImageSplit(images[part], None if labels is None else labels[part]) for part in parts]
    return _dataset(name, splits)


def _dataset(name: str, splits: list[ImageSplit]) -> ImageDataset:
    shapes = {tuple(split.images.shape[1:]) for split in splits}
    if len(shapes) > 1 or any(len(split) == 0 for split in splits):
        sizes = [tuple(split.images.shape) for split in splits]
        raise DataError(f"data set {name!r}: its splits must be non-empty and alike, got {sizes}")
    for split in splits:
        _check_labels(name, split)
    labels = [split.labels for split in splits if split.labels is not None]
    num_classes = int(torch.cat(labels).max()) + 1 if len(labels) == len(splits) else None
    train, valid, test = splits
    return ImageDataset(name, train, valid, test, num_classes)


def _check_labels(name: str, split: ImageSplit) -> None:
    if split.labels is not None and len(split.labels) != len(split):
        raise DataError(f"data set {name!r}: {len(split)} images, {len(split.labels)} labels")
