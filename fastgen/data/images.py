"""Image data sets, whole in memory: float32 in [0, 1], shape (N, C, H, W), labels int64 (N,).

| name              | where, in the data folder                     | train / valid / test      |
|-------------------|-----------------------------------------------|---------------------------|
| `digits`          | inside scikit-learn, 8x8 grey, 17 levels      | 8 : 1 : 1, shuffled       |
| `mnist`           | `mnist/*-ubyte[.gz]` (IDX)                    | last 5,000 of train, t10k |
| `fashion-mnist`   | `fashion-mnist/*-ubyte[.gz]` (IDX)            | as `mnist`                |
| `binarized-mnist` | `binarized_mnist.npz`, of packed bits, or     | Larochelle and Murray's:  |
|                   | `binarized_mnist/binarized_mnist_*.amat`      | 50,000 / 10,000 / 10,000  |
| `cifar10`         | `cifar10/cifar-10-binary.tar.gz`, or unpacked | last 5,000 of train, test |
|                   | or `cifar10.npz` or `cifar10_4000.npz`        | as `NAME.npz`             |
| `NAME.npz`        | `NAME.npz`, or that path                      | the file's, or as `digits`|
| a folder          | `NAME/`, or that path                         | its own, or as `digits`   |

An `.npz` file holds either the arrays `train`, `valid` and `test`, with `train_labels` and so on
where there are labels, or one array `images` (or a single array of any name) with an optional
`labels`. Images are uint8 in [0, 255] or floats in [0, 1], shaped (N, H, W), (N, H, W, C) or (N, C,
H, W) with C of 1 or 3.

A folder holds images of one size (PNG, JPEG, BMP, WebP), in subfolders by class where they have
classes; all of that either once, or in each of `train`, `valid` and `test`.

An 8-bit value v becomes v / 255, and nothing is added to it. What a model assumes about the steps
between values is part of its likelihood: `fastgen.losses.likelihoods` says which gives a mass to
the stored values; a density needs uniform noise of one step, and log 256 nats for each dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.data import readers
from fastgen.data.remote import where_to_get
from fastgen.data.splits import (
    DataError,
    ImageDataset,
    ImageSplit,
    hold_out_last,
    make_dataset,
    split_by_permutation,
    to_labels,
    to_unit_nchw,
)

_HELD_OUT = 5_000
_SPLITS = ("train", "valid", "test")


def resolve_data_root(root: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder with the data files: `root`, else that of FASTGEN_DATA, else None."""
    chosen = root or os.environ.get("FASTGEN_DATA")
    return Path(chosen).expanduser().absolute() if chosen else None


