import json
import math
import os

import pytest
import torch

from fastgen.training import checkpoint as ckpt
from fastgen.training.errors import CheckpointError, WriteError

TREE = {
    "weights": {"a.b": torch.randn(3, 2), "half": torch.randn(2).half(), "none": None},
    "state": {0: {"step": torch.tensor(3.0)}, 7: {"lr": 0.1 + 0.2, "betas": (0.9, 0.999)}},
    "list": [1, "x", True, [torch.zeros(0)], ()],
    "rng": torch.arange(5, dtype=torch.uint8),
}


def save(folder, step=1, **more):
    return ckpt.save_checkpoint(folder, step, {"model": TREE, "progress": {"n": step, **more}})


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_round_trip(tmp_path):
    path = save(tmp_path, 12)
    assert path.name == "step-00000012"
    loaded = ckpt.load_checkpoint(path)
    assert_same(loaded["model"], TREE)
    assert loaded["progress"] == {"n": 12}


def test_shared_and_strided_tensors(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    tree = {"transposed": base.t(), "row": base[0], "same": base}
    loaded = ckpt.load_checkpoint(ckpt.save_checkpoint(tmp_path, 1, {"model": tree}))["model"]
    assert all(torch.equal(loaded[key], tree[key]) for key in tree)


def test_non_finite_scalars_survive(tmp_path):
    loaded = ckpt.load_checkpoint(save(tmp_path, best=math.inf))
    assert loaded["progress"]["best"] == math.inf


def test_files_can_be_read_by_others(tmp_path):
    os.umask(0o022)
    assert {path.stat().st_mode & 0o777 for path in save(tmp_path).iterdir()} == {0o644}


def test_unknown_values_are_refused(tmp_path):
    with pytest.raises(TypeError, match="'model.x' must be a tensor or a JSON scalar"):
        ckpt.save_checkpoint(tmp_path, 1, {"model": {"model": {"x": object()}}})
    assert not ckpt.list_checkpoints(tmp_path)


FILES = [
    "model.json",
    "model.safetensors",
    "progress.json",
    "progress.safetensors",
    "manifest.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "flipped"])
def test_damage_is_found(tmp_path, name, damage):
    path = save(tmp_path)
    assert sorted(FILES) == sorted(p.name for p in path.iterdir())
    content = bytearray((path / name).read_bytes())
    if damage == "removed":
        (path / name).unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    else:
        (path / name).write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(CheckpointError, match="damaged"):
        ckpt.load_checkpoint(path)


def test_falls_back_to_the_newest_sound_one(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    (paths[2] / "model.json").unlink()
    (tmp_path / "step-00000009").mkdir()
    path, sections, problems = ckpt.load_newest(tmp_path)
    assert path == paths[1] and sections["progress"]["n"] == 2
    assert [p.name for p in problems] == ["step-00000009", "step-00000003"]


def test_no_sound_one(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        ckpt.load_newest(tmp_path)
    (save(tmp_path) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no sound checkpoint in"):
        ckpt.load_newest(tmp_path)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    """It does not look as if there were no checkpoint yet."""
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints is not a folder; move it away"):
        ckpt.load_newest(tmp_path / "checkpoints")
    assert ckpt.list_checkpoints(tmp_path / "nothing") == []


@pytest.mark.parametrize("name", ["../model.json", "/etc/passwd", "sub/model.json", ""])
def test_names_of_files_elsewhere_are_refused(tmp_path, name):
    path = save(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("model.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="damaged"):
        ckpt.load_checkpoint(path)


def test_a_renamed_one_is_refused(tmp_path):
    path = save(tmp_path, 7).rename(tmp_path / "step-00000008")
    with pytest.raises(CheckpointError, match="8 is the checkpoint of step 7, under another name"):
        ckpt.load_checkpoint(path)
    assert ckpt.load_checkpoint(path.rename(tmp_path / "best"))["progress"] == {"n": 7}


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"dict": ' * 100_000, "1" * 5000, "\xff", "[1] 2"]
)
@pytest.mark.parametrize("name", ["manifest.json", "model.json"])
def test_json_that_cannot_be_read(tmp_path, name, text):
    path = save(tmp_path)
    (path / name).write_text(text)
    manifest = json.loads((path / "manifest.json").read_text()) if name != "manifest.json" else {}
    if manifest:
        manifest["files"][name] = ckpt._describe(path / name)
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="damaged"):
        ckpt.load_checkpoint(path)


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this fastgen reads 1"):
        ckpt.load_checkpoint(path)


def test_prune_keeps_the_newest(tmp_path):
    for step in (5, 900, 1000):
        save(tmp_path, step)
    (tmp_path / ".tmp-step-00000007").mkdir()
    ckpt.prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000900", "step-00001000"]


def test_an_existing_one_is_not_overwritten(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path, 1, other=True)
    assert ckpt.load_checkpoint(tmp_path / "step-00000001")["progress"] == {"n": 1}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_old_ones(tmp_path, monkeypatch, call):
    save(tmp_path, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(WriteError, match="cannot write .*step-00000002: .*No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    ckpt.load_checkpoint(tmp_path / "step-00000001")
