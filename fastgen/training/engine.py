"""The training engine: what every task has in common.

Stages follow each other in one count of steps. After a step come, in this order, its log line,
validation, samples, and last the checkpoint, which therefore covers all of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
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
from fastgen.training.processes import StopRequest
from fastgen.training.rng import get_rng_state, seed_all, set_rng_state
from fastgen.training.run_folder import MetricsLog, RunFolder
from fastgen.training.stage_run import StageRun
from fastgen.training.tasks.base import Stage, Task

_NAMED = 5


class Engine:
    """Trains a task in a run folder.

    Args:
        task: built under `seed_all(config.seed)`, on the CPU.
        config: engine options.
        run: the run folder, created or opened.
        accelerator: from `fastgen.training.processes.make_accelerator`.
    """

    def __init__(self, task: Task, config: EngineConfig, run: RunFolder, accelerator: Accelerator):
        self.task = task
        self.config = config
        self.run = run
        self.accelerator = accelerator
        self.step = 0
        self._clock = 0.0
        self._stop = StopRequest(accelerator)
        self._log: MetricsLog | None = None
        for module in task.modules.values():
            module.to(accelerator.device)

    def train(self, *, resume: bool = False) -> None:
        """Train all stages to their end, from the newest sound checkpoint if `resume`.

        SIGTERM ends it early: after the step, with a checkpoint.

        Raises:
            NonFiniteLossError: the loss or a weight is NaN or infinite; no checkpoint has it.
            TrainingStopped: SIGTERM came.
            CheckpointError: no sound checkpoint although there are some, or one cannot be written.
            RunError: the run folder is in use or cannot be written.
        """
        main = self.accelerator.is_main_process
        if main:
            self.run.lock()
        try:
            seed_all(self.config.seed + self.accelerator.process_index)
            restored = self._restore() if resume else None
            position = restored["progress"]["metrics_bytes"] if restored else 0
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
        if restored is None:
            self._validate(current)
        else:
            current.load_state_dict(restored)
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
        if due(config.log_every):
            self._write_means(current, bar)
        if ends:
            current.adopt_averages()
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

    def _check_finite(self, current: StageRun) -> None:
        bad = current.first_bad_step()
        if bad is None:
            return
        step = self.step - current.steps_done + bad
        names = current.bad_tensors(bad)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        where = ", ".join(names[:_NAMED]) + more or "a tensor of another process"
        saved = ckpt.list_checkpoints(self.run.checkpoints)
        last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        remedy = "mend the data" if "of the batch" in where else "lower the learning rate"
        raise NonFiniteLossError(f"NaN or infinity at step {step} in {where}; {last}; {remedy}")

    def _write_means(self, current: StageRun, bar: tqdm) -> None:
        means, steps = current.take_means()
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
        if self._log is None:
            return
        model = {name: module.state_dict() for name, module in self.task.modules.items()}
        sections = {"model": model, "rng": rng} | current.state_dict()
        sections["progress"]["metrics_bytes"] = self._log.sync()
        ckpt.save_checkpoint(self.run.checkpoints, self.step, sections)
        ckpt.prune_checkpoints(self.run.checkpoints, self.config.keep_checkpoints)

    def _restore(self) -> dict[str, Any] | None:
        """Weights, step and random states of the newest sound checkpoint; None if none was made."""
        if not ckpt.list_checkpoints(self.run.checkpoints):
            return None
        path, sections, problems = ckpt.load_newest(self.run.checkpoints)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for damaged, problem in problems.items():
                damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
                tqdm.write(f"warning: {problem}; set aside, going on from {path.name}")
        load_weights(self.task, sections)
        self.step = ckpt.checkpoint_step(path)
        if self.step > self.task.total_steps:
            raise RunError(f"{path} is beyond the configured {self.task.total_steps} steps")
        self._restore_rng(sections["rng"])
        return sections

    def _restore_rng(self, states: dict[str, Tensor]) -> None:
        rank = self.accelerator.process_index
        written_by = len(states["torch"])
        if written_by != self.accelerator.num_processes:
            tqdm.write(f"warning: the checkpoint is of {written_by} processes: new random states")
            seed_all(self.config.seed + self.step * self.accelerator.num_processes + rank)
            return
        # clone: torch.set_rng_state crashes on a view into a larger tensor
        own = {name: state[rank].clone() for name, state in states.items()}
        set_rng_state(own, self.accelerator.device)


def _listed(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def load_weights(task: Task, sections: dict[str, Any], *, averaged: bool = False) -> None:
    """Put a checkpoint's weights into a task's modules; `averaged`: averages where it has them.

    Raises:
        CheckpointError: the weights are of another model.
    """
    try:
        for name, module in task.modules.items():
            module.load_state_dict(sections["model"][name])
        for name, state in sections["averages"].items() if averaged else ():
            own = {key.removeprefix("module."): value for key, value in state.items()}
            del own["n_averaged"]
            task.modules[name].load_state_dict(own)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint does not fit the configured model: {reason}"
        ) from error
