"""What a data set is: three splits of images in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "valid", "test")
_SPLIT_SEED = 20260101


class DataError(ValueError):
    """The data asked for is missing or not what it should be; one line that says what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Text from files, their names or servers, fit to print: what is not printable is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass
class ImageSplit:
    """Images (N, C, H, W), float32 in [0, 1], and labels (N,), int64, or None."""

    images: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class ImageDataset:
    """The three splits of one data set; `num_classes` is None without labels.

    Raises:
        DataError: a label that is not in [0, num_classes).
    """

    name: str
    train: ImageSplit
    valid: ImageSplit
    test: ImageSplit
    num_classes: int | None = None

    def __post_init__(self) -> None:
        classes = self.num_classes
        for labels in (self.train.labels, self.valid.labels, self.test.labels):
            if classes is None or labels is None:
                continue
            if not ((labels >= 0) & (labels < classes)).all():
                raise DataError(
                    f"data set {self.name!r}: labels must be in [0, {classes}), got "
                    f"[{labels.min()}, {labels.max()}]"
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def make_dataset(name: str, splits: list[ImageSplit]) -> ImageDataset:
    """Train, validation and test as one data set.

    Raises:
        DataError: a split is empty, of another image size, or has not as many labels as images; or
            labels that are no numbers of classes.
    """
    shapes = {tuple(split.images.shape[1:]) for split in splits}
    if len(shapes) > 1 or any(len(split) == 0 for split in splits):
        sizes = [tuple(split.images.shape) for split in splits]
        raise DataError(f"data set {name!r}: its splits must be non-empty and alike, got {sizes}")
    for split in splits:
        _check_labels(name, split)
    labels = [split.labels for split in splits if split.labels is not None]
    num_classes = int(torch.cat(labels).max()) + 1 if len(labels) == len(splits) else None
    total = sum(len(split) for split in splits)
    if num_classes is not None and num_classes > total:
        raise DataError(
            f"data set {name!r}: labels must number the classes from 0, but the largest is "
            f"{num_classes - 1} among {total} images"
        )
    train, valid, test = splits
    return ImageDataset(name, train, valid, test, num_classes)


def split_by_permutation(name: str, images: Tensor, labels: Tensor | None) -> ImageDataset:
    """80 / 10 / 10 % of a fixed shuffle.

    Raises:
        DataError: as `make_dataset`.
    """
    return complete_splits(name, {"train": ImageSplit(images, labels)})


def complete_splits(name: str, splits: dict[str, ImageSplit]) -> ImageDataset:
    """A data set of `train` and perhaps `valid` and `test`.

    What is missing of these is a tenth of `train` each, by a fixed shuffle.

    Raises:
        DataError: as `make_dataset`.
    """
    train = splits["train"]
    _check_labels(name, train)
    missing = [split for split in SPLITS[1:] if split not in splits]
    if missing:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(_SPLIT_SEED))
        held_out = len(train) // 10
        kept = len(train) - held_out * len(missing)
        parts = order.split([kept] + [held_out] * len(missing))
        splits = splits | {
            split: _rows(train, part)
            for split, part in zip(["train", *missing], parts, strict=True)
        }
    return make_dataset(name, [splits[split] for split in SPLITS])


def hold_out_last(name: str, train: ImageSplit, test: ImageSplit, count: int) -> ImageDataset:
    """The last `count` training images become the validation split.

    Raises:
        DataError: as `make_dataset`.
    """
    kept = max(len(train) - count, 0)
    first, last = (_rows(train, rows) for rows in (slice(kept), slice(kept, None)))
    return make_dataset(name, [first, last, test])


def to_unit_nchw(array: np.ndarray, source: object) -> Tensor:
    """uint8 or float images, channels first, last or none -> float32 (N, C, H, W) in [0, 1].

    Raises:
        DataError: another shape or dtype, no pixels, or floats outside [0, 1].
    """
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[-1] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise DataError(
            f"{source}: expected images (N, H, W), (N, H, W, C) or (N, C, H, W), not {array.shape}"
        )
    if 0 in array.shape[2:]:
        raise DataError(f"{source}: the images have no pixels: their shape is {array.shape[1:]}")
    if array.dtype == np.uint8:
        return torch.from_numpy(array.astype(np.float32, order="C")).div_(255)
    if array.dtype.kind != "f":
        raise DataError(f"{source}: expected uint8 images, or floats in [0, 1], not {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        found = "NaN" if np.isnan(array.min()) else f"values in [{array.min()}, {array.max()}]"
        raise DataError(f"{source}: expected uint8 images, or floats in [0, 1], got {found}")
    return torch.from_numpy(array.astype(np.float32, order="C"))


def to_labels(array: np.ndarray, source: object, classes: int | None = None) -> Tensor:
    """Integers (N,) in [0, classes), or non-negative ones, -> int64.

    Raises:
        DataError: anything else.
    """
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and array.min() < 0):
        raise DataError(
            f"{source} must be non-negative integers of shape (N,), not {array.dtype} {array.shape}"
        )
    most = (np.iinfo(np.int64).max if classes is None else classes) - 1
    if array.size and array.max() > most:
        raise DataError(f"{source} must be in [0, {most}], got {array.max()}")
    return torch.from_numpy(array.astype(np.int64))


def _rows(split: ImageSplit, rows: Tensor | slice) -> ImageSplit:
    return ImageSplit(split.images[rows], None if split.labels is None else split.labels[rows])


def _check_labels(name: str, split: ImageSplit) -> None:
    if split.labels is not None and len(split.labels) != len(split):
        raise DataError(f"data set {name!r}: {len(split)} images, {len(split.labels)} labels")
