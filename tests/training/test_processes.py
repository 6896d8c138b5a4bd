"""Two processes on the halves of a batch train as one process does on the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgen.training.checkpoint import list_checkpoints, load_checkpoint

OPTIONS = [
    "--autoencoder.steps=12",
    "--prior.steps=12",
    "--prior_model.dropout=0",
    "--model.kmeans_init=false",
    "--model.revive_after=null",
    "--engine.cpu=true",
    "--engine.checkpoint_every=5",
    "--engine.log_every=4",
]


def train(processes: int, folder, *options: str, program=("-m", "fastgen.cli")) -> dict:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, *program, "train", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


FLOW_OPTIONS = [
    "--data=moons",
    "--model.layers=4",
    "--model.hidden=16",
    "--model.reversible=true",
    "--flow.steps=8",
    "--flow.batch_size=64",
    "--flow.optimizer.warmup_steps=2",
    "--engine.ema_decay=null",
    "--engine.cpu=true",
    "--engine.accumulate=2",
]


@pytest.mark.slow
def test_two_processes_train_a_reversible_flow_as_one_does(tmp_path):
    """The chain's gradients come from one node of the graph, and are summed over processes."""
    one, two = tmp_path / "one", tmp_path / "two"
    whole = train(1, one, "realnvp", *FLOW_OPTIONS, f"--run_dir={one}")
    halves = train(2, two, "realnvp", *FLOW_OPTIONS, f"--run_dir={two}")
    start = tmp_path / "start"
    first = train(1, start, "realnvp", *FLOW_OPTIONS, "--flow.steps=1", f"--run_dir={start}")
    moved = []
    for name, value in whole["model"]["flow"].items():
        torch.testing.assert_close(halves["model"]["flow"][name], value, rtol=1e-3, atol=1e-5)
        moved.append((value - first["model"]["flow"][name]).abs().max())
    # the first layers hardly move: the last ones start from zero
    assert max(moved) > 1e-3


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    whole = train(1, one, "vqvae", *OPTIONS, f"--run_dir={one}")
    halves = train(2, two, "vqvae", *OPTIONS, f"--run_dir={two}")
    assert len(halves["rng"]["torch"]) == 2
    for module in ("autoencoder", "prior"):
        for name, value in whole["model"][module].items():
            other = halves["model"][module][name]
            torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4, msg=name)

    # a checkpoint of two processes goes on with two, bit for bit
    for step in (20, 24):
        (two / f"checkpoints/step-{step:08d}").rename(tmp_path / f"{step}")
    config = (two / "config.yaml").read_text()
    (two / "checkpoints").rename(tmp_path / "old")
    (two / "checkpoints").mkdir()
    (tmp_path / "20").rename(two / "checkpoints/step-00000020")
    again = train(2, two, f"--resume={two}")
    assert (two / "config.yaml").read_text() == config
    for module in ("autoencoder", "prior"):
        for name, value in halves["model"][module].items():
            assert torch.equal(again["model"][module][name], value), name


STYLEGAN_OPTIONS = [
    "--data=digits",
    "--model.channel_base=64",
    "--model.channel_max=8",
    "--model.latent_dim=8",
    "--growth.steps=[3,6]",
    "--growth.batch_size=[16]",
    "--objective.penalty_every=2",
    "--engine.cpu=true",
    "--engine.checkpoint_every=3",
    "--engine.log_every=1",
]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["nonsaturating-r1", "wgan-gp"])
def test_two_processes_train_a_stylegan_alike(tmp_path, loss):
    """Each draws latents of its own, so that no single process trains as they do; but both have the
    same weights after every step, with and without a penalty."""
    folder = tmp_path / "two"
    options = [*STYLEGAN_OPTIONS, f"--objective.loss={loss}", f"--run_dir={folder}"]
    program = (str(Path(__file__).with_name("ranks_agree.py")),)
    sections = train(2, folder, "stylegan", *options, program=program)
    for state in sections["model"].values():
        assert all(value.isfinite().all() for value in state.values())
    assert sections["progress"]["steps_done"] == 6
    first, second = sections["rng"]["torch"]
    assert not torch.equal(first, second)
