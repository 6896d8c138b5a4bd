"""A disk that refuses: one line, status 1, and a run that goes on when it has been mended."""

import errno
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastgen.cli import main
from fastgen.training import board
from fastgen.training.checkpoint import list_checkpoints, load_checkpoint

OPTIONS = [
    "--model.width=16",
    "--model.layers=1",
    "--model.latent_dim=2",
    "--vae.steps=9",
    "--engine.cpu=true",
    "--engine.log_every=2",
    "--engine.valid_every=100",
    "--engine.sample_every=6",
    "--engine.checkpoint_every=3",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict:
    """Of a run that met no trouble."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", "vae", *OPTIONS, f"--run-dir={run}"]) == 0
    return load_checkpoint(list_checkpoints(run / "checkpoints")[-1])["model"]["vae"]


def metrics_of(run: Path):
    (run / "metrics.jsonl").rename(run / "kept.jsonl")
    (run / "metrics.jsonl").symlink_to("/dev/full")
    yield
    (run / "kept.jsonl").replace(run / "metrics.jsonl")


def samples_of(run: Path):
    (run / "samples" / ".tmp-step-00000009-samples.png").symlink_to("/dev/full")
    yield


def a_file_for_samples(run: Path):
    shutil.rmtree(run / "samples")
    (run / "samples").write_text("")
    yield
    (run / "samples").unlink()


def a_file_for_tensorboard(run: Path):
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("")
    yield
    (run / "tensorboard").unlink()


def the_lock_of(run: Path):
    (run / ".lock").unlink()
    (run / ".lock").mkdir()
    yield
    (run / ".lock").rmdir()


def refusing(call: int):
    """TensorBoard's file, at its n-th event of a life."""

    def make(run: Path):
        add, count = board.Board._add, 0

        def counted(self, event):
            nonlocal count
            count += 1
            if count >= call:
                self._file.write(b"x" * 10)
                raise OSError(errno.ENOSPC, "No space left on device")
            add(self, event)

        board.Board._add = counted
        yield
        board.Board._add = add

    return make


TROUBLES = {
    "metrics": (metrics_of, "metrics.jsonl: No space left on device"),
    "samples": (samples_of, "samples.png: No space left on device"),
    "samples is a file": (a_file_for_samples, "samples"),
    "tensorboard is a file": (a_file_for_tensorboard, "tensorboard"),
    "lock": (the_lock_of, ".lock"),
    "tensorboard at once": (refusing(1), "tensorboard: No space left on device"),
    "tensorboard later": (refusing(5), "tensorboard: No space left on device"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_one_line_and_nothing_lost(weights, tmp_path, capsys, trouble):
    make, text = TROUBLES[trouble]
    run = tmp_path / "run"
    assert main(["train", "vae", *OPTIONS, f"--run-dir={run}"]) == 0
    shutil.rmtree(run / "checkpoints/step-00000009")
    meeting = contextmanager(make)
    with meeting(run):
        capsys.readouterr()
        assert main(["train", "--resume", str(run)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("fastgen: error: cannot write ") and err.count("\n") == 1, err
        assert text in err and "--resume" in err
    assert main(["train", "--resume", str(run)]) == 0
    assert_complete(run, weights)


def assert_complete(run: Path, weights: dict) -> None:
    ours = load_checkpoint(run / "checkpoints/step-00000009")["model"]["vae"]
    assert all(torch.equal(ours[name], value) for name, value in weights.items())
    steps = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "train" in line]
    assert len(steps) == 5
    assert not list(run.rglob(".tmp-*"))


def test_samples_and_figures_of_a_run_without_its_folder(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "vae", *OPTIONS, f"--run-dir={run}", "--evaluation.samples=2"]) == 0
    shutil.rmtree(run / "samples")
    assert main(["sample", str(run), "--num=2"]) == 0
    assert (run / "samples/sample-seed0.png").exists()
    (run / "eval.json").mkdir()
    capsys.readouterr()
    assert main(["eval", str(run)]) == 1
    assert capsys.readouterr().err.startswith("fastgen: error: cannot write ")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up(small_disk, weights, capsys):
    """With so many KiB free: wherever it happens."""
    run, ballast = small_disk / "run", small_disk / "ballast"
    for free in (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 200):
        shutil.rmtree(run, ignore_errors=True)
        ballast.write_bytes(bytes((600 - free) << 10))
        capsys.readouterr()
        assert main(["train", "vae", *OPTIONS, f"--run-dir={run}"]) == 1
        assert main(["train", "--resume", str(run)]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and all("No space left on device" in line for line in lines), lines
        ballast.unlink()
        assert main(["train", "--resume", str(run)]) == 0
        assert_complete(run, weights)
