"""Every numeric option has a range: a value outside it is one line and status 2 before there is a
run folder, a value inside it builds a model that takes a step."""

import dataclasses
import functools
import math
import shutil
import types
import typing
from typing import Annotated, Union

import pytest
import torch
import yaml

from fastgen.cli import main
from fastgen.training import options, runs
from fastgen.training.config import EngineConfig, OptimizerConfig, StageConfig
from fastgen.training.errors import RunError
from fastgen.training.ranges import Range, describe, field_types
from fastgen.training.stage_run import StageRun
from fastgen.training.tasks import RECIPES
from fastgen.training.tasks.stylegan import GrowthConfig
from fastgen.training.tasks.vae import VAEConfig

VALUES = ("-1", "0", "1", "1e21", "nan", ".nan", "inf", ".inf", "text", "")
SMALL = {
    "classifier": ["--model.channels=4", "--model.feature_dim=8", "--classifier.batch_size=8"],
    "realnvp": [
        "--data=digits",
        "--model.hidden=4",
        "--model.blocks=1",
        "--flow.batch_size=8",
    ],
    "stylegan": [
        "--data=digits",
        "--model.latent_dim=4",
        "--model.mapping_layers=1",
        "--model.channel_base=16",
        "--growth.steps=[1,1]",
        "--growth.batch_size=[8]",
    ],
    "vae": ["--model.width=16", "--model.latent_dim=2", "--vae.batch_size=8"],
    "vqvae": [
        "--model.num_codes=4",
        "--model.channels=4",
        "--model.residual_blocks=1",
        "--prior_model.width=8",
        "--prior_model.layers=1",
        "--autoencoder.batch_size=8",
        "--prior.batch_size=8",
    ],
}


