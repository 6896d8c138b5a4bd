"""Two processes on the halves of a batch train as one process does on the whole."""

import os
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
    "--prior_model.dropout=0",
    "--model.kmeans_init=false",
    "--model.revive_after=null",
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


def assert_alike(one: dict, two: dict, rtol: float, atol: float) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=rtol, atol=atol, msg=name)


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


CODEBOOKS = {
    "ema": [],
    "gradient": ["--model.codebook=gradient"],
    "residual": ["--model.quantizers=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_two_processes_equal_one(tmp_path, codebook):
    """Gradients by AdamW's moments, which are linear in them and not, as its steps, blind to their
    scale; weights, codebooks and their statistics."""
    options = [*OPTIONS, *CODEBOOKS[codebook], "--engine.keep_checkpoints=9"]
    runs = [tmp_path / "one", tmp_path / "two"]
    for processes, run in enumerate(runs, 1):
        train(processes, run, "vqvae", *options, f"--run_dir={run}")
    for step, stage in ((5, "autoencoder"), (12, "autoencoder"), (24, "prior")):
        one, two = (load_checkpoint(run / f"checkpoints/step-{step:08d}") for run in runs)
        assert len(two["rng"]["torch"]) == 2
        moments = [
            {i: state["exp_avg"] for i, state in s["optimizers"][stage]["state"].items()}
            for s in (one, two)
        ]
        largest = max(float(value.abs().max()) for value in moments[0].values())
        assert largest > 1e-4
        assert_alike(*moments, rtol=1e-3, atol=1e-3 * largest)
        for module, weights in one["model"].items():
            assert_alike(weights, two["model"][module], rtol=1e-3, atol=1e-4)


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
    assert errors.count("stopped by SIGTERM after step") == 2, errors
    (path,) = list_checkpoints(run / "checkpoints")
    assert load_checkpoint(path)["progress"]["steps_done"] % 10 == 0


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
