"""Whole runs: start, resume, load, sample, evaluate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from fastgen.data import ImageSplit, resolve_data_root
from fastgen.metrics import (
    InceptionFeatures,
    extract_features,
    frechet_distance,
    precision_recall_density_coverage,
)
from fastgen.training.checkpoint import load_newest, write_atomic
from fastgen.training.engine import Engine, load_weights
from fastgen.training.errors import RunError
from fastgen.training.options import (
    config_from_dict,
    config_to_dict,
    find_recipe,
    parse_train_options,
)
from fastgen.training.origin import Origin, changed_data, fingerprints
from fastgen.training.processes import agreeing, make_accelerator
from fastgen.training.ranges import Label, Num, Seed, Temperature, check_number
from fastgen.training.rng import seed_all
from fastgen.training.run_folder import RunFolder, writing
from fastgen.training.tasks.base import Task
from fastgen.training.tasks.classifier import ClassifierTask

_SAMPLED_AT_ONCE = 500


def start_run(recipe: str, config: Any, run_dir: Path | None = None) -> RunFolder:
    """Train a recipe in a new folder, by default `runs/<recipe>-<data>-<time>`.

    Data and options are checked, and `engine.init_from` is loaded, before the folder is made.

    Raises:
        DataError: the data cannot be loaded.
        CheckpointError: `engine.init_from` has no sound checkpoint, or that of another model.
        RunError: options that do not fit, a folder that exists or cannot be written, or a training
            that failed.
    """
    root = resolve_data_root(config.data_root)
    config = dataclasses.replace(config, data_root=None if root is None else str(root))
    accelerator = _accelerator(config)
    with agreeing(accelerator):
        task, origin = _prepare(recipe, config, _load_data(recipe, config), accelerator)
        if config.engine.init_from is not None:
            _load_newest(task, RunFolder.open(Path(config.engine.init_from)))
    run = _create(run_dir or _default_path(recipe, config.data), origin.config, accelerator)
    Engine(task, config.engine, run, accelerator, origin).train()
    return run


def resume_run(
    path: Path,
    data_root: str | None = None,
    expected: str | None = None,
    *,
    accept_changes: bool = False,
) -> RunFolder:
    """Go on with a run from its newest sound checkpoint, or from the start where it has none.

    What config.yaml may say otherwise than when the checkpoint was made is in
    `fastgen.training.origin.MAY_CHANGE`; with more steps for the last stage that was begun, a run
    that is complete becomes longer.

    Args:
        path: the run folder.
        data_root: where the data is now, if it moved.
        expected: refuse a run of another recipe than this.
        accept_changes: go on although other options, or the data, are not those of the checkpoint.

    Raises:
        as `start_run`; RunError for a change that is not accepted, CheckpointError where
        checkpoints exist and none is sound.
    """
    run = RunFolder.open(path)
    recipe, config = config_from_dict(run.read_config())
    if expected not in (None, recipe):
        raise RunError(f"{path} is a run of recipe {recipe!r}, not {expected!r}")
    accelerator = _accelerator(config)
    with agreeing(accelerator):
        dataset = _load_data(recipe, config, data_root)
        task, origin = _prepare(recipe, config, dataset, accelerator)
    engine = Engine(task, config.engine, run, accelerator, origin)
    engine.train(resume=True, accept_changes=accept_changes)
    return run


def load_run(path: Path, data_root: str | None = None, overrides: Sequence[str] = ()) -> Task:
    """The task of a run in eval mode, with the weights of its newest sound checkpoint.

    Averaged weights are taken where the checkpoint has them; `overrides` are as for `evaluate_run`.

    Raises:
        DataError, RunError, CheckpointError: what is missing or damaged.
    """
    return _load_run(path, data_root, overrides)[0]


def _load_run(
    path: Path, data_root: str | None, overrides: Sequence[str]
) -> tuple[Task, Any, dict[str, Any]]:
    """A run's task as `load_run` gives it, the data set, and the sections of the checkpoint."""
    run = RunFolder.open(path)
    recipe, config = config_from_dict(run.read_config())
    if overrides:
        arguments = ["--config", str(run.config_path), *overrides]
        config = parse_train_options(recipe, arguments).config
    dataset = _load_data(recipe, config, data_root)
    task = _build(recipe, config, dataset)
    sections = _load_newest(task, run)
    device = "cuda" if torch.cuda.is_available() and not config.engine.cpu else "cpu"
    for module in task.modules.values():
        module.eval().to(device)
    return task, dataset, sections