def options_of(kind, prefix=""):
    """(dotted name, type) of every option, those within options too."""
    for name, hint in field_types(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from options_of(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def numbers_in(hint):
    """The number types in a type: (int or float, its range or None)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield arguments
    elif hint in (int, float):
        yield hint, None
    elif origin in (list, tuple, Union, types.UnionType):
        for argument in arguments:
            yield from numbers_in(argument)


NUMERIC = [
    (recipe, name, hint)
    for recipe in RECIPES
    for name, hint in options_of(RECIPES[recipe].config)
    if any(numbers_in(hint))
]


def test_every_number_has_a_range():
    assert len(NUMERIC) > 100
    for recipe, name, hint in NUMERIC:
        for kind, bounds in numbers_in(hint):
            assert isinstance(bounds, Range), f"{recipe}: {name}: {kind} without a range"
            assert math.isfinite(bounds.least) and math.isfinite(bounds.most)


class OneStep:
    """In the place of the engine: a step of each stage, without files."""

    def __init__(self, task, config, run, accelerator, origin):
        self.task, self.config, self.accelerator = task, config, accelerator

    def train(self):
        for stage in self.task.stages:
            if stage.config.steps:
                StageRun(stage, self.config, self.accelerator).step()


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command line, and return the line by which it is refused; None where it is not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "Engine", OneStep)
    monkeypatch.setattr(options, "_parser", functools.cache(options._parser))
    torch.set_num_threads(1)

    def run(*arguments):
        status = main([*map(str, arguments)])
        err = capsys.readouterr().err
        if status == 0:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            return None
        assert status == 2, (arguments, err)
        assert err.startswith("fastgen: error: ") and err.count("\n") == 1, (arguments, err)
        assert not (tmp_path / "run").exists(), arguments
        return err

    return run


def spelled(hint, value):
    origin = typing.get_origin(hint)
    if not value or origin not in (list, tuple):
        return value
    return f"[{value}]" if origin is list else f"[{value}, {value}]"


def is_legal(hint, value):
    """Whether a type takes one of `VALUES`: those but -1, 0 and 1 are far from every range."""
    return value in ("-1", "0", "1") and all(int(value) in bounds for _, bounds in numbers_in(hint))


def hostile(recipe):
    """(option, type, value); of what all recipes share, all values in one of them."""
    for found_in, name, hint in NUMERIC:
        shared = name.split(".")[-1] in SHARED and recipe != "vae"
        for value in ("-1", ".nan") if shared else VALUES:
            if found_in == recipe:
                yield name, hint, value


SHARED = [
    field.name
    for kind in (EngineConfig, OptimizerConfig, StageConfig)
    for field in dataclasses.fields(kind)
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_hostile_numbers(refused, recipe):
    """What is outside the range is refused by a line that names option, range and value; with what
    is inside, a step is taken, or the line says what does not go together."""
    stepped = 0
    for name, hint, value in hostile(recipe):
        small = [*SMALL[recipe], "--engine.cpu=true", "--run_dir=run"]
        line = refused("train", recipe, *small, f"--{name}={spelled(hint, value)}")
        stepped += line is None
        if not is_legal(hint, value):
            assert line is not None, (name, value)
            assert f"error: {name} must be {describe(hint)}, got " in line, (name, value, line)
            assert line.endswith(f"; see fastgen train {recipe} --help\n")
    assert stepped > 0


@pytest.mark.parametrize("value", [".nan", ".inf", "-1.0", "1.0e+21", "text", "''", "[0.5]"])
@pytest.mark.parametrize("name", ["engine.max_grad_norm", "vae.optimizer.lr", "model.dropout"])
def test_numbers_in_files(refused, tmp_path, name, value):
    """A file of options, and the config.yaml of a run that is resumed."""
    nested = value
    *parents, last = name.split(".")
    for part in (last, *reversed(parents)):
        nested = f"{{{part}: {nested}}}"
    (tmp_path / "all.yaml").write_text(nested)
    assert f"{name} must be " in refused("train", "vae", "--config=all.yaml", "--run_dir=run")
    assert refused("train", "vae", *SMALL["vae"], "--engine.cpu=true", "--run_dir=kept") is None
    config = yaml.safe_load((tmp_path / "kept/config.yaml").read_text())
    part = config
    for parent in parents:
        part = part[parent]
    part[last] = yaml.safe_load(value)
    (tmp_path / "kept/config.yaml").write_text(yaml.safe_dump(config))
    assert f"{name} must be " in refused("train", "--resume", "kept")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EngineConfig(max_grad_norm=-1.0), r"max_grad_norm must be a number in \(0, "),
        (lambda: EngineConfig(seed=1.5), "seed must be an integer in "),
        (lambda: EngineConfig(accumulate=True), "accumulate must be an integer in "),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"each a number in \[0, 1\), got \(0.9, 1.0\)"),
        (lambda: OptimizerConfig(betas=(0.9,)), "betas must be 2 numbers"),
        (lambda: OptimizerConfig(lr=math.nan), r"lr must be a number in \(0, 100\], got nan"),
        (lambda: StageConfig(steps=-1), "steps must be an integer in "),
        (lambda: GrowthConfig(steps=[1, -1]), r"each an integer in .*, got \[1, -1\]"),
        (lambda: replaced(steps=-1), "vae.steps must be an integer in "),
    ],
)
def test_options_made_in_python(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def replaced(**changed):
    """Options that were changed after they were made, and are then made part of others."""
    stage = StageConfig()
    vars(stage).update(changed)
    return VAEConfig(vae=stage)


def test_a_learning_rate_that_turns_the_decayed_weights_round():
    with pytest.raises(
        ValueError, match="lr times weight_decay must be at most 1, .* got 10.0 and 1"
    ):
        OptimizerConfig(lr=10.0, weight_decay=1.0)


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("vqvae", ["--prior_model.width=10", "--prior_model.heads=4"], "a multiple of heads"),
        ("vqvae", ["--model.downsamplings=4"], "downsamplings must halve the sides"),
        ("realnvp", ["--data=digits", "--model.scales=4"], "scales must halve the sides"),
        ("vae", ["--model.network=conv", "--model.layers=0"], "layers must halve the sides"),
        ("vae", ["--model.network=conv", "--model.layers=4"], "layers must halve the sides"),
        ("vae", ["--model.network=conv", "--model.width=8"], "width must be at least 16"),
        ("vae", ["--vae.batch_size=2000"], "vae.batch_size must be in [1, 1439], got 2000"),
        ("stylegan", ["--data=digits", "--model.resolution=12"], "must be a power of two"),
        ("stylegan", ["--data=digits", "--growth.steps=[]"], "growth.steps must be 2 numbers"),
        ("stylegan", ["--data=digits", "--growth.batch_size=[]"], "batch_size must be one number"),
    ],
)
def test_numbers_that_do_not_go_together(refused, recipe, arguments, message):
    line = refused("train", recipe, "--engine.cpu=true", "--run_dir=run", *arguments)
    assert line is not None and message in line


OF_SAMPLE = ("--num", "--seed", "--label", "--temperature")


def legal_in_sampling(option, value):
    return option in {"0": ("--seed", "--label"), "1": OF_SAMPLE}.get(value, ())


@pytest.mark.parametrize("option", OF_SAMPLE)
def test_hostile_numbers_of_sample(refused, finished_run, option):
    for value in VALUES:
        line = refused("sample", finished_run, "--num=2", "--out=run.png", f"{option}={value}")
        assert (line is None) == legal_in_sampling(option, value), (value, line)
        assert line is None or option.strip("-") in line


@pytest.fixture(scope="module")
def small_vae(tmp_path_factory):
    arguments = [*SMALL["vae"], "--vae.steps=1", "--engine.cpu=true", "--evaluation.samples=2"]
    config = options.parse_train_options("vae", arguments).config
    return runs.start_run("vae", config, tmp_path_factory.mktemp("vae") / "run").path


@pytest.mark.parametrize("option", ["--num", "--evaluation.samples", "--evaluation.images"])
def test_hostile_numbers_of_eval(refused, small_vae, option):
    for value in VALUES:
        line = refused("eval", small_vae, f"{option}={value}")
        assert (line is None) == (value == "1"), (value, line)
        assert line is None or option.strip("-") in line


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1", True])
def test_sampling_from_python(finished_run, value):
    with pytest.raises(RunError, match="temperature must be a number in "):
        runs.sample_run(finished_run, 2, temperature=value)
    with pytest.raises(RunError, match="num must be an integer in "):
        runs.sample_run(finished_run, value)