def load_images(name: str, root: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Load a data set by name (table above).

    Args:
        name: a name of `DATASETS`, an `.npz` file, or a folder of images.
        root: folder that holds the files; by default the environment variable FASTGEN_DATA.

    Raises:
        DataError: unknown name, missing or damaged file, or arrays that are not images.
    """
    root_folder = resolve_data_root(root)
    if name in DATASETS:
        return DATASETS[name](name, root_folder)
    if name.endswith(".npz"):
        return _load_npz(name, _find(name, root_folder, name))
    for parent in (root_folder, Path.cwd()):
        if parent is not None and (parent / name).is_dir():
            return _load_folder(name, parent / name)
    known = ", ".join(DATASETS)
    raise DataError(
        f"data set {name!r} is not known; known: {known}, the path of an .npz file, or a folder of "
        "images"
    )


def _load_digits(name: str, root: Path | None) -> ImageDataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("data set 'digits' needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)
    return split_by_permutation(name, images, torch.from_numpy(digits.target.astype(np.int64)))


def _load_mnist(name: str, root: Path | None) -> ImageDataset:
    def part(prefix: str) -> ImageSplit:
        images, labels = (
            readers.read_idx(
                _find(name, root, f"{name}/{prefix}-{kind}.gz", f"{name}/{prefix}-{kind}")
            )
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        return ImageSplit(to_unit_nchw(images, name), to_labels(labels, f"{name}: labels"))

    return hold_out_last(name, part("train"), part("t10k"), _HELD_OUT)


def _load_binarized_mnist(name: str, root: Path | None) -> ImageDataset:
    first, *_ = texts = [f"binarized_mnist/binarized_mnist_{split}.amat" for split in _SPLITS]
    path = _find(name, root, "binarized_mnist.npz", first)
    if path.suffix == ".npz":
        rows = _unpacked_bits(path)
    else:
        rows = [readers.read_amat(_find(name, root, text)) for text in texts]
    images = [bits.reshape(-1, 1, 28, 28).astype(np.float32) for bits in rows]
    return make_dataset(name, [ImageSplit(torch.from_numpy(array)) for array in images])


def _unpacked_bits(path: Path) -> list[np.ndarray]:
    arrays = readers.read_npz(path)
    for key in _SPLITS:
        packed = arrays.get(key)
        if packed is None or packed.ndim != 2 or packed.shape[1] != 98 or packed.dtype != np.uint8:
            raise DataError(f"{path}: expected uint8 {key} of shape (N, 98), 784 packed bits a row")
    return [np.unpackbits(arrays[key], axis=1) for key in _SPLITS]


def _load_cifar10(name: str, root: Path | None) -> ImageDataset:
    archive, folder = "cifar10/cifar-10-binary.tar.gz", "cifar10/cifar-10-batches-bin"
    path = _find(name, root, archive, folder, "cifar10.npz", "cifar10_4000.npz")
    if path.suffix == ".npz":
        return _load_npz(name, path)
    source = path.parent if path.is_dir() else path
    train, test = (
        ImageSplit(to_unit_nchw(images, source), to_labels(labels, source))
        for images, labels in (
            readers.read_cifar10(source, readers.CIFAR_TRAIN),
            readers.read_cifar10(source, readers.CIFAR_TEST),
        )
    )
    return hold_out_last(name, train, test, _HELD_OUT)


DATASETS: dict[str, Callable[[str, Path | None], ImageDataset]] = {
    "digits": _load_digits,
    "mnist": _load_mnist,
    "fashion-mnist": _load_mnist,
    "binarized-mnist": _load_binarized_mnist,
    "cifar10": _load_cifar10,
}


def _find(name: str, root: Path | None, *wanted: str) -> Path:
    """The first of the paths that is there, in the data folder; an .npz file also from here."""
    for path in wanted:
        folders = [root, Path.cwd()] if path.endswith(".npz") else [root]
        for folder in folders:
            if folder is not None and (folder / path).exists():
                return folder / path
    paths = " or ".join(wanted)
    if root is None:
        raise DataError(
            f"{paths} not found: no data folder is set; give --data-root DIR or FASTGEN_DATA=DIR"
            + where_to_get(name)
        )
    raise DataError(
        f"{paths} not found in {root}; put it there or give another folder with --data-root DIR"
        + where_to_get(name)
    )


def _load_npz(name: str, path: Path) -> ImageDataset:
    arrays = readers.read_npz(path)
    label_keys = [key for key in arrays if key == "labels" or key.endswith("_labels")]
    labels = {key: to_labels(arrays.pop(key), f"{path}: {key}") for key in label_keys}
    if set(_SPLITS) <= arrays.keys():
        splits = [
            ImageSplit(to_unit_nchw(arrays[key], path), labels.get(f"{key}_labels"))
            for key in _SPLITS
        ]
        return make_dataset(name, splits)
    if "images" not in arrays and len(arrays) != 1:
        found = ", ".join(arrays) or "no arrays"
        raise DataError(f"{path}: expected train, valid and test, or images; found {found}")
    images = arrays["images"] if "images" in arrays else next(iter(arrays.values()))
    return split_by_permutation(name, to_unit_nchw(images, path), labels.get("labels"))


def _load_folder(name: str, folder: Path) -> ImageDataset:
    def read(part: Path) -> tuple[Tensor, Tensor | None]:
        images, labels = readers.read_folder(part)
        return to_unit_nchw(images, part), None if labels is None else to_labels(labels, part)

    if not all((folder / split).is_dir() for split in _SPLITS):
        return split_by_permutation(name, *read(folder))
    return make_dataset(name, [ImageSplit(*read(folder / split)) for split in _SPLITS])
