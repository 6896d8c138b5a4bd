"""Fetching the files of data sets: where they are, and checksums of what they must be."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgen.data.readers import bits_of_amat
from fastgen.data.splits import DataError

_TIMEOUT = 60


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _sha256_of_bits(content: bytes) -> str:
    """Of the packed bits of an .amat file, whatever the spaces between them."""
    return hashlib.sha256(np.packbits(bits_of_amat(content), axis=1).tobytes()).hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch: from where, to which path in the data folder, and its checksum."""

    url: str
    path: str
    checksum: str
    digest: Callable[[bytes], str] = _md5


def _idx_files(folder: str, base: str, checksums: dict[str, str]) -> tuple[RemoteFile, ...]:
    return tuple(
        RemoteFile(f"{base}/{name}.gz", f"{folder}/{name}.gz", checksum)
        for name, checksum in checksums.items()
    )


_AMAT = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/binarized_mnist_"

REMOTE_FILES: dict[str, tuple[RemoteFile, ...]] = {
    "mnist": _idx_files(
        "mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        {
            "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": _idx_files(
        "fashion-mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        {
            "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "binarized-mnist": tuple(
        RemoteFile(
            f"{_AMAT}{split}.amat",
            f"binarized_mnist/binarized_mnist_{split}.amat",
            checksum,
            _sha256_of_bits,
        )
        for split, checksum in {
            "train": "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906",
            "valid": "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d",
            "test": "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2",
        }.items()
    ),
    "cifar10": (
        RemoteFile(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "cifar10/cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
        ),
    ),
}


def download(name: str, root: Path, report: Callable[[str], None] = print) -> list[Path]:
    """Fetch the files of a data set into a folder; those already there are kept.

    A file appears under its name only once it is whole and its checksum is right.

    Args:
        name: a key of `REMOTE_FILES`.
        root: the data folder, made where it is missing.
        report: called with a line about each file.

    Returns:
        the files' paths.

    Raises:
        DataError: nothing is known to fetch, the network or the disk fails, or a checksum differs.
    """
    if name not in REMOTE_FILES:
        known = ", ".join(REMOTE_FILES)
        raise DataError(f"data set {name!r} cannot be downloaded; these can: {known}")
    return [_fetch(file, root / file.path, report) for file in REMOTE_FILES[name]]


def where_to_get(name: str) -> str:
    """How to come by the files of a data set, for an error message; empty where unknown."""
    files = REMOTE_FILES.get(name, ())
    if not files:
        return ""
    urls = ", ".join(file.url for file in files)
    return f"; fastgen download {name} fetches it ({urls})"


def _fetch(file: RemoteFile, path: Path, report: Callable[[str], None]) -> Path:
    if path.exists():
        report(f"{path} is there")
        return path
    report(f"{file.url} -> {path}")
    partial = path.with_name(f".{path.name}.part")
    try:
        with urllib.request.urlopen(file.url, timeout=_TIMEOUT) as response:
            content = response.read()
    except OSError as error:
        raise DataError(
            f"{file.url} cannot be fetched ({error}); fetch it by other means and put it at {path}"
        ) from error
    _check(file, content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise DataError(f"{path} cannot be written ({error.strerror})") from error
    return path


def _check(file: RemoteFile, content: bytes) -> None:
    try:
        found = file.digest(content)
    except ValueError as error:
        found = f"none: {error}"
    if found != file.checksum:
        raise DataError(
            f"{file.url} gave another file than it should: its checksum is {found}, not "
            f"{file.checksum}; nothing was kept"
        )
