"""A run whose data or options changed goes on only where that is accepted."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fastgen.cli import main
from fastgen.training import checkpoint as ckpt
from fastgen.training import origin
from fastgen.training.errors import CheckpointError
from fastgen.training.runs import load_run, resume_run

OPTIONS = [
    "--model.width=16",
    "--model.layers=1",
    "--model.latent_dim=2",
    "--vae.steps=6",
    "--vae.batch_size=8",
    "--engine.cpu=true",
    "--engine.checkpoint_every=3",
]


def write_data(path: Path, images: np.ndarray, labels: np.ndarray | None) -> None:
    np.savez(path, images=images, **({} if labels is None else {"labels": labels}))


def arrays():
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (60, 8, 8), np.uint8), np.arange(60) % 10


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """A folder with data.npz and a run on it; read only."""
    folder = tmp_path_factory.mktemp("origin")
    write_data(folder / "data.npz", *arrays())
    torch.set_num_threads(1)
    data = [f"--data={folder / 'data.npz'}", f"--run-dir={folder / 'run'}"]
    assert main(["train", "vae", *OPTIONS, *data]) == 0
    return folder


@pytest.fixture
def run(started, tmp_path) -> Path:
    """A copy that has data.npz and stopped in the middle."""
    run = Path(shutil.copytree(started / "run", tmp_path / "run"))
    shutil.copy(started / "data.npz", tmp_path / "data.npz")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    edit(run, data=str(tmp_path / "data.npz"))
    return run


def edit(run: Path, **changes) -> None:
    """Change config.yaml; `a__b` is the option a.b."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name, value in changes.items():
        *sections, last = name.split("__")
        inner = config
        for section in sections:
            inner = inner[section]
        inner[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def refused(run: Path, capsys) -> str:
    capsys.readouterr()
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", "--resume", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--accept-changes" in err
    assert (run / "metrics.jsonl").read_bytes() == before
    return err


def test_nothing_changed(run, started):
    """Data under another path is the same data."""
    assert main(["train", "--resume", str(run)]) == 0
    one, two = (folder / "checkpoints/step-00000006" for folder in (run, started / "run"))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def darker(images, labels):
    images[:, 3, 3] //= 2
    return images, labels


CHANGES = {
    "values": (darker, ["train images: values or their order differ", "valid images: values"]),
    "order": (lambda i, t: (i[::-1], t[::-1]), ["train images: values or their order differ"]),
    "labels": (lambda i, t: (i, (t + 1) % 10), ["train labels: values or their order differ"]),
    "half gone": (lambda i, t: (i[::2], t[::2]), ["train images: 24 rows, were 48 rows"]),
    "labels gone": (lambda i, t: (i, None), ["train labels: none, were 48 rows"]),
    "size": (lambda i, t: (i.repeat(2, 1), t), ["float32 (1, 16, 8), were float32 (1, 8, 8)"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data(run, capsys, change):
    make, texts = CHANGES[change]
    write_data(run.parent / "data.npz", *make(*arrays()))
    line = refused(run, capsys)
    assert all(text in line for text in texts), line
    assert ("images" in line) == ("labels" not in change)
    if change != "size":
        assert main(["train", "--resume", str(run), "--accept-changes"]) == 0
        assert main(["train", "--resume", str(run)]) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"engine__seed": 1}, "engine.seed was 0, is 1"),
        ({"vae__batch_size": 12}, "vae.batch_size was 8, is 12"),
        ({"engine__accumulate": 2}, "engine.accumulate was 1, is 2"),
        ({"engine__ema_decay": None}, "engine.ema_decay was 0.999, is None"),
        ({"vae__optimizer__betas": [0.5, 0.9]}, "betas was [0.9, 0.99], is [0.5, 0.9]"),
        ({"objective__beta": 2.0, "engine__max_grad_norm": 1.0}, "max_grad_norm was None, is 1.0"),
    ],
)
def test_changed_options(run, capsys, options, text):
    edit(run, **options)
    line = refused(run, capsys)
    assert text in line and line.count(" was ") == len(options) + 1, line
    assert main(["train", "--resume", str(run), "--accept-changes"]) == 0
    assert main(["train", "--resume", str(run)]) == 0
    saved = ckpt.load_checkpoint(run / "checkpoints/step-00000006")
    assert saved["progress"]["steps_done"] == 6
    betas = tuple(options.get("vae__optimizer__betas", (0.9, 0.99)))
    assert {group["betas"] for group in saved["optimizers"]["vae"]["param_groups"]} == {betas}