def _load_newest(task: Task, run: RunFolder) -> dict[str, Any]:
    """Take the weights of a run's newest sound checkpoint, averaged where it has such.

    Returns:
        all its sections.
    """
    checkpoint, sections, problems = load_newest(run.checkpoints)
    for problem in problems.values():
        print(f"warning: {problem}; using {checkpoint.name}")
    load_weights(task, sections, averaged=True)
    return sections


def sample_run(
    path: Path,
    num: int,
    *,
    seed: int = 0,
    label: int | None = None,
    temperature: float = 1.0,
    data_root: str | None = None,
) -> Tensor:
    """Draw images (num, C, H, W) from a run's model, on the CPU.

    Raises:
        RunError: numbers out of range, and as `load_run`.
    """
    _check_numbers(num=(Num, num), seed=(Seed, seed), temperature=(Temperature, temperature))
    _check_numbers(label=(Label | None, label))
    task = load_run(path, data_root)
    device = _device(task)
    generator = torch.Generator(device).manual_seed(seed)
    labels = None if label is None else torch.full((num,), label, device=device)
    try:
        with torch.no_grad():
            return task.sample(
                num, labels=labels, temperature=temperature, generator=generator
            ).cpu()
    except ValueError as error:
        raise RunError(str(error)) from error


def evaluate_run(
    path: Path,
    data_root: str | None = None,
    *,
    features: Path | Literal["inception"] | None = None,
    num: int = 10_000,
    overrides: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """Measure a run's model on the held-out splits: split -> measure -> value; writes eval.json.

    Held-out data that is not what it was in training is measured, after a warning.

    Args:
        path: the run folder.
        data_root: where the data is now, if it moved.
        features: a run of recipe `classifier`, by whose features samples are compared with the
            images of its test split; "inception": torchvision's, and the run's own test split.
        num: how many samples to draw for that.
        overrides: options of the recipe in the place of the run's, as "--evaluation.samples=5000".

    Raises:
        RunError: as `load_run`.
        WriteError: eval.json cannot be written.
    """
    _check_numbers(num=(Num, num))
    task, dataset, sections = _load_run(path, data_root, overrides)
    if sections.get("origin") is not None:
        for change in changed_data(sections["origin"], fingerprints(dataset, ("valid", "test"))):
            print(f"warning: the data is not that of the training: {change}")
    measures = task.evaluate()
    if features is not None:
        judge = _inception() if features == "inception" else load_run(Path(features), data_root)
        quality = sample_quality(task, judge, num)
        measures["test"] = measures.get("test", {}) | quality
    with writing(path / "eval.json"):
        write_atomic(path / "eval.json", json.dumps(measures, indent=1).encode())
    return measures


def _inception() -> InceptionFeatures:
    try:
        return InceptionFeatures()
    except ValueError as error:
        raise RunError(str(error)) from error


def sample_quality(
    task: Task, judge: Task | nn.Module, num: int, seed: int = 0
) -> dict[str, float]:
    """Frechet distance, precision, recall, density and coverage of `num` samples against test
    images, by features: a classifier's, and the images that it was held out, or those of a module
    that maps images to (N, D), and the task's own.

    Raises:
        RunError: the judge is the task of another recipe, or its images are of another shape.
    """
    network: Callable[[Tensor], Tensor]
    if isinstance(judge, ClassifierTask):
        network, device, test = judge.model.features, _device(judge), judge.dataset.test
    elif isinstance(judge, Task):
        raise RunError("the features must be those of a run of recipe 'classifier'")
    else:
        device, test = _device(task), task.dataset.test
        network = judge.to(device)
    if not isinstance(test, ImageSplit):
        raise RunError("features are of images, and the run has none")
    generator = torch.Generator(_device(task)).manual_seed(seed)
    try:
        with torch.no_grad():
            parts = [
                task.sample(len(part), labels=None, temperature=1.0, generator=generator).cpu()
                for part in torch.arange(num).split(_SAMPLED_AT_ONCE)
            ]
        fake, real = (
            extract_features(network, images, device=device)
            for images in (torch.cat(parts).clamp(0, 1), test.images)
        )
        prdc = precision_recall_density_coverage(real, fake)
    except ValueError as error:
        raise RunError(str(error)) from error
    return {"frechet_distance": frechet_distance(real, fake), **prdc._asdict()}


def _check_numbers(**given: tuple[Any, Any]) -> None:
    """Name -> (its type with a range, what came)."""
    try:
        for name, (hint, value) in given.items():
            check_number(name, hint, value)
    except ValueError as error:
        raise RunError(str(error)) from error


def _device(task: Task) -> torch.device:
    return next(next(iter(task.modules.values())).parameters()).device


def _load_data(recipe: str, config: Any, data_root: str | None = None) -> Any:
    return find_recipe(recipe).load(config.data, resolve_data_root(data_root or config.data_root))


def _prepare(
    recipe: str, config: Any, dataset: Any, accelerator: Accelerator
) -> tuple[Task, Origin]:
    """A task to train, whose batches the processes can share, and what it is trained on."""
    task = _build(recipe, config, dataset)
    _check_sizes(task, config.engine.accumulate, accelerator.num_processes)
    _check_shares(task, config.engine.accumulate, accelerator.num_processes)
    return task, Origin.of(config_to_dict(recipe, config), dataset)


def _build(recipe: str, config: Any, dataset: Any) -> Task:
    seed_all(config.engine.seed)
    try:
        return find_recipe(recipe).task(config, dataset)
    except (ValueError, TypeError) as error:
        raise RunError(f"options do not fit: {' '.join(str(error).split())}") from error


def _check_sizes(task: Task, accumulate: int, processes: int) -> None:
    """Refuse stages whose batches cannot be had from the data, or not be shared out evenly."""
    samples, shares = len(task.dataset.train), accumulate * processes
    for stage in task.stages:
        steps, batch_size = stage.config.steps, stage.config.batch_size
        if steps < 0:
            problem = f"steps must not be negative, got {steps}"
        elif not 1 <= batch_size <= samples:
            problem = f"batch_size must be in [1, {samples}], got {batch_size}"
        elif batch_size % shares:
            among = f" times the {processes} processes" if processes > 1 else ""
            problem = (
                f"batch_size must be a multiple of engine.accumulate{among}, "
                f"got {batch_size} and {accumulate}"
            )
        else:
            continue
        raise RunError(f"options do not fit: {stage.name}.{problem}")


def _check_shares(task: Task, accumulate: int, processes: int) -> None:
    """Refuse batches whose parts cut rows apart that a stage compares with each other."""
    for stage in task.stages:
        rows, together = stage.config.batch_size // (accumulate * processes), stage.rows_together
        if processes > 1 and rows % together:
            raise RunError(
                f"options do not fit: {stage.name}.batch_size / engine.accumulate must have a "
                f"multiple of {together} rows for each of the {processes} processes, got {rows}"
            )


def _accelerator(config: Any) -> Accelerator:
    try:
        return make_accelerator(config.engine)
    except ValueError as error:
        raise RunError(
            f"engine options do not fit this machine: {' '.join(str(error).split())}"
        ) from error


def _default_path(recipe: str, data: str) -> Path:
    stem = f"{recipe}-{Path(data).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    path, count = Path("runs") / stem, 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{stem}-{count}"
    return path


def _create(path: Path, config: dict[str, Any], accelerator: Accelerator) -> RunFolder:
    """The main process makes the folder, and all open it."""
    shared = [str(path)]
    broadcast_object_list(shared)  # a path of its own would have the time in it
    with agreeing(accelerator):
        if accelerator.is_main_process:
            RunFolder.create(Path(shared[0]), config)
    return RunFolder.open(Path(shared[0]))
