"""Files of images as numpy arrays. Nothing is unpickled."""

from __future__ import annotations

import gzip
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fastgen.data.splits import DataError

_CIFAR_ROW = 1 + 3 * 32 * 32
_CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_TRAIN = tuple(f"{_CIFAR_FOLDER}/data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = (f"{_CIFAR_FOLDER}/test_batch.bin",)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzip'ed or not.

    Raises:
        DataError: it is not one.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        zeros, dtype, rank = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
        if zeros != 0 or dtype != 0x08:
            raise ValueError("it is not an IDX file of unsigned bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file.

    Raises:
        DataError: it cannot be read, or holds objects.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as .npz ({error}); fetch or write it again"
        ) from error


def read_amat(path: Path) -> np.ndarray:
    """Rows of 784 zeros and ones in text, as the fixed binarised MNIST has them: uint8 (N, 784).

    Raises:
        DataError: something else.
    """
    try:
        return bits_of_amat(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error


def bits_of_amat(text: bytes) -> np.ndarray:
    """The rows of an .amat file; ValueError where they are not 784 zeros and ones each."""
    characters = np.frombuffer(text, np.uint8)
    digits = characters > ord(" ")
    bits = characters[digits] - ord("0")
    if not bits.size or bits.size % 784 or bits.max() > 1:
        raise ValueError("it does not hold rows of 784 zeros and ones")
    return bits.reshape(-1, 784)


def read_cifar10(path: Path, members: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Files of the binary version of CIFAR-10: images (N, 3, 32, 32) uint8, labels (N,) uint8.

    Args:
        path: the .tar.gz archive, or the folder that it was unpacked in.
        members: `CIFAR_TRAIN` or `CIFAR_TEST`.

    Raises:
        DataError: a file is missing or damaged.
    """
    try:
        if path.is_dir():
            raw = b"".join((path / member).read_bytes() for member in members)
        else:
            with tarfile.open(path, "r:gz") as archive:
                raw = b"".join(_member(archive, member) for member in members)
        rows = np.frombuffer(raw, np.uint8).reshape(-1, _CIFAR_ROW)
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is not a file")
    return file.read()


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """All images below a folder: (N, H, W) uint8 if all are grey, else (N, H, W, 3).

    Images in subfolders have the class of their subfolder, in alphabetical order: labels (N,).

    Raises:
        DataError: no images, several sizes, some images in subfolders and some not, a file that is
            no image, or more than 8 bits a channel.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    classes = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in paths]
    names = sorted(set(classes))
    if "" in names and len(names) > 1:
        raise DataError(f"{folder}: images lie both in subfolders, the classes, and beside them")
    arrays = [_read_image(path) for path in paths]
    grey = all(array.ndim == 2 for array in arrays)
    images = [array if grey or array.ndim == 3 else np.stack([array] * 3, -1) for array in arrays]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{path} is {image.shape[1]}x{image.shape[0]}, {paths[0]} is "
                f"{images[0].shape[1]}x{images[0].shape[0]}; bring all images to one size"
            )
    labels = None if names == [""] else np.array([names.index(name) for name in classes])
    return np.stack(images), labels


def _read_image(path: Path) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("image folders need pillow: pip install pillow") from None
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path} has more than 8 bits a channel; convert it")
            return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read as an image ({error})") from error
