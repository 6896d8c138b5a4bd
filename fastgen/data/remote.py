"""Fetching the files of data sets: where they are, and checksums of what they must be."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.data.readers import bits_of_amat
from fastgen.data.splits import DataError, one_line

_SILENCE_SECONDS = 30
_WINDOW_SECONDS = 60
_SLOWEST_BYTES_PER_SECOND = 2_000
_WAITS_SECONDS = (1, 4)
_CHUNK_BYTES = 2**18
_BUSY = (408, 429)


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256_of_bits(path: Path) -> str:
    """Of the packed bits of an .amat file, whatever the spaces between them."""
    bits = np.packbits(bits_of_amat(path.read_bytes()), axis=1)
    return hashlib.sha256(bits.tobytes()).hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch.

    Attributes:
        url: where it is.
        path: where it goes in the data folder.
        checksum: what `digest` must say of it.
        max_bytes: more than it can have; nothing longer is fetched or looked at.
        digest: path -> checksum; ValueError where the file cannot have one.
    """

    url: str
    path: str
    checksum: str
    max_bytes: int
    digest: Callable[[Path], str] = _md5


def _idx_files(folder: str, base: str, checksums: dict[str, str]) -> tuple[RemoteFile, ...]:
    return tuple(
        RemoteFile(f"{base}/{name}.gz", f"{folder}/{name}.gz", checksum, 50_000_000)
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
            200_000_000,
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
            200_000_000,
        ),
    ),
}


def download(name: str, root: Path, report: Callable[[str], None] = print) -> list[Path]:
    """Fetch the files of a data set into a folder; those already there are checked and kept.

    A file appears under its name only once it is whole and its checksum is right. Where tqdm is
    installed and standard error is a terminal, a bar shows how far it is.

    A connection that fails, a server that says it is busy or broken, and one that sends nothing for
    30 s, or less than 2,000 bytes/s over a minute, are tried three times.

    Args:
        name: a key of `REMOTE_FILES`.
        root: the data folder, made where it is missing.
        report: called with a line about each file, and about each attempt that failed.

    Returns:
        the files' paths.

    Raises:
        DataError: nothing is known to fetch, the network or the disk fails, a file is larger than
            it can be, or a checksum differs, that of a file already there included.
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


class _TransferError(Exception):
    """A transfer that failed; `again`: another attempt may go better."""

    def __init__(self, problem: str, *, again: bool):
        super().__init__(one_line(problem.strip()))
        self.again = again


def _fetch(file: RemoteFile, path: Path, report: Callable[[str], None]) -> Path:
    if os.path.lexists(path):
        _check_present(file, path)
        report(f"{path} is there")
        return path
    report(f"{file.url} -> {path}")
    # two downloads at once must not write into one file
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _transfer(file, partial, report)
        if problem := _difference(file, partial):
            raise DataError(
                f"{file.url} gave another file than it should: {problem}; nothing was kept"
            )
        os.replace(partial, path)
    except _TransferError as error:
        raise DataError(
            f"{file.url} cannot be fetched ({error}); fetch it by other means and put it at {path}"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return path


def _check_present(file: RemoteFile, path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} is in the way: it is not a regular file; remove it")
    try:
        problem = _difference(file, path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error
    if problem:
        raise DataError(
            f"{path} is there but is not the file at {file.url}: {problem}; remove it to have it "
            "fetched again"
        )


def _difference(file: RemoteFile, path: Path) -> str | None:
    """What tells a file from the one that it should be."""
    size = path.stat().st_size
    if size > file.max_bytes:
        return f"it has {size} bytes, more than {file.max_bytes}"
    try:
        found = file.digest(path)
    except ValueError as error:
        return str(error)
    return None if found == file.checksum else f"its checksum is {found}, not {file.checksum}"


def _transfer(file: RemoteFile, partial: Path, report: Callable[[str], None]) -> None:
    for wait in (*_WAITS_SECONDS, None):
        try:
            with open(partial, "wb") as out, closing(_chunks(file)) as chunks:
                for chunk in chunks:
                    out.write(chunk)
            return
        except _TransferError as error:
            if not error.again:
                raise
            if wait is None:
                tries = len(_WAITS_SECONDS) + 1
                raise _TransferError(f"{error}; tried {tries} times", again=False) from error
            report(f"{file.url}: {error}; again in {wait} s")
            time.sleep(wait)


def _chunks(file: RemoteFile) -> Generator[bytes, None, None]:
    """A remote file piece by piece; a fault of the network is a _TransferError."""
    try:
        with urllib.request.urlopen(file.url, timeout=_SILENCE_SECONDS) as response:
            yield from _content(response, file)
    except urllib.error.HTTPError as error:
        error.close()
        again = error.code >= 500 or error.code in _BUSY
        raise _TransferError(f"HTTP status {error.code} {error.reason}", again=again) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise _TransferError(f"the connection failed: {problem}", again=True) from error


def _content(response: http.client.HTTPResponse, file: RemoteFile) -> Iterator[bytes]:
    total = response.length
    received, since, mark = 0, time.monotonic(), 0
    with _progress(file.path.rpartition("/")[2], total) as bar:
        while received != total:
            if max(received, total or 0) > file.max_bytes:
                size = total or f"{received} and more"
                raise _TransferError(
                    f"it has {size} bytes, more than {file.max_bytes}", again=False
                )
            now = time.monotonic()
            if now - since > _WINDOW_SECONDS:
                if received - mark < _SLOWEST_BYTES_PER_SECOND * (now - since):
                    raise _TransferError(
                        f"less than {_SLOWEST_BYTES_PER_SECOND} bytes/s came", again=True
                    )
                since, mark = now, received
            # read1 returns what has come: read would wait for a slow server past any time limit
            chunk = response.read1(_CHUNK_BYTES)
            if not chunk:
                break
            received += len(chunk)
            if bar is not None:
                bar.update(len(chunk))
            yield chunk
    if total is not None and received != total:
        raise _TransferError(f"it ended after {received} of {total} bytes", again=True)


def _progress(name: str, total: int | None) -> AbstractContextManager[Any]:
    """A bar on a terminal; None where tqdm, which is an extra, is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext()
    return tqdm(total=total, desc=name, unit="B", unit_scale=True, leave=False, disable=None)
