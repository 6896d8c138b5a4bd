import gzip
import os
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.data import DataError, ImageDataset, ImageSplit, load_images

ROOT = os.environ.get("FASTGEN_DATA")
SPLITS = ("train", "valid", "test")


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    raw = header + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def mnist_like(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 5010), ("t10k", 7)):
        pixels = rng.integers(0, 256, (count, 2, 3), dtype=np.uint8)
        write_idx(tmp_path / f"mnist/{prefix}-images-idx3-ubyte.gz", pixels)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(tmp_path / f"mnist/{prefix}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_digits():
    pytest.importorskip("sklearn")
    digits = load_images("digits")
    assert digits.image_shape == (1, 8, 8) and digits.num_classes == 10
    assert [len(s) for s in (digits.train, digits.valid, digits.test)] == [1439, 179, 179]
    assert digits.train.images.dtype == torch.float32
    assert digits.train.images.min() == 0 and digits.train.images.max() == 1
    again = load_images("digits")
    assert torch.equal(digits.test.images, again.test.images)
    # the split's seed is part of the data set: another would make published numbers incomparable
    assert digits.test.labels[:8].tolist() == [5, 5, 8, 5, 6, 6, 9, 5]


def test_mnist_layout(mnist_like):
    mnist = load_images("mnist", mnist_like)
    assert [len(s) for s in (mnist.train, mnist.valid, mnist.test)] == [10, 5000, 7]
    assert mnist.image_shape == (1, 2, 3) and mnist.num_classes == 10
    assert mnist.valid.labels[:3].tolist() == [0, 1, 2]
    raw = np.random.default_rng(0).integers(0, 256, (5010, 2, 3), dtype=np.uint8)
    torch.testing.assert_close(mnist.train.images[4, 0], torch.from_numpy(raw[4]) / 255)


def test_idx_files_may_be_unpacked(mnist_like):
    packed = load_images("mnist", mnist_like)
    for path in (mnist_like / "mnist").iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    unpacked = load_images("mnist", mnist_like)
    assert torch.equal(packed.train.images, unpacked.train.images)
    assert torch.equal(packed.test.labels, unpacked.test.labels)


def cifar_rows(count: int, seed: int) -> np.ndarray:
    """Rows of the binary version: a label, then red, green and blue planes."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    return rows


@pytest.fixture
def cifar_like(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(cifar_rows(1002, i).tobytes())
    (folder / "test_batch.bin").write_bytes(cifar_rows(3, 9).tobytes())
    return tmp_path


def packed_cifar(root: Path) -> Path:
    """The archive in the place of its folder."""
    folder = root / "cifar10" / "cifar-10-batches-bin"
    archive = root / "cifar10" / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    return archive


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_binary(cifar_like, packed):
    if packed:
        packed_cifar(cifar_like)
    cifar = load_images("cifar10", cifar_like)
    assert cifar.image_shape == (3, 32, 32) and cifar.num_classes == 10
    assert [len(s) for s in (cifar.train, cifar.valid, cifar.test)] == [10, 5000, 3]
    second = cifar_rows(1002, 2)
    torch.testing.assert_close(
        cifar.valid.images[1002 - 10, 2, 0, :3].mul(255), torch.tensor(second[0, 2049:2052]).float()
    )
    assert cifar.valid.labels[1002 - 10] == second[0, 0]


@pytest.mark.parametrize("damage", ["short", "missing", "not tar"])
def test_damaged_cifar10(cifar_like, damage):
    batch = cifar_like / "cifar10/cifar-10-batches-bin/data_batch_3.bin"
    if damage == "short":
        batch.write_bytes(batch.read_bytes()[:-1])
    elif damage == "missing":
        batch.unlink()
    else:
        packed_cifar(cifar_like).write_bytes(b"hello")
    with pytest.raises(DataError, match="cannot be read .*fetch it again"):
        load_images("cifar10", cifar_like)


def write_amat(root: Path, split: str, bits: np.ndarray) -> bytes:
    path = root / f"binarized_mnist/binarized_mnist_{split}.amat"
    path.parent.mkdir(exist_ok=True)
    text = b"".join(b" ".join(b"%d" % bit for bit in row) + b" \n" for row in bits)
    path.write_bytes(text)
    return text


def test_binarized_mnist_as_text_or_packed(tmp_path):
    rng = np.random.default_rng(0)
    rows = {s: rng.integers(0, 2, (n, 784), np.uint8) for n, s in enumerate(SPLITS, 2)}
    for split, bits in rows.items():
        write_amat(tmp_path, split, bits)
    text = load_images("binarized-mnist", tmp_path)
    np.savez(
        tmp_path / "binarized_mnist.npz", **{s: np.packbits(b, axis=1) for s, b in rows.items()}
    )
    packed = load_images("binarized-mnist", tmp_path)
    for split, bits in rows.items():
        images = getattr(text, split).images
        assert images.shape == (len(bits), 1, 28, 28)
        assert np.array_equal(images.flatten(1).numpy(), bits)
        assert torch.equal(images, getattr(packed, split).images)


@pytest.mark.parametrize("text", [b"", b"0 1 1", b"2 " * 784, b"0.0 " * 784])
def test_bad_binarized_text(tmp_path, text):
    for split in SPLITS:
        write_amat(tmp_path, split, np.zeros((2, 784), np.uint8))
    (tmp_path / "binarized_mnist/binarized_mnist_valid.amat").write_bytes(text)
    with pytest.raises(DataError, match="valid.amat cannot be read .*rows of 784 zeros and ones"):
        load_images("binarized-mnist", tmp_path)


def write_png(path: Path, array: np.ndarray) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(array).save(path)


def test_a_folder_of_images_in_classes(tmp_path):
    for i in range(30):
        folder = "cat" if i % 2 else "ant"
        write_png(tmp_path / f"pets/{folder}/{i:02}.png", np.full((4, 6), i, np.uint8))
    dataset = load_images("pets", tmp_path)
    assert dataset.image_shape == (1, 4, 6) and dataset.num_classes == 2
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [24, 3, 3]
    seen = []
    for split in (dataset.train, dataset.valid, dataset.test):
        values = split.images[:, 0, 1, 2].mul(255).round().long()
        assert torch.equal(split.labels, values % 2)
        seen += values.tolist()
    assert sorted(seen) == list(range(30))
    assert load_images(str(tmp_path / "pets")).num_classes == 2


def test_a_folder_with_splits_grey_and_colour(tmp_path):
    colour = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    for split, count in zip(SPLITS, (3, 2, 1), strict=True):
        for i in range(count):
            write_png(tmp_path / f"things/{split}/{i}.png", colour)
    write_png(tmp_path / "things/train/9.png", np.full((4, 4), 77, np.uint8))
    dataset = load_images("things", tmp_path)
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [4, 2, 1]
    assert dataset.num_classes is None
    with pytest.raises(DataError, match="must be non-empty and alike"):
        shutil.rmtree(tmp_path / "things/train")
        write_png(tmp_path / "things/train/9.png", np.full((4, 4), 77, np.uint8))
        load_images("things", tmp_path)


def test_grey_images_among_colours_become_colours(tmp_path):
    colour = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    for i in range(20):
        write_png(tmp_path / f"x/{i}.png", colour if i else colour[..., 0])
    dataset = load_images("x", tmp_path)
    images = torch.cat([dataset.train.images, dataset.valid.images, dataset.test.images])
    expected = torch.from_numpy(colour).permute(2, 0, 1).float() / 255
    same = (images == expected).all((1, 2, 3)), (images == expected[:1]).all((1, 2, 3))
    assert [int(s.sum()) for s in same] == [19, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no images"),
        ({"a.png": (4, 4), "b.png": (4, 5)}, "b.png is 5x4, .*a.png is 4x4; bring all"),
        ({"a.png": (4, 4), "cat/b.png": (4, 4)}, "both in subfolders"),
        ({"a.png": None}, "a.png cannot be read as an image"),
        ({"a.png": np.uint16}, "a.png has more than 8 bits"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    (tmp_path / "pets").mkdir()
    for name, shape in files.items():
        path = tmp_path / "pets" / name
        if shape is None:
            path.write_bytes(b"\x89PNG but no more")
        elif shape is np.uint16:
            write_png(path, np.full((4, 4), 500, np.uint16))
        else:
            write_png(path, np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match=message):
        load_images("pets", tmp_path)


def test_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTGEN_DATA", raising=False)
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz or .* not found .*--data-root"):
        load_images("mnist", tmp_path)
    with pytest.raises(
        DataError, match="no data folder is set; give --data-root DIR or FASTGEN_DATA"
    ):
        load_images("mnist")
    with pytest.raises(DataError, match="fastgen download mnist fetches it .https://"):
        load_images("mnist", tmp_path)
    with pytest.raises(DataError, match="cifar-10-binary.tar.gz or .* not found.*download cifar10"):
        load_images("cifar10", tmp_path)
    with pytest.raises(DataError, match="not known; known: digits, mnist.* or a folder of images"):
        load_images("nope")


def test_environment_names_the_folder(mnist_like, monkeypatch):
    monkeypatch.setenv("FASTGEN_DATA", str(mnist_like))
    assert len(load_images("mnist").test) == 7


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "not idx", "short"])
def test_damaged_idx(mnist_like, damage):
    path = mnist_like / "mnist/train-images-idx3-ubyte.gz"
    raw = path.read_bytes()
    content = {
        "truncated": raw[: len(raw) // 2],
        "not gzip": b"hello",
        "not idx": gzip.compress(b"hello"),
        "short": gzip.compress(gzip.decompress(raw)[:-1]),
    }[damage]
    path.write_bytes(content)
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz cannot be read"):
        load_images("mnist", mnist_like)


@pytest.mark.parametrize("shape", [(30, 4, 5), (30, 4, 5, 3), (30, 3, 4, 5), (30, 1, 4, 5)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_npz_shapes(tmp_path, shape, dtype):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, shape).astype(np.uint8)
    array = pixels if dtype == np.uint8 else pixels / 255
    np.savez(tmp_path / "some.npz", images=array, labels=np.arange(30) % 4)
    dataset = load_images("some.npz", tmp_path)
    channels = 1 if len(shape) == 3 or shape[1] == 1 else 3
    assert dataset.image_shape == (channels, 4, 5) and dataset.num_classes == 4
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [24, 3, 3]
    everything = torch.cat([s.images for s in (dataset.train, dataset.valid, dataset.test)])
    # every image is in exactly one split, with its label
    sums = everything.double().sum((1, 2, 3)).sort().values
    expected = torch.from_numpy(pixels.reshape(30, -1) / 255).sum(1).sort().values
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)
    first = dataset.train.images[0].mul(255).round()
    hwc = (
        pixels[:, None]
        if len(shape) == 3
        else pixels
        if shape[1] in (1, 3)
        else pixels.transpose(0, 3, 1, 2)
    )
    (index,) = np.nonzero((hwc == first.numpy()).all((1, 2, 3)))[0]
    assert dataset.train.labels[0] == index % 4


def test_npz_with_splits(tmp_path):
    arrays = {
        key: np.full((n, 4, 4), n, np.uint8) for key, n in (("train", 5), ("valid", 3), ("test", 2))
    }
    np.savez(tmp_path / "some.npz", **arrays, train_labels=np.arange(5))
    dataset = load_images(str(tmp_path / "some.npz"))
    assert [len(s) for s in (dataset.train, dataset.valid, dataset.test)] == [5, 3, 2]
    assert dataset.num_classes is None and dataset.test.labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((20, 4), np.uint8)}, r"not \(20, 4\)"),
        ({"images": np.zeros((20, 4, 4, 5), np.uint8)}, r"not \(20, 4, 4, 5\)"),
        ({"images": np.zeros((20, 4, 4), np.int64)}, "not int64"),
        ({"images": np.full((20, 4, 4), 1.5)}, "floats in"),
        ({"images": np.full((20, 4, 4), np.nan)}, "floats in"),
        (
            {"images": np.zeros((20, 4, 4), np.uint8), "labels": np.zeros(19, np.int64)},
            "20 images, 19",
        ),
        ({"images": np.zeros((20, 4, 4), np.uint8), "labels": np.zeros(20)}, "labels must be"),
        ({"images": np.zeros((5, 4, 4), np.uint8)}, "must be non-empty"),
        ({"a": np.zeros(3), "b": np.zeros(3)}, "found a, b"),
        ({"images": np.array([{}], object)}, "cannot be read as .npz"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_images("bad.npz", tmp_path)


def test_truncated_npz(tmp_path):
    np.savez(tmp_path / "some.npz", images=np.zeros((20, 4, 4), np.uint8))
    raw = (tmp_path / "some.npz").read_bytes()
    (tmp_path / "some.npz").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="cannot be read as .npz"):
        load_images("some.npz", tmp_path)


@pytest.mark.skipif(not ROOT, reason="FASTGEN_DATA is not set")
@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("mnist", (1, 28, 28), (55_000, 5_000, 10_000)),
        ("binarized-mnist", (1, 28, 28), (50_000, 10_000, 10_000)),
        ("cifar10", (3, 32, 32), (3_200, 400, 400)),
    ],
)
def test_real_files(name, shape, sizes):
    try:
        dataset = load_images(name)
    except DataError as error:
        pytest.skip(str(error))
    assert dataset.image_shape == shape
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == sizes


def test_labels_that_are_no_classes(tmp_path):
    images = np.zeros((30, 4, 4), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(30) * 10**7)
    with pytest.raises(DataError, match="must number the classes from 0, but the largest is 29000"):
        load_images("x.npz", tmp_path)
    part = ImageSplit(torch.zeros(2, 1, 4, 4), torch.tensor([0, 3]))
    with pytest.raises(DataError, match=r"labels must be in \[0, 3\), got \[0, 3\]"):
        ImageDataset("x", part, part, part, num_classes=3)
