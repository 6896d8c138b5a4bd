"""Image data sets and toy densities as tensors, with fixed train, validation and test splits."""

from fastgen.data.images import DATASETS, load_images, resolve_data_root
from fastgen.data.loader import BatchLoader
from fastgen.data.remote import download
from fastgen.data.splits import DataError, ImageDataset, ImageSplit
from fastgen.data.toys import TOYS, PointDataset, PointSplit, ToyDensity, load_toy

__all__ = [
    "DATASETS",
    "TOYS",
    "BatchLoader",
    "DataError",
    "ImageDataset",
    "ImageSplit",
    "PointDataset",
    "PointSplit",
    "ToyDensity",
    "download",
    "load_images",
    "load_toy",
    "resolve_data_root",
]
