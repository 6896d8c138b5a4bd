"""What holds for every recipe, on settings that train in a second or two.

A recipe is tested by its rows in TINY, one per loss or kind of data that takes a way of its own.
"""

import fcntl
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgen.cli import main
from fastgen.training import runs
from fastgen.training.checkpoint import list_checkpoints, load_checkpoint
from fastgen.training.errors import RunError, TrainingStopped
from fastgen.training.options import config_to_dict, parse_train_options
from fastgen.training.runs import evaluate_run, resume_run, sample_run, start_run
from fastgen.training.stage_run import StageRun
from fastgen.training.tasks import RECIPES


@dataclass(frozen=True)
class Tiny:
    """A setting of a recipe.

    Attributes:
        recipe: its name.
        options: sizes, small ones, with every source of randomness in use.
        short: steps of its stages for tests that compare runs: five or more in all.
        long: steps in which it learns; None for a row whose recipe another row shows to learn.
        measure: a stage and what it measures on the validation split: falls to `share` of what it
            was, at least.
        drawn: shape of three samples; None for a recipe that draws none.
        by_rows: a row's loss depends on no other row, so that accumulated parts give the same.
        compiles: whether networks compile, within a minute.
        bad: an option that does not fit, and what is said of it.
    """

    recipe: str
    options: tuple[str, ...]
    short: tuple[str, ...]
    long: tuple[str, ...] | None = None
    measure: tuple[str, str] = ("", "")
    share: float = 1.0
    drawn: tuple[int, ...] | None = None
    by_rows: bool = False
    compiles: bool = False
    bad: tuple[str, str] = ("", "")


