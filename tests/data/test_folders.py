"""Folders of images: splits, classes, links."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.data import DataError, ImageSplit, load_images

Image = pytest.importorskip("PIL.Image")


def fill(folder: Path, count: int, first: int = 0) -> None:
    """Grey 2x2 images of the values first, first + 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        Image.fromarray(np.full((2, 2), i, np.uint8)).save(folder / f"{i:03}.png")


def values(split: ImageSplit) -> list[int]:
    return split.images[:, 0, 0, 0].mul(255).round().long().tolist()


def parts(dataset) -> list[list[int]]:
    return [values(part) for part in (dataset.train, dataset.valid, dataset.test)]


def test_classes_are_numbered_over_all_splits(tmp_path):
    """A class that a split lacks does not move the numbers of the others."""
    for number, name in enumerate(["ant", "bee", "cat"]):
        fill(tmp_path / "pets/train" / name, 3, 10 * number)
        if name != "ant":
            fill(tmp_path / "pets/valid" / name, 2, 10 * number)
    fill(tmp_path / "pets/test/cat", 2, 20)
    dataset = load_images("pets", tmp_path)
    assert dataset.num_classes == 3
    for split in (dataset.train, dataset.valid, dataset.test):
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == [value // 10 for value in values(split)]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_class_that_is_not_trained_on(tmp_path, split):
    for part in ("train", "valid", "test"):
        fill(tmp_path / "pets" / part / "bee", 2)
    for name in ("ant", "cow"):
        fill(tmp_path / "pets" / split / name, 2)
    message = rf"pets: class ant \(and 1 more\) of {split} is not in train; add it there or leave"
    with pytest.raises(DataError, match=message):
        load_images("pets", tmp_path)


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (["train"], (16, 2, 2)),
        (["train", "test"], (18, 2, 7)),
        (["train", "valid"], (18, 7, 2)),
        (["train", "val", "test"], (20, 7, 7)),
        (["Training", "Validation", "Testing"], (20, 7, 7)),
        (["TRAIN", "VAL"], (18, 7, 2)),
    ],
)
@pytest.mark.parametrize("classes", [False, True])
def test_splits_by_name(tmp_path, names, sizes, classes):
    for name in names:
        folder = tmp_path / "pets" / name
        first, count = {"tr": (0, 20), "va": (50, 7), "te": (100, 7)}[name[:2].lower()]
        if classes:
            fill(folder / "a", count // 2, first)
            fill(folder / "b", count - count // 2, first + count // 2)
        else:
            fill(folder, count, first)
    dataset = load_images("pets", tmp_path)
    train, valid, test = parts(dataset)
    assert (len(train), len(valid), len(test)) == sizes
    assert dataset.num_classes == (2 if classes else None)
    own = [part for part, first in ((valid, 50), (test, 100)) if min(part) >= first]
    assert len(own) == len(names) - 1
    # what no folder gives is taken from train, every image once
    shared = train + [value for part in (valid, test) if part not in own for value in part]
    assert sorted(shared) == list(range(20))
    assert parts(load_images("pets", tmp_path)) == [train, valid, test]


def test_train_alone_is_split_as_a_folder_without_splits(tmp_path):
    fill(tmp_path / "a", 30)
    fill(tmp_path / "b/train", 30)
    assert parts(load_images("a", tmp_path)) == parts(load_images("b", tmp_path))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train", "test", "cat"], "test, train would be splits of the data, but cat is beside"),
        (["cat", "dog", "test"], r"test would be splits of the data, but cat \(and 1 more\) is b"),
        (["train", ""], "train would be splits of the data, but 000.png .* is beside them"),
        (["test"], "has test but no train; call the images to train on so"),
        (["valid", "test"], "has test, valid but no train"),
        (["train", "val", "valid", "test"], "val and valid are one split"),
    ],
)
def test_layouts_that_are_not_clear(tmp_path, folders, message):
    for folder in folders:
        fill(tmp_path / "pets" / folder, 5)
    with pytest.raises(DataError, match=message):
        load_images("pets", tmp_path)


def test_an_empty_split_is_not_made_up(tmp_path):
    fill(tmp_path / "pets/train", 20)
    (tmp_path / "pets/val").mkdir()
    with pytest.raises(DataError, match="pets/val holds no images"):
        load_images("pets", tmp_path)


def test_what_holds_no_images_is_not_looked_at(tmp_path):
    fill(tmp_path / "pets/train", 20)
    fill(tmp_path / "pets/.cache/x", 3)
    fill(tmp_path / "pets/train/.ipynb_checkpoints", 3)
    (tmp_path / "pets/train/._000.png").write_bytes(b"not an image")
    (tmp_path / "pets/notes").mkdir()
    (tmp_path / "pets/notes/README.txt").touch()
    dataset = load_images("pets", tmp_path)
    assert len(dataset.train) == 16 and dataset.num_classes is None


def test_labels_may_be_known_in_a_part_of_the_splits(tmp_path):
    fill(tmp_path / "pets/train/cat", 20)
    fill(tmp_path / "pets/test", 5)
    dataset = load_images("pets", tmp_path)
    assert dataset.num_classes is None and dataset.test.labels is None
    assert dataset.train.labels.tolist() == [0] * 18


def test_links_are_followed(tmp_path):
    fill(tmp_path / "store/a", 10)
    fill(tmp_path / "store/b", 10, 10)
    (tmp_path / "pets").mkdir()
    for name in ("a", "b"):
        os.symlink(tmp_path / "store" / name, tmp_path / "pets" / name)
    os.symlink(tmp_path / "pets", tmp_path / "again")
    for name in ("pets", "again"):
        dataset = load_images(name, tmp_path)
        assert dataset.num_classes == 2
        assert dataset.train.labels.tolist() == [v // 10 for v in values(dataset.train)]
    fill(tmp_path / "split/train", 20)
    os.symlink("train", tmp_path / "split/test")
    assert len(load_images("split", tmp_path).test) == 20


@pytest.mark.parametrize("target", ["..", ".", "../a"])
def test_a_folder_that_is_reached_twice(tmp_path, target):
    fill(tmp_path / "pets/a", 10)
    fill(tmp_path / "pets/b", 10)
    os.symlink(target, tmp_path / "pets/b/link")
    with pytest.raises(DataError, match="is the same folder as .*; remove one of the links"):
        load_images("pets", tmp_path)
