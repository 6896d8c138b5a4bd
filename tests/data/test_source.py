"""Sources: rows by their numbers, from memory, files and datasets; and what is refused."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from fastgen.data import DataError
from fastgen.data.source import (
    ArraySource,
    Clips,
    DatasetSource,
    FileArray,
    ImageFiles,
    Source,
    Subset,
    TensorSource,
    Windows,
    as_tensor,
)

ROWS = torch.tensor([4, 0, 4, 3])


class Squares(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.full((2,), i * i), i


def image_files(folder, count=6, size=(5, 4), mode="RGB"):
    """PNG files (H, W) = `size`, and their pixels."""
    rng = np.random.default_rng(0)
    shape = {"L": size, "RGB": (*size, 3), "RGBA": (*size, 4)}[mode]
    pixels = rng.integers(0, 256, (count, *shape), np.uint8)
    paths = [folder / f"{i}.png" for i in range(count)]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    return paths, pixels


def sources(folder):
    """Name -> (source, what its rows are)."""
    images = torch.arange(6 * 3 * 2 * 2, dtype=torch.uint8).view(6, 3, 2, 2)
    labels = torch.arange(6)
    np.save(folder / "images.npy", images.numpy())
    np.savez(folder / "set.npz", labels=labels.numpy().astype(np.int16), images=images.numpy())
    paths, pixels = image_files(folder)
    text = torch.arange(20) ** 2
    np.save(folder / "text.npy", text.numpy().astype(">i4"))
    decoded = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    stretches = torch.stack([text[i * 3 : i * 3 + 5] for i in range(6)])
    return {
        "tensors": (TensorSource(images=images, labels=labels, none=None), (images, labels)),
        "npy": (ArraySource(images=FileArray(folder / "images.npy")), (images,)),
        "npz": (
            ArraySource(
                images=FileArray(folder / "set.npz", "images"),
                labels=FileArray(folder / "set.npz", "labels"),
            ),
            (images, labels),
        ),
        "files": (ImageFiles(paths, labels), (decoded, labels)),
        "windows": (Windows(text, 5, stride=3), (stretches,)),
        "windows of a file": (Windows(FileArray(folder / "text.npy"), 5, stride=3), (stretches,)),
        "clips": (
            Clips([text[:8], text[:2], FileArray(folder / "text.npy")], 5, stride=3),
            (torch.cat([stretches[:2], stretches]),),
        ),
        "dataset": (
            DatasetSource(Squares(), ("squares", "labels")),
            ((labels**2)[:, None].expand(6, 2), labels),
        ),
        "subset": (
            Subset(TensorSource(images=images), torch.tensor([5, 4, 3, 2, 1, 0])),
            (images.flip(0),),
        ),
    }


NAMES = (
    "tensors",
    "npy",
    "npz",
    "files",
    "windows",
    "windows of a file",
    "clips",
    "dataset",
    "subset",
)


@pytest.mark.parametrize("name", NAMES)
def test_rows_by_their_numbers(name, tmp_path):
    """Any order, repeats, none; the same again from a copy that crossed to another process."""
    source, expected = sources(tmp_path)[name]
    assert isinstance(source, Source) and len(source) == len(expected[0])
    copies = [source] if name == "dataset" else [source, pickle.loads(pickle.dumps(source))]
    for one in copies:
        for rows in ROWS, torch.arange(len(source)):
            batch = one.take(rows)
            for value, wanted in zip(batch.values(), expected, strict=True):
                assert value.dtype == wanted.dtype
                torch.testing.assert_close(value, wanted[rows], rtol=0, atol=0)


@pytest.mark.parametrize("name", ("tensors", "npy", "npz", "subset"))
def test_no_rows(name, tmp_path):
    source, expected = sources(tmp_path)[name]
    batch = source.take(torch.arange(0))
    assert next(iter(batch.values())).shape == (0, *expected[0].shape[1:])


def test_whole_numbers_become_int64_and_bytes_stay():
    for dtype in "<i2", ">u4", "bool", "int64":
        assert as_tensor(np.zeros(3, dtype)).dtype == torch.int64
    assert as_tensor(np.zeros(3, np.uint8)).dtype == torch.uint8
    assert as_tensor(np.zeros(3, np.float32)).dtype == torch.float32


def test_a_sparse_file_of_8_gib_is_read_by_rows(tmp_path):
    """Rows everywhere in it, without its pages becoming the process's own."""
    shape = (2**19, 2**14)
    path = tmp_path / "large.npy"
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + shape[0] * shape[1])
    source = ArraySource(images=FileArray(path))
    before = resident()
    for seed in range(50):
        rows = torch.randint(shape[0], (64,), generator=torch.Generator().manual_seed(seed))
        assert source.take(rows)["images"].shape == (64, 2**14)
    assert resident() - before < 100 * 2**20