FLOW = (
    "--flow.batch_size=32",
    "--flow.optimizer.warmup_steps=2",
    "--flow.optimizer.lr=5e-3",
)
IMAGES = (
    "--data=digits",
    "--model.hidden=8",
    "--model.blocks=1",
    # a bias before a batch norm has a gradient of rounding errors, which AdamW would scale to full
    # steps: clipped, they are far below its eps
    "--engine.max_grad_norm=1e-3",
    *FLOW,
)
VAE = (
    "--model.width=16",
    "--model.latent_dim=5",
    "--model.dropout=0.2",
    "--vae.batch_size=48",
    "--vae.optimizer.warmup_steps=2",
    "--vae.optimizer.lr=5e-3",
    "--engine.ema_decay=0.9",
    "--evaluation.samples=10",
)
STYLEGAN = (
    "--data=digits",
    "--model.latent_dim=8",
    "--model.mapping_layers=2",
    "--model.channel_base=64",
    "--model.channel_max=8",
    "--growth.batch_size=[16]",
    "--growth.fade=0.75",
    "--objective.penalty_every=2",
    "--objective.mirror=true",
    "--engine.ema_decay=0.9",
)
VQVAE = (
    "--model.num_codes=16",
    "--model.code_dim=4",
    "--model.channels=8",
    "--model.revive_after=2",
    "--autoencoder.batch_size=64",
    "--autoencoder.optimizer.warmup_steps=2",
    "--autoencoder.optimizer.lr=5e-3",
    "--prior.batch_size=64",
    "--prior.optimizer.warmup_steps=2",
    "--prior_model.width=16",
    "--prior_model.layers=1",
    "--prior_model.heads=2",
    "--prior_model.dropout=0.2",
)
TINY = {
    "classifier": Tiny(
        "classifier",
        (
            "--model.channels=4",
            "--classifier.batch_size=48",
            "--classifier.optimizer.warmup_steps=2",
            "--classifier.optimizer.lr=1e-2",
        ),
        short=("--classifier.steps=8",),
        long=("--classifier.steps=60",),
        measure=("classifier", "cross_entropy"),
        share=0.7,
        by_rows=True,
        compiles=True,
        bad=("--model.channels=0", "channels"),
    ),
    "realnvp": Tiny(
        "realnvp",
        (
            "--data=moons",
            "--model.layers=4",
            "--model.hidden=16",
            "--model.num_bins=8",
            "--engine.ema_decay=0.9",
            *FLOW,
        ),
        short=("--flow.steps=8",),
        long=("--flow.steps=80",),
        measure=("flow", "excess"),
        share=0.5,
        drawn=(1, 1, 200, 200),
        by_rows=True,
        compiles=True,
        bad=("--model.layers=0", "layers"),
    ),
    "realnvp images": Tiny(
        "realnvp",
        IMAGES,
        short=("--flow.steps=6",),
        long=("--flow.steps=30",),
        measure=("flow", "bits_per_dim"),
        share=0.7,
        drawn=(3, 1, 8, 8),
        bad=("--model.scales=4", "scales must halve the sides of a 8x8 image"),
    ),
    "realnvp reversible": Tiny(
        "realnvp",
        (
            *IMAGES,
            "--model.reversible=true",
            "--model.anchor_every=3",
            "--engine.accumulate=2",
        ),
        short=("--flow.steps=5",),
    ),
    "stylegan": Tiny(
        "stylegan",
        STYLEGAN,
        short=("--growth.steps=[3,5]",),
        long=("--growth.steps=[10,40]",),
        measure=("8x8", "frechet_8x8"),
        share=0.7,
        drawn=(3, 1, 8, 8),
        by_rows=True,
        bad=("--growth.steps=[3]", "growth.steps must be 2 numbers"),
    ),
    "stylegan wasserstein": Tiny(
        "stylegan", (*STYLEGAN, "--objective.loss=wgan-gp"), short=("--growth.steps=[3,5]",)
    ),
    "vae": Tiny(
        "vae",
        (*VAE, "--objective.beta_warmup_steps=6"),
        short=("--vae.steps=8",),
        long=("--vae.steps=100",),
        measure=("vae", "nll_bound"),
        share=0.8,
        drawn=(3, 1, 8, 8),
        by_rows=True,
        compiles=True,
        bad=("--model.latent_dim=0", "latent_dim"),
    ),
    "vae gaussian": Tiny(
        "vae",
        (
            *VAE,
            "--model.network=conv",
            "--model.likelihood=gaussian",
            "--objective.free_bits=0.01",
            "--model.kl=mc",
        ),
        short=("--vae.steps=5",),
    ),
    "vae logistic": Tiny(
        "vae",
        (
            *VAE,
            "--model.likelihood=discretized-logistic",
            "--model.levels=17",
            "--model.scale=pixel",
            "--objective.samples=3",
            "--objective.elbo_steps=2",
        ),
        short=("--vae.steps=5",),
        by_rows=True,
    ),
    "vqvae": Tiny(
        "vqvae",
        VQVAE,
        short=("--autoencoder.steps=5", "--prior.steps=5"),
        long=("--autoencoder.steps=60", "--prior.steps=40"),
        measure=("autoencoder", "relative_mse"),
        share=0.7,
        drawn=(3, 1, 8, 8),
        compiles=True,
        bad=("--model.likelihood=bernoulli", "must be 0 or 1 for the Bernoulli likelihood"),
    ),
    "vqvae gradient": Tiny(
        "vqvae",
        (*VQVAE, "--model.codebook=gradient"),
        short=("--autoencoder.steps=6", "--prior.steps=0"),
    ),
    "vqvae residual": Tiny(
        "vqvae",
        (
            *VQVAE,
            "--model.quantizers=2",
            "--model.likelihood=discretized-logistic",
            "--engine.accumulate=2",
        ),
        short=("--autoencoder.steps=5", "--prior.steps=3"),
        compiles=True,
    ),
}
COMMON = (
    "--engine.cpu=true",
    "--engine.log_every=1",
    "--engine.valid_every=1000",
    "--engine.sample_every=1000",
)
UNMEASURED = {"step", "stage", "split", "steps_per_second"}


def rows(**wanted: Any) -> Any:
    """Parametrises a test by the names in TINY, of those that have such attributes."""
    names = [n for n, t in TINY.items() if all(getattr(t, k) == v for k, v in wanted.items())]
    return pytest.mark.parametrize("name", names)


one_row_per_recipe = pytest.mark.parametrize("name", [n for n, t in TINY.items() if t.long])


def configured(name: str, *options: str) -> Any:
    tiny = TINY[name]
    return parse_train_options(tiny.recipe, [*COMMON, *tiny.options, *options]).config


def train(name: str, folder: Path, *options: str) -> Path:
    return start_run(TINY[name].recipe, configured(name, *options), folder).path


def records(run: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == split]