def test_another_model_is_named_by_its_option(run, capsys):
    edit(run, model__width=24)
    assert "model.width was 16, is 24" in refused(run, capsys)
    assert main(["train", "--resume", str(run), "--accept-changes"]) == 2
    assert "does not fit the configured model: model.vae." in capsys.readouterr().err


def test_averages_that_were_not_kept_start_anew(run):
    edit(run, engine__ema_decay=None)
    resume_run(run, accept_changes=True)
    edit(run, engine__ema_decay=0.9, vae__steps=8)
    resume_run(run, accept_changes=True)
    saved = ckpt.load_checkpoint(run / "checkpoints/step-00000008")
    assert saved["averages"]["vae"]["n_averaged"] == 2


def test_what_may_change(run, tmp_path):
    every = {f"engine__{name}_every": 2 for name in ("log", "valid", "sample", "checkpoint")}
    edit(run, **every, engine__keep_checkpoints=1, evaluation__samples=3, data_root=str(tmp_path))
    assert main(["train", "--resume", str(run)]) == 0


def test_a_renamed_checkpoint(run, capsys):
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000003").rename(checkpoints / "step-00000005")
    assert main(["train", "--resume", str(run)]) == 2
    line = capsys.readouterr().err
    assert "step-00000005 is the checkpoint of step 3, under another name" in line


def test_eval_warns_and_sampling_does_not_ask(run, capsys):
    write_data(run.parent / "data.npz", *darker(*arrays()))
    edit(run, evaluation__samples=2)
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    warning = "warning: the data is not that of the training: {} images: values or their order"
    assert warning.format("valid") in out and warning.format("test") in out and "train" in out
    assert "train images" not in out
    assert main(["sample", str(run), "--num", "2"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_fewer_images_than_a_batch_can_be_evaluated(run):
    edit(run, vae__batch_size=1000)
    load_run(run)


def test_a_checkpoint_that_does_not_say(run, capsys):
    path = run / "checkpoints/step-00000003"
    sections = ckpt.load_checkpoint(path)
    del sections["origin"]
    shutil.rmtree(path)
    ckpt.save_checkpoint(path.parent, 3, sections)
    assert main(["train", "--resume", str(run)]) == 0
    assert "does not say of what options and data it is" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_fingerprints(monkeypatch, dtype):
    rows = torch.arange(200).view(40, 5).to(dtype)
    known = origin.fingerprint(rows)
    assert known["rows"] == 40 and known["row"] == f"{str(dtype)[6:]} (5,)"
    assert origin.fingerprint(rows.t().contiguous().t()) == known
    other = rows.clone()
    other[-1, -1] += 2
    for changed in (other, rows.flip(0), rows[:39], rows.double()):
        assert origin.fingerprint(changed) != known
    monkeypatch.setattr(origin, "_BLOCK_BYTES", 3 * rows[:1].nbytes)
    assert origin.fingerprint(rows) == known
    monkeypatch.setattr(origin, "_HASHED_BYTES", 4 * rows[:1].nbytes)
    sampled = origin.fingerprint(rows)
    assert sampled["sha256"] == origin.fingerprint(rows[::10])["sha256"]


@pytest.mark.parametrize("saved", [None, 3, {}, {"config": {}}, {"config": {}, "data": {"a x": 1}}])
def test_a_damaged_section(saved):
    with pytest.raises(CheckpointError, match="section 'origin' of the checkpoint is damaged"):
        origin.Origin({}, {"a x": {"rows": 1}}).changes(saved)