def resident():
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


# --- images ------------------------------------------------------------------------------------


def test_images_are_resized_about_their_middle(tmp_path):
    """A picture with a bright middle third, as wide as it is high: what is left of it."""
    pixels = np.zeros((30, 90), np.uint8)
    pixels[:, 30:60] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (image,) = ImageFiles([tmp_path / "wide.png"], size=(10, 10), channels=1).take(
        torch.zeros(1, dtype=torch.int64)
    )["images"]
    assert image.shape == (1, 10, 10)
    # the filter reaches a little into what is cut off
    assert (image[..., 2:-2] == 200).all() and image.min() > 150


@pytest.mark.parametrize("size", (None, (10, 8)))
def test_masks_keep_their_numbers(size, tmp_path):
    paths, _ = image_files(tmp_path, size=(5, 4))
    numbers = np.random.default_rng(1).integers(0, 3, (6, 5, 4), np.uint8)
    masks = [tmp_path / f"mask{i}.png" for i in range(6)]
    for path, array in zip(masks, numbers, strict=True):
        Image.fromarray(array).save(path)
    found = ImageFiles(paths, masks=masks, size=size).take(ROWS)["masks"]
    assert found.dtype == torch.int64 and found.shape[1:] == (size or (5, 4))
    if size is None:
        assert (found == torch.from_numpy(numbers.astype(np.int64))[ROWS]).all()
    else:
        doubled = torch.from_numpy(numbers).repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert (found == doubled[ROWS]).all()


def test_a_file_that_is_no_image_names_itself(tmp_path):
    paths, _ = image_files(tmp_path)
    paths[3].write_bytes(paths[3].read_bytes()[:40])
    source = ImageFiles(paths)
    source.take(torch.tensor([0, 1, 2, 4, 5]))
    with pytest.raises(DataError, match=r"3\.png cannot be read as an image"):
        source.take(torch.arange(6))


def test_what_image_folders_refuse_is_refused(tmp_path):
    """Pictures that are not what they seem: see-through, moving, of more than 8 bits; no files."""
    still, moving = Image.new("RGB", (4, 5)), Image.new("RGB", (4, 5), "red")
    Image.new("RGBA", (4, 5), (1, 2, 3, 9)).save(tmp_path / "clear.png")
    still.save(tmp_path / "film.png", save_all=True, append_images=[moving])
    Image.fromarray(np.zeros((5, 4), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "folder.png").mkdir()
    for name, problem in (
        ("clear.png", "has transparent pixels"),
        ("film.png", "is animated"),
        ("deep.png", "more than 8 bits"),
        ("folder.png", "is not a regular file"),
    ):
        with pytest.raises(DataError, match=rf"{name} {problem}|{name} has {problem}"):
            ImageFiles([tmp_path / name])
    (image,) = ImageFiles([tmp_path / "clear.png"], channels=4).take(torch.arange(1))["images"]
    assert image.flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 3, 9]


def test_masks_may_have_many_labels(tmp_path):
    paths, _ = image_files(tmp_path, 1, size=(5, 4))
    numbers = np.arange(20, dtype=np.uint16).reshape(5, 4) * 3000
    Image.fromarray(numbers).save(tmp_path / "mask.png")
    (mask,) = ImageFiles(paths, masks=[tmp_path / "mask.png"]).take(torch.arange(1))["masks"]
    assert torch.equal(mask, torch.from_numpy(numbers.astype(np.int64)))


