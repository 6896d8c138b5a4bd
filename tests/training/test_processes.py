"""Processes that train together stop and go on together; what they train is in test_recipes.py."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgen.training.checkpoint import list_checkpoints, load_checkpoint

OPTIONS = [
    "--autoencoder.steps=12",
    "--prior.steps=12",
    "--engine.cpu=true",
    "--engine.checkpoint_every=5",
    "--engine.log_every=4",
]


def launch(
    processes: int, *options: str, program=("-m", "fastgen.cli")
) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun, *program, "train", *options]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def train(processes: int, folder, *options: str, program=("-m", "fastgen.cli")) -> dict:
    done = launch(processes, *options, program=program)
    assert done.returncode == 0, done.stderr
    return load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


@pytest.mark.slow
def test_two_processes_go_on_with_two_after_sigterm(tmp_path):
    """It comes to one of them; both stop after the same step, leave no thread behind, and end with
    the bits of a run that was not stopped."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = train(2, whole, "vqvae", *OPTIONS, f"--run_dir={whole}")
    program = (str(Path(__file__).with_name("ranks_stop.py")),)
    done = launch(2, "vqvae", *OPTIONS, f"--run_dir={stopped}", program=program)
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank} status 143 threads" in done.stdout, done.stderr
    assert "gloo" not in done.stdout
    assert "stopped by SIGTERM after step 10, which is saved" in done.stderr
    assert list_checkpoints(stopped / "checkpoints")[-1].name == "step-00000010"
    assert len(load_checkpoint(stopped / "checkpoints/step-00000010")["rng"]["torch"]) == 2
    again = train(2, stopped, f"--resume={stopped}")
    for module, weights in expected["model"].items():
        for name, value in weights.items():
            assert torch.equal(again["model"][module][name], value), name


@pytest.mark.slow
def test_sigterm_to_the_launcher_leaves_a_checkpoint(tmp_path):
    """torchrun, told to stop, tells its processes."""
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [*OPTIONS, "--autoencoder.steps=100000", "--engine.checkpoint_every=100000"]
    # where there is no GPU, processes meet on the CPU without being told
    options += [f"--engine.cpu={str(torch.cuda.is_available()).lower()}"]
    command = [sys.executable, *torchrun, "-m", "fastgen.cli", "train", "vqvae", *options]
    launcher = subprocess.Popen(
        [*command, f"--run_dir={run}"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    log = run / "metrics.jsonl"
    while launcher.poll() is None and not (log.exists() and '"train"' in log.read_text()):
        time.sleep(0.1)
    launcher.terminate()
    _, errors = launcher.communicate(timeout=120)
    assert errors.count("stopped by SIGTERM after step") == 1, errors
    (path,) = list_checkpoints(run / "checkpoints")
    assert load_checkpoint(path)["progress"]["steps_done"] % 10 == 0


def errors_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of fastgen; torchrun adds a report of its own."""
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr, done.stderr
    assert "runs.py" not in done.stderr and "cli.py" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("fastgen: error: ")]


REFUSED = {
    "batch": (["--autoencoder.batch_size=65"], "multiple of engine.accumulate times the 2 proc"),
    "parts": (["--prior.batch_size=66", "--engine.accumulate=2"], "processes, got 66 and 2"),
    "option": (["--model.colour=3"], "--model.colour"),
    "data": (["--data=cats"], "data set 'cats' is not known"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_request_to_two_processes_is_one_line(tmp_path, what):
    options, message = REFUSED[what]
    (line,) = errors_of(launch(2, "vqvae", *OPTIONS, *options, f"--run_dir={tmp_path / 'run'}"))
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_end_alike_where_one_cannot_write(tmp_path):
    run = tmp_path / "run"
    train(2, run, "vqvae", *OPTIONS, f"--run_dir={run}")
    (line,) = errors_of(launch(2, "vqvae", *OPTIONS, f"--run_dir={run}"))
    assert "continue it with --resume" in line
    for path in list_checkpoints(run / "checkpoints")[-1:]:
        shutil.rmtree(path)
    shutil.rmtree(run / "samples")
    (run / "samples").write_text("")
    started = time.monotonic()
    done = launch(2, f"--resume={run}")
    assert time.monotonic() - started < 100
    assert done.stderr.count("fastgen: error: cannot write") == 1, done.stderr
    assert "exitcode  : 1" in done.stderr and "in _after_step" not in done.stderr, done.stderr
    (run / "samples").unlink()
    train(2, run, f"--resume={run}")
