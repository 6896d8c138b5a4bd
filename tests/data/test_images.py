import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.data import DataError, load_images

ROOT = os.environ.get("FASTGEN_DATA")


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


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


def test_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTGEN_DATA", raising=False)
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz not found in .*--data-root"):
        load_images("mnist", tmp_path)
    with pytest.raises(
        DataError, match="no data folder is set; give --data-root DIR or FASTGEN_DATA"
    ):
        load_images("mnist")
    with pytest.raises(DataError, match="not known; known: digits, mnist"):
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
