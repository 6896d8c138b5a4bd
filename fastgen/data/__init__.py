"""Image data sets as tensors, with fixed train, validation and test splits."""

from fastgen.data.images import (
    DATASETS,
    DataError,
    ImageDataset,
    ImageSplit,
    load_images,
    resolve_data_root,
)
from fastgen.data.loader import BatchLoader

__all__ = [
    "DATASETS",
    "BatchLoader",
    "DataError",
    "ImageDataset",
    "ImageSplit",
    "load_images",
    "resolve_data_root",
]