def losses(run: Path) -> list[float]:
    """All that was logged of all steps but the speed."""
    return [v for line in records(run) for k, v in line.items() if k not in UNMEASURED]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dicts and lists hold, by the names that lead to it."""
    if not isinstance(value, dict):
        value = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
    if not isinstance(value, dict):
        yield path, value
        return
    for name, item in value.items():
        yield from leaves(item, f"{path}/{name}")


def bits(value: Any) -> Any:
    """What is equal for equal bits alone, of NaN too."""
    if not torch.is_tensor(value):
        return value
    return value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).tolist()


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """short(name): the run of so many steps, which is trained once; read only."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("short") / "run"
            every = ("--engine.checkpoint_every=1", "--engine.keep_checkpoints=99")
            made[name] = train(name, folder, *TINY[name].short, *every)
        return made[name]

    return run


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """long(name): the run that learns; read only."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            steps = TINY[name].long
            made[name] = train(name, tmp_path_factory.mktemp("long") / "run", *steps)
        return made[name]

    return run


def test_every_recipe_has_a_row():
    assert {tiny.recipe for tiny in TINY.values() if tiny.long} == RECIPES.keys()


# --- learning, sampling, evaluation


@one_row_per_recipe
def test_it_learns(long, name):
    stage, measure = TINY[name].measure
    values = [r[measure] for r in records(long(name), "valid") if r["stage"] == stage]
    assert values[-1] < TINY[name].share * values[0]


@one_row_per_recipe
def test_it_draws(long, name):
    if TINY[name].drawn is None:
        with pytest.raises(RunError, match="draws no images"):
            sample_run(long(name), 3)
        return
    first, again, other = (sample_run(long(name), 3, seed=seed) for seed in (1, 1, 2))
    assert first.shape == TINY[name].drawn and first.isfinite().all()
    assert torch.equal(first, again) and not torch.equal(first, other)
    pictures = list((long(name) / "samples").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures) and pictures


@one_row_per_recipe
def test_it_is_evaluated(long, name):
    measures = evaluate_run(long(name))
    assert "test" in measures and measures == evaluate_run(long(name))
    assert all(math.isfinite(value) for split in measures.values() for value in split.values())
    assert json.loads((long(name) / "eval.json").read_text()) == measures


# --- the same run another way


@rows()
def test_stopped_and_resumed_it_is_the_same_bit_for_bit(short, tmp_path, monkeypatch, name):
    """By SIGTERM in the middle of its last stage."""
    whole, folder = short(name), tmp_path / "run"
    steps = len(records(whole))
    taken, step = [], StageRun.step

    def stopping(self):
        step(self)
        taken.append(self)
        if len(taken) == steps - 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StageRun, "step", stopping)
    every = ("--engine.checkpoint_every=1", "--engine.keep_checkpoints=99")
    with pytest.raises(TrainingStopped, match=f"after step {steps - 2}"):
        train(name, folder, *TINY[name].short, *every)
    torch.randn(3)  # where the generators are must not matter
    resume_run(folder)
    assert len(taken) == steps and losses(folder) == losses(whole)
    ours, theirs = (list_checkpoints(run / "checkpoints") for run in (folder, whole))
    assert [path.name for path in ours] == [path.name for path in theirs]
    found, expected = (dict(leaves(load_checkpoint(path[-1]))) for path in (ours, theirs))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if not path.endswith("metrics_bytes"):  # the lengths of lines with timings in them differ
            assert bits(found[path]) == bits(value), path


@rows(by_rows=True)
def test_accumulated_parts_draw_what_the_batch_does(short, tmp_path, name):
    parts = train(name, tmp_path / "run", *TINY[name].short, "--engine.accumulate=2")
    assert losses(parts) == pytest.approx(losses(short(name)), rel=1e-3, abs=1e-5)


@pytest.mark.slow
@rows(compiles=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports inductor
def test_compiled_it_trains_the_same(short, tmp_path, name):
    eager = short(name)
    # or the rows that a codebook starts from would be of other random numbers
    with importlib.import_module("torch._inductor.config").patch(fallback_random=True):
        run = train(name, tmp_path / "run", *TINY[name].short, "--engine.compile=true")
    assert losses(run) == pytest.approx(losses(eager), rel=1e-3, abs=1e-5)


def test_what_cannot_compile_says_why(tmp_path, capsys):
    arguments = ["--data=digits", "--engine.compile=true", f"--run-dir={tmp_path / 'run'}"]
    assert main(["train", "stylegan", *arguments]) == 2
    err = capsys.readouterr().err
    assert "engine.compile must be false: the penalties are of second order" in err
    assert err.count("\n") == 1


# --- several processes


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """A folder with the short runs of TINY by two processes, made once for all xdist workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-processes"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "output").exists():
            (folder / "output").write_text(_train_together(folder))
    output = (folder / "output").read_text()
    assert output.endswith("status 0"), output
    return folder


