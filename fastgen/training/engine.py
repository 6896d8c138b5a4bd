"""The training engine: what every task has in common.

Stages follow each other in one count of steps. After a step come, in this order, its log line,
validation, samples, and last the checkpoint, which therefore covers all of them. At the end of a
stage its averaged weights become the weights of its modules, after that checkpoint: it has both, so
that a stage that gets more steps goes on as if it had not ended.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from fastgen.training import checkpoint as ckpt
from fastgen.training.config import EngineConfig
from fastgen.training.errors import (
    CheckpointError,
    NonFiniteLossError,
    RunError,
    TrainingStopped,
)
from fastgen.training.origin import Origin
from fastgen.training.processes import StopRequest, agreeing
from fastgen.training.rng import get_rng_state, seed_all, set_rng_state
from fastgen.training.run_folder import MetricsLog, RunFolder
from fastgen.training.stage_run import StageRun
from fastgen.training.tasks.base import Stage, Task

_NAMED = 5
_PROGRESS = {"stage": "", "steps_done": 0, "summed_steps": 0, "metrics_bytes": 0}


class Engine:
    """Trains a task in a run folder.

    Args:
        task: built under `seed_all(config.seed)`, on the CPU.
        config: engine options.
        run: the run folder, created or opened.
        accelerator: from `fastgen.training.processes.make_accelerator`.
        origin: what checkpoints say that they are of; a resume compares it. None: nothing is said
            or compared.
    """

    def __init__(
        self,
        task: Task,
        config: EngineConfig,
        run: RunFolder,
        accelerator: Accelerator,
        origin: Origin | None = None,
    ):
        self.task = task
        self.config = config
        self.run = run
        self.accelerator = accelerator
        self.origin = origin
        self.step = 0
        self._changed = False
        self._clock = 0.0
        self._stop = StopRequest(accelerator)
        self._log: MetricsLog | None = None
        for module in task.modules.values():
            module.to(accelerator.device)

    def train(self, *, resume: bool = False, accept_changes: bool = False) -> None:
        """Train all stages to their end, from the newest sound checkpoint if `resume`.

        A run that is complete and has more steps now goes on with its last stage, whose schedule is
        that of the new length. SIGTERM ends the training early: after the step, with a checkpoint.

        Args:
            resume: go on instead of starting.
            accept_changes: go on although options or data are not those of the checkpoint. The
                optimisers' options are the new ones then, averages that it lacks start anew, and
                the random states are still the old ones.

        Raises:
            NonFiniteLossError: the loss or a weight is NaN or infinite; no checkpoint has it.
            TrainingStopped: SIGTERM came.
            CheckpointError: no sound checkpoint although there are some, or it does not fit.
            WriteError: the disk refuses a file of the run.
            RunError: the run folder is in use; or options or data changed.
        """
        main = self.accelerator.is_main_process
        try:
            with agreeing(self.accelerator):
                if main:
                    self.run.lock()
            seed_all(self.config.seed + self.accelerator.process_index)
            restored = self._restore(accept_changes) if resume else None
            position = restored["progress"]["metrics_bytes"] if restored else 0
            with agreeing(self.accelerator):
                self._log = MetricsLog(self.run, position, self.step) if main else None
            self._say(f"run: {self.run.path}")
            with self._stop:
                self._run_stages(restored)
        finally:
            if self._log is not None:
                self._log.close()
            self.run.unlock()

    def _run_stages(self, restored: dict[str, Any] | None) -> None:
        first = 0
        for stage in self.task.stages:
            last = first + stage.config.steps
            if self.step < last:
                self._run_stage(stage, last, restored if self.step > first else None)
            first = last

    def _run_stage(self, stage: Stage, last: int, restored: dict[str, Any] | None) -> None:
        for module in self.task.modules.values():
            module.eval()
        current = StageRun(stage, self.config, self.accelerator)
        with agreeing(self.accelerator):
            if restored is None:
                self._validate(current)
            else:
                current.load_state_dict(restored, changed=self._changed)
        bar = tqdm(
            total=stage.config.steps,
            initial=current.steps_done,
            desc=stage.name,
            unit="step",
            disable=None if self.accelerator.is_main_process else True,
        )
        with bar:
            for module in stage.modules.values():
                module.train()
            self._clock = time.perf_counter()
            while self.step < last:
                current.step()
                self.step += 1
                bar.update()
                self._after_step(current, bar, ends=self.step == last)

    def _after_step(self, current: StageRun, bar: tqdm, *, ends: bool) -> None:
        def due(every: int) -> bool:
            return ends or self.step % every == 0

        config = self.config
        stop = self._stop.agreed(self.step)
        save = stop or due(config.checkpoint_every)
        if save:
            current.note_bad_weights()
        if save or due(config.log_every):
            self._check_finite(current)
        if due(config.log_every) or due(config.valid_every) or due(config.sample_every):
            means = current.take_means() if due(config.log_every) else None
            with agreeing(self.accelerator):
                if means is not None:
                    self._write_means(current, bar, *means)
                if due(config.valid_every):
                    self._validate(current)
                if due(config.sample_every):
                    self._draw(current)
        if save:
            self._save(current)
        if stop:
            self.accelerator.wait_for_everyone()
            raise TrainingStopped(
                f"stopped by SIGTERM after step {self.step}, which is saved; go on with fastgen "
                f"train --resume {self.run.path}"
            )
        if ends:
            current.adopt_averages()

    def _check_finite(self, current: StageRun) -> None:
        bad = current.first_bad_step()
        if bad is None:
            return
        step = self.step - current.steps_done + bad
        # a list of each process, empty where it has seen nothing bad by then
        names: list[str] = next(filter(None, gather_object([current.bad_tensors(bad)])), [])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        where = ", ".join(names[:_NAMED]) + more or "the loss"
        saved = ckpt.list_checkpoints(self.run.checkpoints)
        last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        remedy = "mend the data" if "of the batch" in where else "lower the learning rate"
        raise NonFiniteLossError(f"NaN or infinity at step {step} in {where}; {last}; {remedy}")

    def _write_means(
        self, current: StageRun, bar: tqdm, means: dict[str, Tensor], steps: int
    ) -> None:
        now = time.perf_counter()
        if self._log is not None:
            values = current.stage.summarise(means)
            rate = steps / (now - self._clock)
            bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            if bar.disable or not sys.stdout.isatty():
                shown = f"{_listed(values)}  {rate:.3g} steps/s"
                self._say(f"step {self.step:>6}  {current.stage.name}  train: {shown}")
            self._log.write(
                self.step, current.stage.name, "train", values | {"steps_per_second": rate}
            )
        self._clock = now

    @contextmanager
    def _evaluating(self, current: StageRun) -> Iterator[dict[str, nn.Module]]:
        """All modules in eval mode, averaged where averages are kept; the clock stands still."""
        started = time.perf_counter()
        modules = self.task.modules | current.best_modules()
        for module in modules.values():
            module.eval()
        with torch.no_grad():
            yield modules
        for module in current.stage.modules.values():
            module.train()
        self._clock += time.perf_counter() - started

    def _validate(self, current: StageRun) -> None:
        if self._log is None:
            return
        with self._evaluating(current) as modules:
            values = current.stage.validate(modules)
        self._log.write(self.step, current.stage.name, "valid", values)
        self._say(f"step {self.step:>6}  {current.stage.name}  valid: {_listed(values)}")

    def _say(self, line: str) -> None:
        """Print a line, by the main process alone, at once also into a file or a pipe."""
        if self.accelerator.is_main_process:
            tqdm.write(line)
            sys.stdout.flush()

    def _draw(self, current: StageRun) -> None:
        if self._log is None:
            return
        with self._evaluating(current) as modules:
            for name, images in current.stage.draw(modules).items():
                self.run.write_samples(f"step-{self.step:08d}-{name}", images)
                self._log.draw(self.step, current.stage.name, name, images)

    def _save(self, current: StageRun) -> None:
        rng = {
            name: self.accelerator.gather(state.to(self.accelerator.device)[None])
            for name, state in get_rng_state(self.accelerator.device).items()
        }
        with agreeing(self.accelerator):
            if self._log is None:
                return
            model = {name: module.state_dict() for name, module in self.task.modules.items()}
            sections = {"model": model, "rng": rng} | current.state_dict()
            sections["origin"] = None if self.origin is None else vars(self.origin)
            sections["progress"]["metrics_bytes"] = self._log.sync()
            ckpt.save_checkpoint(self.run.checkpoints, self.step, sections)
            ckpt.prune_checkpoints(self.run.checkpoints, self.config.keep_checkpoints)

    def _restore(self, accept_changes: bool) -> dict[str, Any] | None:
        """Weights, step and random states of the newest sound checkpoint; None if none was made."""
        with agreeing(self.accelerator):
            if not ckpt.list_checkpoints(self.run.checkpoints):
                self._say("there is no checkpoint yet: from the start")
                return None
            path, sections, problems = ckpt.load_newest(self.run.checkpoints)
        with agreeing(self.accelerator):
            _check_sections(sections, ("model", "averages", "optimizers", "rng", "progress"))
            _check_progress(sections["progress"])
            self.step = ckpt.checkpoint_step(path)
            self._changed = self._compare_origin(sections.get("origin"), accept_changes)
            ended = self._check_position(sections["progress"])
            load_weights(self.task, sections, averaged=ended)
            self._restore_rng(sections["rng"])
            for damaged, problem in problems.items() if self.accelerator.is_main_process else ():
                ckpt.set_aside(damaged)
                self._say(f"warning: {problem}; set aside, going on from {path.name}")
        return sections

    def _compare_origin(self, saved: Any, accept_changes: bool) -> bool:
        """Whether options or data changed since the checkpoint was made.

        Raises:
            RunError: they did, and that is not accepted.
        """
        if self.origin is None:
            return False
        if saved is None:
            self._say("warning: the checkpoint does not say of what options and data it is")
            return False
        changes = self.origin.changes(saved)
        if changes and not accept_changes:
            raise RunError(
                f"{self.run.path} was trained with other options or data: {'; '.join(changes)}; "
                "put them back, or go on all the same with --accept-changes"
            )
        return bool(changes)

    def _check_position(self, progress: dict[str, Any]) -> bool:
        """Whether the checkpoint is of the end of its stage.

        Raises:
            RunError: the stages have other lengths now, so that its step is not of that stage.
        """
        first, done = 0, progress["steps_done"]
        for stage in self.task.stages:
            if stage.name == progress["stage"]:
                break
            first += stage.config.steps
        else:
            known = ", ".join(stage.name for stage in self.task.stages)
            raise CheckpointError(f"progress.stage is {progress['stage']!r}; known: {known}")
        if first + done != self.step:
            raise RunError(
                f"the stages before {stage.name!r} have {first} steps now, but the run passed them "
                f"after {self.step - done}; only the last stage that was begun can be made longer"
            )
        if done > stage.config.steps:
            raise RunError(
                f"stage {stage.name!r} has {stage.config.steps} steps now, but the run has done "
                f"{done}; give it as many or more"
            )
        return done == stage.config.steps

    def _restore_rng(self, states: dict[str, Tensor]) -> None:
        device, processes = self.accelerator.device, self.accelerator.num_processes
        states = _checked_rng(states, device)
        written_by, rank = len(states["torch"]), self.accelerator.process_index
        if written_by != processes:
            self._say(f"warning: the checkpoint is of {written_by} processes: new random states")
            seed_all(self.config.seed + self.step * processes + rank)
            return
        # clone: torch.set_rng_state crashes on a view into a larger tensor
        own = {name: state[rank].clone() for name, state in states.items()}
        try:
            set_rng_state(own, device)
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"section 'rng' of the checkpoint is damaged: {error}") from error


def _listed(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def load_weights(task: Task, sections: dict[str, Any], *, averaged: bool = False) -> None:
    """Put a checkpoint's weights into a task's modules; `averaged`: averages where it has them.

    Raises:
        CheckpointError: the weights are of another model, or not finite.
    """
    try:
        _check_sections(sections, ("model", "averages"))
        states = {name: module.state_dict() for name, module in task.modules.items()}
        ckpt.check_like(sections["model"], states, "model")
        chosen = dict(sections["model"])
        for name, state in sections["averages"].items() if averaged else ():
            own = {key.removeprefix("module."): value for key, value in state.items()}
            own.pop("n_averaged", None)
            ckpt.check_like({name: own}, {name: states.get(name)}, "averages")
            chosen[name] = own
    except CheckpointError as error:
        raise CheckpointError(
            f"the checkpoint does not fit the configured model: {error}"
        ) from error
    for name, module in task.modules.items():
        weights = dict(module.named_parameters())
        ckpt.check_finite({key: chosen[name][key] for key in weights}, f"model.{name}")
        module.load_state_dict(chosen[name])


def _check_sections(sections: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if name not in sections:
            raise CheckpointError(f"section {name!r} is missing in the checkpoint")
        if not isinstance(sections[name], dict):
            raise CheckpointError(f"section {name!r} of the checkpoint is damaged")


def _check_progress(progress: dict[str, Any]) -> None:
    known = {name: value for name, value in progress.items() if name in _PROGRESS}
    ckpt.check_like(known, _PROGRESS, "progress")
    for name, value in known.items():
        if isinstance(value, int) and value < 0:
            raise CheckpointError(f"progress.{name} must not be negative, got {value}")


def _checked_rng(states: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The random states of all processes; a GPU's only where there is one, then and now."""
    own = get_rng_state(device)
    if "cuda" not in own or "cuda" not in states:
        own, states = ({n: s for n, s in each.items() if n != "cuda"} for each in (own, states))
    first = states.get("torch")
    processes = len(first) if isinstance(first, Tensor) and first.ndim else 1
    template = {name: state.expand(processes, *state.shape) for name, state in own.items()}
    ckpt.check_like(states, template, "rng")
    return states
