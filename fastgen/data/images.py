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
classes; all of that either once, or in `train` and perhaps `valid` (`val`, `validation`) and
`test`. A split that is missing is a tenth of `train`, by a fixed shuffle. Classes are numbered in
the order of their names, and each must be in `train`. Links are followed; names that start with a
dot are left out. Pictures are turned as their EXIF says; palettes and CMYK become RGB. More than 8
bits a channel, transparent pixels and animations are refused: what to make of them is for you.

Nothing is loaded that, as float32, is more than the memory of the machine.

An 8-bit value v becomes v / 255, and nothing is added to it. What a model assumes about the steps
between values is part of its likelihood: `fastgen.losses.likelihoods` says which gives a mass to
the stored values; a density needs uniform noise of one step, and log 256 nats for each dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fastgen.data import readers
from fastgen.data.remote import where_to_get
from fastgen.data.splits import (
    SPLITS,
    DataError,
    ImageDataset,
    ImageSplit,
    complete_splits,
    hold_out_last,
    make_dataset,
    split_by_permutation,
    to_labels,
    to_unit_nchw,
)

_HELD_OUT = 5_000
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}


def resolve_data_root(root: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder with the data files: `root`, else that of FASTGEN_DATA, else None.

    Raises:
        DataError: it is in the home folder of a user that there is not.
    """
    chosen = root or os.environ.get("FASTGEN_DATA")
    try:
        return Path(chosen).expanduser().absolute() if chosen else None
    except RuntimeError:
        raise DataError(f"data folder {str(chosen)!r}: there is no such user") from None


def load_images(name: str, root: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Load a data set by name (table above).

    Args:
        name: a name of `DATASETS`, an `.npz` file, or a folder of images.
        root: folder that holds the files; by default the environment variable FASTGEN_DATA.

    Raises:
        DataError: unknown name, missing or damaged file, arrays that are not images, or more than
            the memory holds.
    """
    try:
        return _load(name, resolve_data_root(root))
    except (OSError, MemoryError) as error:
        problem = str(error) or "it does not fit in memory"
        raise DataError(f"data set {name!r} cannot be loaded ({problem})") from error


def _load(name: str, root_folder: Path | None) -> ImageDataset:
    if name in DATASETS:
        return DATASETS[name](name, root_folder)
    if name.endswith(".npz"):
        return _load_npz(name, _find(name, root_folder, name))
    for parent in (root_folder, Path()):
        # os.path says False where pathlib raises: a name too long, or not to be looked at
        if name and parent is not None and os.path.isdir(parent / name):
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
            _find(name, root, f"{name}/{prefix}-{kind}.gz", f"{name}/{prefix}-{kind}")
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        return ImageSplit(
            to_unit_nchw(readers.read_idx(images), images),
            to_labels(readers.read_idx(labels), labels, 10),
        )

    return hold_out_last(name, part("train"), part("t10k"), _HELD_OUT)


def _load_binarized_mnist(name: str, root: Path | None) -> ImageDataset:
    first, *_ = texts = [f"binarized_mnist/binarized_mnist_{split}.amat" for split in SPLITS]
    path = _find(name, root, "binarized_mnist.npz", first)
    if path.suffix == ".npz":
        rows = _unpacked_bits(path)
    else:
        rows = [readers.read_amat(_find(name, root, text)) for text in texts]
    images = [bits.reshape(-1, 1, 28, 28).astype(np.float32) for bits in rows]
    return make_dataset(name, [ImageSplit(torch.from_numpy(array)) for array in images])


def _unpacked_bits(path: Path) -> list[np.ndarray]:
    arrays = readers.read_npz(path)
    for key in SPLITS:
        packed = arrays.get(key)
        if packed is None or packed.ndim != 2 or packed.shape[1] != 98 or packed.dtype != np.uint8:
            raise DataError(f"{path}: expected uint8 {key} of shape (N, 98), 784 packed bits a row")
        readers.require_room(path, packed.size * 8, packed.size * 8)
    return [np.unpackbits(arrays[key], axis=1) for key in SPLITS]


def _load_cifar10(name: str, root: Path | None) -> ImageDataset:
    archive, folder = "cifar10/cifar-10-binary.tar.gz", "cifar10/cifar-10-batches-bin"
    path = _find(name, root, archive, folder, "cifar10.npz", "cifar10_4000.npz")
    if path.suffix == ".npz":
        return _load_npz(name, path)
    source = path.parent if path.is_dir() else path
    train, test = (
        ImageSplit(to_unit_nchw(images, source), to_labels(labels, f"{source}: labels", 10))
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
        folders = [root, Path()] if path.endswith(".npz") else [root]
        for folder in folders:
            if folder is not None and os.path.exists(folder / path):
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
    if set(SPLITS) <= arrays.keys():
        splits = [
            ImageSplit(to_unit_nchw(arrays[key], path), labels.get(f"{key}_labels"))
            for key in SPLITS
        ]
        return make_dataset(name, splits)
    if "images" not in arrays and len(arrays) != 1:
        found = ", ".join(arrays) or "no arrays"
        raise DataError(f"{path}: expected train, valid and test, or images; found {found}")
    images = arrays["images"] if "images" in arrays else next(iter(arrays.values()))
    return split_by_permutation(name, to_unit_nchw(images, path), labels.get("labels"))


def _load_folder(name: str, folder: Path) -> ImageDataset:
    splits = _split_folders(folder)
    read = {
        split: readers.read_folder(part) for split, part in (splits or {"train": folder}).items()
    }
    classes = _class_numbers(folder, {split: named for split, (_, named) in read.items()})
    return complete_splits(
        name,
        {
            split: ImageSplit(
                to_unit_nchw(images, splits.get(split, folder)),
                None if named is None else torch.tensor([classes[name] for name in named]),
            )
            for split, (images, named) in read.items()
        },
    )


def _split_folders(folder: Path) -> dict[str, Path]:
    """The subfolders that are splits; none where the folder has images or classes instead.

    Raises:
        DataError: there are splits, but not `train`, or two folders for one split, or other images
            beside them.
    """
    splits: dict[str, Path] = {}
    others = []
    for entry in sorted(folder.iterdir()):
        split = _SPLIT_NAMES.get(entry.name.lower())
        if split is None or not entry.is_dir():
            others.append(entry)
        elif split in splits:
            raise DataError(f"{folder}: {splits[split].name} and {entry.name} are one split")
        else:
            splits[split] = entry
    if not splits:
        return splits
    found = ", ".join(part.name for part in splits.values())
    beside = [entry.name for entry in others if readers.holds_images(entry)]
    if beside:
        raise DataError(
            f"{folder}: {found} would be splits of the data, but {_first(beside)} is beside them; "
            "move it into them, or give a class with such a name another"
        )
    if "train" not in splits:
        raise DataError(f"{folder} has {found} but no train; call the images to train on so")
    return splits


def _class_numbers(folder: Path, named: dict[str, list[str] | None]) -> dict[str, int]:
    """Numbers of the classes of all splits, in the order of their names.

    Args:
        folder: for the error.
        named: split -> the class of each image, None where it has no classes.

    Raises:
        DataError: a class that `train`, which has classes, lacks.
    """
    train = named["train"]
    for split, classes in named.items():
        strange = sorted(set(classes or ()) - set(train or classes or ()))
        if strange:
            raise DataError(
                f"{folder}: class {_first(strange)} of {split} is not in train; add it there or "
                "leave it out"
            )
    names = sorted({name for classes in named.values() for name in classes or ()})
    return {name: number for number, name in enumerate(names)}


def _first(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
