"""Data sets of images and of points, with fixed splits; sources of rows, and batches of them."""

from fastgen.data.images import DATASETS, load_images, resolve_data_root
from fastgen.data.loader import BatchLoader
from fastgen.data.remote import download
from fastgen.data.source import (
    ArraySource,
    Batch,
    Clips,
    DatasetSource,
    FileArray,
    ImageFiles,
    Source,
    Subset,
    TensorSource,
    Windows,
)
from fastgen.data.splits import DataError, ImageDataset, ImageSplit
from fastgen.data.toys import TOYS, PointDataset, PointSplit, ToyDensity, load_toy

__all__ = [
    "DATASETS",
    "TOYS",
    "ArraySource",
    "Batch",
    "BatchLoader",
    "Clips",
    "DataError",
    "DatasetSource",
    "FileArray",
    "ImageDataset",
    "ImageFiles",
    "ImageSplit",
    "PointDataset",
    "PointSplit",
    "Source",
    "Subset",
    "TensorSource",
    "ToyDensity",
    "Windows",
    "download",
    "load_images",
    "load_toy",
    "resolve_data_root",
]
