"""Files that are damaged, that lie or that are not what their names say: each ends in one line."""

import gzip
import io
import math
import os
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.data import DataError, load_images, readers
from fastgen.data.readers import CIFAR_TEST

GREY = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16


@pytest.fixture
def small_machine(monkeypatch):
    """64 MiB of memory, and a failure where more than that is asked for."""
    monkeypatch.setattr(readers, "memory_bytes", lambda: 2**26)
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


def idx(shape: tuple[int, ...], content: bytes) -> bytes:
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + content


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npy_header(shape: tuple[int, ...], dtype: str = "|u1", version: bytes = b"\1\0") -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text) + 1)
    return b"\x93NUMPY" + version + size + text + b"\n"


def npz(compression: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return out.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(width: int, height: int, pixels: bytes, bits: int = 8, colour: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def tar_info(
    name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def encrypted(content: bytes) -> bytes:
    """An archive with the flag of encryption set for its only member, in both places."""
    raw = bytearray(content)
    raw[6] |= 1
    raw[raw.index(b"PK\1\2") + 8] |= 1
    return bytes(raw)


def unknown_method(content: bytes) -> bytes:
    raw = bytearray(content)
    raw[8] = raw[raw.index(b"PK\1\2") + 10] = 97
    return bytes(raw)


def one_line(error: pytest.ExceptionInfo, file: Path) -> None:
    text = str(error.value)
    assert text.isprintable() and file.name in text and len(text) < 600


IMAGES = npy(np.zeros((20, 4, 4), np.uint8))
IDX = {
    "empty": (b"", "cannot be read"),
    "huge": (idx((2**32 - 1,) * 3, b"12"), "needs 3.69e.20 GiB of memory, the machine has 0.0625"),
    "too large": (idx((2**13, 2**13), b"12"), "needs 0.312 GiB of memory"),
    "short": (idx((1000, 28, 28), b"12"), "its header promises 784000 bytes, 2 follow"),
    "long": (idx((1, 1, 1), b"12"), "its header promises 1 bytes, more follow"),
    "many dimensions": (idx((1,) * 255, b"1"), "cannot be read"),
    "zero": (idx((3, 0, 4), b""), "the images have no pixels"),
    "header only": (idx((1, 1, 1), b"")[:7], "cannot be read"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("what", IDX)
def test_idx(tmp_path, small_machine, packed, what):
    content, message = IDX[what]
    path = tmp_path / ("mnist/train-images-idx3-ubyte" + ".gz" * packed)
    path.parent.mkdir()
    path.write_bytes(gzip.compress(content) if packed else content)
    (path.parent / "train-labels-idx1-ubyte").write_bytes(idx((3,), b"012"))
    with pytest.raises(DataError, match=message) as error:
        load_images("mnist", tmp_path)
    one_line(error, path)


def test_an_idx_bomb_is_unpacked_no_further_than_its_header_says(tmp_path, small_machine):
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(idx((2, 2), b""))
        for _ in range(128):
            file.write(bytes(2**20))
    with pytest.raises(DataError, match="its header promises 4 bytes, more follow"):
        readers.read_idx(path)


def test_labels_that_mnist_does_not_have(tmp_path):
    for prefix in ("train", "t10k"):
        (tmp_path / "mnist").mkdir(exist_ok=True)
        path = tmp_path / f"mnist/{prefix}-images-idx3-ubyte"
        path.write_bytes(idx((2, 1, 1), b"12"))
        path.with_name(f"{prefix}-labels-idx1-ubyte").write_bytes(idx((2,), bytes([9, 10])))
    with pytest.raises(DataError, match=r"labels-idx1-ubyte must be in \[0, 9\], got 10"):
        load_images("mnist", tmp_path)


NPZ = {
    "npy": (IMAGES, "it is no zip archive; numpy.savez writes one"),
    "empty": (b"", "it is no zip archive"),
    "no members": (npz(), "expected train, valid and test, or images; found no arrays"),
    "text": (npz(images=IMAGES, readme=b"hello"), "readme.npy in it is no array"),
    "empty member": (npz(images=b""), "images.npy in it is no array"),
    "encrypted": (encrypted(npz(images=IMAGES)), "is encrypted"),
    "unknown method": (unknown_method(npz(images=IMAGES)), "compression"),
    "huge": (npz(images=npy_header((2**40, 4, 4))), "promises uint8 of shape .*, 0 bytes follow"),
    "negative": (npz(images=npy_header((-1, -4, 4)) + bytes(16)), "promises uint8 of shape"),
    "no bytes an item": (npz(images=npy_header((2**40,), "|S0")), "needs 4.1e.03 GiB of memory"),
    "short": (npz(images=IMAGES[:-1]), "promises uint8 of shape .20, 4, 4., 319 bytes follow"),
    "long": (npz(images=IMAGES + b"1"), "321 bytes follow"),
    "objects": (npz(images=npy(np.array([{}]))), "holds Python objects, which are not read"),
    "long header": (
        npz(images=npy_header((1,), version=b"\2\0")[:8] + struct.pack("<I", 2**31) + bytes(2**16)),
        "cannot be read as .npz",
    ),
    "version": (npz(images=npy_header((1,), version=b"\3\0")), r"of version \(3, 0\)"),
    "nested header": (npz(images=b"\x93NUMPY\1\0\x88\x13" + b"(" * 5000), "cannot be read as .npz"),
    "half": (npz(images=IMAGES)[:150], "it is no zip archive"),
    "pixels": (npz(images=npy(np.zeros((20, 0, 4), np.uint8))), "have no pixels"),
    "one number": (npz(images=npy(np.array(3))), r"expected images .*not \(\)"),
    "none": (npz(images=npy(np.zeros((0, 4, 4), np.uint8))), "must be non-empty"),
    "NaN": (npz(images=npy(np.full((20, 4, 4), np.nan, "f4"))), r"floats in \[0, 1\], got NaN"),
    "range": (
        npz(images=npy(np.linspace(-1, 2, 320).reshape(20, 4, 4))),
        r"floats in \[0, 1\], got values in \[-1.0, 2.0\]",
    ),
    "complex": (npz(images=npy(np.zeros((20, 4, 4), "c8"))), "not complex64"),
    "record": (npz(images=npy(np.zeros((20, 4, 4), "u1,u1"))), "expected uint8 images"),
    "bool labels": (
        npz(images=IMAGES, labels=npy(np.ones(20, bool))),
        "labels must be .* not bool",
    ),
    "labels below": (npz(images=IMAGES, labels=npy(np.full(20, -1))), "must be non-negative"),
    "labels above": (
        npz(images=IMAGES, labels=npy(np.full(20, 2**64 - 1, "u8"))),
        r"labels must be in \[0, .*got 18446744073709551615",
    ),
    "label matrix": (
        npz(images=IMAGES, labels=npy(np.zeros((20, 1), int))),
        r"not int64 \(20, 1\)",
    ),
}


@pytest.mark.parametrize("what", NPZ)
def test_npz(tmp_path, small_machine, what):
    content, message = NPZ[what]
    (tmp_path / "some.npz").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_images("some.npz", tmp_path)
    one_line(error, tmp_path / "some.npz")


def test_an_npz_bomb(tmp_path, small_machine):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name in ("train", "valid", "test"):
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(npy_header((8, 2**10, 2**10)))
                for _ in range(8):
                    member.write(bytes(2**20))
    # each of the three alone would fit
    with pytest.raises(DataError, match="bomb.npz needs 0.117 GiB of memory, the machine has 0.0"):
        load_images("bomb.npz", tmp_path)


def test_a_wrong_byte_in_an_npz_is_seen(tmp_path):
    content = bytearray(npz(zipfile.ZIP_STORED, images=IMAGES))
    content[content.index(IMAGES) + len(IMAGES) - 9] ^= 1
    (tmp_path / "some.npz").write_bytes(content)
    with pytest.raises(DataError, match="Bad CRC-32"):
        load_images("some.npz", tmp_path)


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f2", ">i2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_byte_and_memory_order(tmp_path, dtype, order):
    images = np.asarray(np.linspace(0, 1, 320).reshape(20, 4, 4), ">f4", order=order)
    labels = (np.arange(20) % 3).astype(dtype if "i" in dtype else ">u8")
    np.savez(
        tmp_path / "a.npz", images=images.astype(dtype if "f" in dtype else ">f4"), labels=labels
    )
    np.savez(tmp_path / "b.npz", images=images.astype("f4", order="C"), labels=labels.astype("i8"))
    a, b = load_images("a.npz", tmp_path), load_images("b.npz", tmp_path)
    torch.testing.assert_close(a.train.images, b.train.images, atol=1e-3, rtol=0)
    assert torch.equal(a.train.labels, b.train.labels) and a.num_classes == 3


def cifar(count: int) -> bytes:
    return bytes(count * 3073)


BATCH = CIFAR_TEST[0]
CIFAR = {
    "empty": b"",
    "too long": tar((tar_info(BATCH, 10_001 * 3073), cifar(10_001))),
    "link to itself": tar((tar_info(BATCH, 0, tarfile.SYMTYPE, "test_batch.bin"), b"")),
    "FIFO": tar((tar_info(BATCH, 0, tarfile.FIFOTYPE), b"")),
    "half": tar((tar_info(BATCH, 3073 * 9), os.urandom(3073 * 9)))[:9000],
    "no members": tar(),
    "cut rows": tar((tar_info(BATCH, 3072), bytes(3072))),
}


@pytest.mark.parametrize("what", CIFAR)
def test_cifar10_archives(tmp_path, small_machine, what):
    path = tmp_path / "some.tar.gz"
    path.write_bytes(CIFAR[what])
    with pytest.raises(DataError, match="cannot be read .*; fetch it again") as error:
        readers.read_cifar10(path, CIFAR_TEST)
    one_line(error, path)


def test_a_cifar10_bomb(tmp_path, monkeypatch):
    path = tmp_path / "some.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        # a reader of whole headers makes room for as many bytes as this one says
        info = tar_info("x", 2**27, tarfile.GNUTYPE_LONGNAME)
        archive.addfile(info, io.BytesIO(bytes(2**27)))
    monkeypatch.setattr(readers, "_CIFAR_ARCHIVE_BYTES", 2**22)
    tracemalloc.start()
    with pytest.raises(DataError, match="it unpacks to more than it can hold"):
        readers.read_cifar10(path, CIFAR_TEST)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


PNG = {
    "bomb": (png(20_000, 20_000, b""), "exceeds limit"),
    "large": (png(10_000, 9_000, b""), "exceeds limit"),
    "no pixels": (png(0, 4, b""), "cannot be read as an image"),
    "half": (png(64, 64, os.urandom(64 * 65))[:2000], "cannot be read as an image"),
    "empty": (b"", "cannot be read as an image"),
    "16 bits grey": (png(2, 2, bytes(10), bits=16), "more than 8 bits"),
    "16 bits colour": (png(2, 2, bytes(26), bits=16, colour=2), "more than 8 bits"),
    "transparent": (png(2, 2, bytes(18), colour=6), "has transparent pixels"),
    "transparent grey": (png(2, 2, bytes(10), colour=4), "has transparent pixels"),
    "GIF": (
        b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
        "cannot be read",
    ),
}


@pytest.mark.parametrize("what", PNG)
def test_png(tmp_path, what):
    pytest.importorskip("PIL")
    content, message = PNG[what]
    path = tmp_path / "pets/x.png"
    path.parent.mkdir()
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=message) as error:
        load_images("pets", tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    one_line(error, path)


def test_more_images_than_memory_stop_after_the_first(tmp_path, small_machine):
    pytest.importorskip("PIL")
    (tmp_path / "pets").mkdir()
    for i in range(20):
        (tmp_path / f"pets/{i}.png").write_bytes(png(1000, 1000, bytes(1001 * 1000)))
    with pytest.raises(DataError, match="pets needs 0.0931 GiB of memory, the machine has 0.0625"):
        load_images("pets", tmp_path)


def picture(path: Path, image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def loaded(folder: Path) -> np.ndarray:
    return readers.read_folder(folder)[0]


def test_pictures_that_move(tmp_path):
    module = pytest.importorskip("PIL.Image")
    frames = [module.fromarray(GREY // 2 + 50 * i) for i in range(3)]
    for name in ("x.png", "y.webp"):
        path = tmp_path / name[0] / name
        picture(path, frames[0], save_all=True, append_images=frames[1:], lossless=True)
        with pytest.raises(DataError, match=f"{name} is animated; keep one picture"):
            loaded(tmp_path / name[0])
    picture(tmp_path / "z/z.jpg", frames[0], format="MPO", save_all=True, append_images=frames[1:])
    assert loaded(tmp_path / "z").shape == (1, 4, 4)


def test_modes_of_pictures(tmp_path):
    module = pytest.importorskip("PIL.Image")
    colour = module.fromarray(np.stack([GREY, GREY[::-1], GREY.T], -1))
    grey = module.fromarray(GREY)
    opaque, clear = grey.convert("LA"), grey.convert("RGBA")
    clear.putpixel((1, 1), (1, 2, 3, 254))
    palette = colour.quantize(16)
    assert module.fromarray(loaded_of(tmp_path / "palette", palette)[0]) == palette.convert("RGB")
    assert np.array_equal(loaded_of(tmp_path / "opaque", opaque)[0], GREY)
    cmyk = loaded_of(tmp_path / "cmyk", colour.convert("CMYK"), "x.jpg", quality=100)
    assert cmyk.shape == (1, 4, 4, 3)
    with pytest.raises(DataError, match="x.png has transparent pixels; lay it on a background"):
        loaded_of(tmp_path / "clear", clear)
    keyed = tmp_path / "keyed/x.png"
    picture(keyed, grey, transparency=int(GREY[1, 1]))
    with pytest.raises(DataError, match="x.png has transparent pixels"):
        loaded(keyed.parent)
    picture(keyed, grey, transparency=7)  # a value that no pixel has
    assert np.array_equal(loaded(keyed.parent)[0], GREY)


def loaded_of(folder: Path, image, name: str = "x.png", **options) -> np.ndarray:
    picture(folder / name, image, **options)
    return loaded(folder)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp"])
def test_pictures_are_turned_as_exif_says(tmp_path, name):
    module = pytest.importorskip("PIL.Image")
    exif = module.Exif()
    exif[0x0112] = 6
    upright = np.zeros((24, 16), np.uint8)
    upright[:8] = 255
    stored = module.fromarray(np.rot90(upright).copy())
    images = loaded_of(tmp_path / "pets", stored, name, exif=exif)
    images = images[0] if images.ndim == 3 else images[0, ..., 0]
    assert images.shape == (24, 16)
    assert (images[:7] > 200).all() and (images[9:] < 55).all()


@pytest.mark.parametrize("kind", ["FIFO", "folder", "broken link", "device"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("some.npz", "some.npz"),
        ("mnist", "mnist/train-images-idx3-ubyte.gz"),
        ("cifar10", "cifar10/cifar-10-binary.tar.gz"),
        ("binarized-mnist", "binarized_mnist/binarized_mnist_train.amat"),
        ("pets", "pets/x.png"),
    ],
)
def test_what_is_no_regular_file(tmp_path, kind, name, file):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "mnist").mkdir(exist_ok=True)
    (tmp_path / "mnist/train-labels-idx1-ubyte.gz").write_bytes(b"")
    make = {
        "FIFO": os.mkfifo,
        "folder": os.mkdir,
        "broken link": lambda path: os.symlink("nowhere", path),
        "device": lambda path: os.symlink("/dev/zero", path),
    }
    make[kind](path)
    with pytest.raises(
        DataError, match="not a regular file|not found|No such file|holds no images"
    ):
        load_images(name, tmp_path)


def test_a_sparse_file(tmp_path, small_machine):
    for name in ("some.npz", "mnist/train-images-idx3-ubyte", "pets/x.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, 2**40)
    (tmp_path / "mnist/train-labels-idx1-ubyte").touch()
    for name in ("some.npz", "mnist", "pets"):
        with pytest.raises(DataError, match="needs 1.02e.03 GiB of memory"):
            load_images(name, tmp_path)


@pytest.mark.parametrize("name", ["", "x" * 300, "a\0b", "x" * 300 + ".npz", "~", "nope\n\x1b[31m"])
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(DataError, match="not known|not found") as error:
        load_images(name, tmp_path)
    assert str(error.value).isprintable()


def test_a_home_that_is_none():
    with pytest.raises(DataError, match="data folder '~nobody-here/x': there is no such user"):
        load_images("mnist", "~nobody-here/x")


def test_odd_file_names(tmp_path):
    pytest.importorskip("PIL")
    folder = os.fsencode(tmp_path) + b"/pets/caf\xe9\n"
    os.makedirs(folder)
    for i in range(10):
        with open(folder + b"/%d\xff\n.png" % i, "wb") as file:
            file.write(png(2, 2, bytes(6)))
    assert load_images("pets", tmp_path).num_classes == 1
    with open(folder + b"/5\xff\n.png", "wb") as file:
        file.write(b"damaged")
    with pytest.raises(DataError, match=r"pets/caf\\udce9\\n/5\\udcff\\n.png cannot be") as error:
        load_images("pets", tmp_path)
    assert str(error.value).isprintable()


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with one kind of damage at a random place."""
    raw = bytearray(content)
    at = int(rng.integers(len(raw)) if rng.integers(2) else rng.integers(min(64, len(raw))))
    size = int(rng.integers(1, 9))
    noise = rng.bytes(size)
    extreme = rng.choice([b"\0\0\0\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
    kinds = {
        "flip": raw[:at] + bytes([raw[at] ^ (1 << rng.integers(8))]) + raw[at + 1 :],
        "noise": raw[:at] + noise + raw[at + size :],
        "insert": raw[:at] + noise + raw[at:],
        "cut": raw[:at],
        "leave out": raw[:at] + raw[at + size :],
        "extreme": raw[:at] + extreme + raw[at + 4 :],
        "again": raw + raw[at:],
    }
    return bytes(kinds[list(kinds)[rng.integers(len(kinds))]])


def sound_files() -> dict[str, bytes]:
    """A small sound file of each kind, by the name that it is loaded under."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 6, 5), np.uint8)
    arrays = {"images": npy(pixels / 255), "labels": npy(np.arange(20) % 4)}
    files = {
        "stored.npz": npz(zipfile.ZIP_STORED, **arrays),
        "deflated.npz": npz(**arrays),
        "lzma.npz": npz(zipfile.ZIP_LZMA, **arrays),
        "bzip2.npz": npz(zipfile.ZIP_BZIP2, **arrays),
        "x.idx": idx(pixels.shape, pixels.tobytes()),
        "x.idx.gz": gzip.compress(idx(pixels.shape, pixels.tobytes())),
        "x.tar.gz": tar((tar_info(BATCH, 3073 * 2), rng.bytes(3073 * 2))),
        "x.amat": b" ".join(b"%d" % bit for bit in rng.integers(0, 2, 1568)),
    }
    try:
        from PIL import Image
    except ImportError:
        return files
    colour = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    pictures = {
        "grey.png": (colour.convert("L"), {}),
        "colour.png": (colour, {"exif": exif}),
        "palette.png": (colour.quantize(8), {"transparency": 9}),
        "x.jpg": (colour, {"exif": exif}),
        "progressive.jpeg": (colour, {"progressive": True}),
        "x.bmp": (colour, {}),
        "x.webp": (colour, {"lossless": True}),
        "lossy.webp": (colour, {"exif": exif}),
    }
    for name, (image, options) in pictures.items():
        out = io.BytesIO()
        image.save(out, {"jpg": "jpeg"}.get(name.split(".")[1], name.split(".")[1]), **options)
        files[name] = out.getvalue()
    return files


def load(path: Path) -> np.ndarray:
    """Load a file by what reads its kind."""
    if path.suffix == ".npz":
        return load_images(path.name, path.parent).train.images.numpy()
    if ".idx" in path.name:
        return readers.read_idx(path)
    if path.suffix == ".amat":
        return readers.read_amat(path)
    return readers.read_cifar10(path, CIFAR_TEST)[0] if ".tar" in path.name else loaded(path.parent)


FUZZED = 60


@pytest.mark.parametrize("name", sound_files())
def test_damage_is_seen_or_harmless(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "memory_bytes", lambda: 2**28)
    monkeypatch.setattr(pytest.importorskip("PIL.Image"), "MAX_IMAGE_PIXELS", 10**6)
    sound = sound_files()[name]
    path = tmp_path / name
    path.write_bytes(sound)
    assert load(path).size
    rng = np.random.default_rng(list(name.encode()))
    refused = 0
    for _ in range(FUZZED):
        path.write_bytes(damaged(sound, rng))
        try:
            assert math.prod(load(path).shape)
        except DataError as error:
            assert str(error).isprintable()
            refused += 1
    assert refused
