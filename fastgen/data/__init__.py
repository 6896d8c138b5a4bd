"""Image data sets as tensors, with fixed train, validation and test splits."""

from fastgen.data.images import DATASETS, load_images, resolve_data_root
from fastgen.data.loader import BatchLoader
from fastgen.data.remote import download
from fastgen.data.splits import DataError, ImageDataset, ImageSplit

__all__ = [
    "DATASETS",
    "BatchLoader",
    "DataError",
    "ImageDataset",
    "ImageSplit",
    "download",
    "load_images",
    "resolve_data_root",
]