def _train_together(folder: Path) -> str:
    every = ("--engine.checkpoint_every=1", "--engine.keep_checkpoints=99")
    runs = {
        name: config_to_dict(tiny.recipe, configured(name, *tiny.short, *every))
        for name, tiny in TINY.items()
    }
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [str(Path(__file__).with_name("ranks_train.py")), str(folder)]
    done = subprocess.run(
        [sys.executable, *torchrun, *program],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    return f"{done.stdout}{done.stderr}\nstatus {done.returncode}"


@rows()
def test_two_processes_train_as_one(short, two_processes, name):
    """On the halves of its batches: losses, gradients, weights and statistics.

    What differs is the order in which float32 numbers are added: 1e-6 before the weights move, in
    the values and in the first step's gradients, which are in AdamW's first moments. An AdamW step
    is blind to a gradient's scale, so that the smallest gradients make the largest differences:
    1e-3 of the way that the weights have come in a few steps, up to 1e-2 in a single bias.
    """
    error = two_processes / f"{name}.error"
    assert not error.exists(), error.read_text()
    one, two = short(name), two_processes / name
    count = sum(key not in UNMEASURED for key in records(one)[0])
    assert losses(two)[:count] == pytest.approx(losses(one)[:count], rel=1e-5, abs=1e-6)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3, abs=1e-4)
    steps = [path.name for path in list_checkpoints(one / "checkpoints")]
    start, end = (
        [load_checkpoint(run / "checkpoints" / step) for run in (one, two)]
        for step in (steps[0], steps[-1])
    )
    for phase in start[0]["optimizers"]:
        assert_moments_alike(*(sections["optimizers"][phase]["state"] for sections in start))
    for module, before in start[0]["model"].items():
        assert_weights_alike(before, *(sections["model"][module] for sections in end))


def assert_moments_alike(expected: dict, found: dict) -> None:
    largest = max(float(state["exp_avg"].abs().max()) for state in expected.values())
    assert largest > 0
    for i, state in expected.items():
        torch.testing.assert_close(
            found[i]["exp_avg"], state["exp_avg"], rtol=0, atol=1e-5 * largest
        )


def assert_weights_alike(before: dict, expected: dict, found: dict) -> None:
    """And buffers: of those that count whole things, not one is different."""
    moved, apart = {}, {}
    for name, value in expected.items():
        if value.is_floating_point():
            moved[name] = float((value.double() - before[name].double()).norm())
            apart[name] = float((value.double() - found[name].double()).norm())
            assert apart[name] <= 0.03 * moved[name] + 1e-6, name
        else:
            assert torch.equal(value, found[name]), name
    assert math.hypot(*apart.values()) <= 2e-3 * math.hypot(*moved.values())


def test_groups_that_processes_would_cut_apart_are_refused(tmp_path, monkeypatch):
    """The spread of a group of four images is a feature of each; before a run folder is made."""
    monkeypatch.setattr(runs, "_accelerator", lambda config: SimpleNamespace(num_processes=2))
    message = "4x4.batch_size / engine.accumulate must have a multiple of 4 rows for each of the 2"
    with pytest.raises(RunError, match=message):
        train("stylegan", tmp_path / "run", "--growth.steps=[1,1]", "--growth.batch_size=[4]")
    assert not (tmp_path / "run").exists()


# --- what does not fit


@one_row_per_recipe
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--no_such_option=1", "no_such_option"),
        ("--data=no_such_data", "data set 'no_such_data' is not known"),
        ("--engine.log_every=0", "engine.log_every must be an integer in [1, 1000000000], got 0"),
    ],
)
def test_a_bad_option_stops_it_in_one_line(name, option, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = TINY[name]
    assert main(["train", tiny.recipe, *COMMON, *tiny.options, *tiny.short, option]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@one_row_per_recipe
def test_an_option_that_does_not_fit_its_model_does_too(name, tmp_path, monkeypatch, capsys):
    test_a_bad_option_stops_it_in_one_line(name, *TINY[name].bad, tmp_path, monkeypatch, capsys)