def test_other_sizes_are_named(tmp_path):
    paths, _ = image_files(tmp_path)
    Image.new("RGB", (7, 5)).save(paths[2])
    with pytest.raises(DataError, match=r"2\.png is 7x5, the first image 4x5; .* resize to"):
        ImageFiles(paths).take(torch.arange(6))
    assert ImageFiles(paths, size=(3, 3)).take(torch.arange(6))["images"].shape == (6, 3, 3, 3)


def test_a_mask_must_be_numbers_of_its_image(tmp_path):
    paths, _ = image_files(tmp_path)
    with pytest.raises(
        DataError, match=r"0\.png is no mask: it must have one label number per pixel, not RGB"
    ):
        ImageFiles(paths, masks=paths).take(torch.arange(1))
    Image.new("L", (9, 9)).save(tmp_path / "mask.png")
    with pytest.raises(
        DataError, match=r"mask\.png must be a mask of its image.s size, 4x5, got 9x9"
    ):
        ImageFiles(paths[:1], masks=[tmp_path / "mask.png"]).take(torch.arange(1))


# --- files of arrays ---------------------------------------------------------------------------


def test_files_that_cannot_be_read_by_rows(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, 1], object), allow_pickle=True)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.zeros((3, 2))))
    np.save(tmp_path / "short.npy", np.zeros((9, 2)))
    np.savez_compressed(tmp_path / "packed.npz", a=np.zeros(3))
    (tmp_path / "text.npy").write_text("no array")
    with open(tmp_path / "short.npy", "rb+") as file:
        file.truncate(200)
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    for name, member, problem in (
        ("objects.npy", None, "holds Python objects"),
        ("fortran.npy", None, "C order"),
        ("short.npy", None, "only 72 bytes follow"),
        ("packed.npz", "a", "compressed"),
        ("empty.npz", "a", "cannot be read"),
        ("text.npy", None, "cannot be read"),
        ("missing.npy", None, "No such file"),
        ("missing.npz", "a", "No such file"),
    ):
        with pytest.raises(DataError, match=rf"{name}.*{problem}"):
            FileArray(tmp_path / name, member)


def test_a_file_that_becomes_shorter_is_noticed(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((9, 2)))
    array = FileArray(tmp_path / "a.npy")
    with open(tmp_path / "a.npy", "rb+") as file:
        file.truncate(200)
    with pytest.raises(DataError, match="has become shorter"):
        array.take(np.array([8]))


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda: TensorSource(), "common first dimension, got {}"),
        (lambda: TensorSource(a=torch.zeros(3), b=torch.zeros(4)), "got {'a': 3, 'b': 4}"),
        (lambda: Subset(TensorSource(a=torch.zeros(3)), torch.tensor([3])), r"in \[0, 3\), got"),
        (lambda: Subset(TensorSource(a=torch.zeros(3)), torch.tensor([0.0])), "must be int64"),
        (lambda: Windows(torch.zeros(3), 4), "at most 3, the steps, got 4"),
        (lambda: Windows(torch.zeros(3), 0), "at least 1, got 0"),
        (lambda: Windows(torch.zeros(3), 1, stride=0), "at least 1, got 1 and 0"),
        (lambda: Clips([torch.zeros(3)], 4), "of some sequence, got 4"),
        (lambda: ImageFiles([]), "at least one file, got none"),
    ],
)
def test_bad_arguments(make, problem):
    with pytest.raises(ValueError, match=problem):
        make()


def test_a_dataset_without_numbers_is_refused():
    with pytest.raises(TypeError, match="must have a length .* got generator"):
        DatasetSource(i for i in range(3))
    with pytest.raises(ValueError, match="items have 2 parts, names images"):
        DatasetSource(Squares(), ("images",)).take(torch.arange(2))
    with pytest.raises(TypeError, match="mappings or tuples, got int"):
        DatasetSource([1, 2]).take(torch.arange(2))


def test_a_picture_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 19)
    paths, _ = image_files(tmp_path, size=(5, 4))
    for make in (lambda: ImageFiles(paths), lambda: ImageFiles(paths, size=(2, 2)).take(ROWS)):
        with pytest.raises(DataError, match=r"\d\.png cannot be read as an image \(Image size"):
            make()
