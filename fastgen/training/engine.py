"""The training engine: what every task has in common.

One step of the run counter is one optimiser step of every phase of the current stage; stages follow
each other in one count. After a step come, in this order, its log line, validation, samples, and
last the checkpoint, which therefore covers all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fastgen.data import BatchLoader
from fastgen.training import checkpoint as ckpt
from fastgen.training.config import EngineConfig
from fastgen.training.errors import CheckpointError, NonFiniteLossError, RunError
from fastgen.training.rng import get_rng_state, seed_all, set_rng_state
from fastgen.training.run_folder import MetricsLog, RunFolder
from fastgen.training.tasks.base import Batch, Stage, Task


def make_accelerator(config: EngineConfig) -> Accelerator:
    """The process group and device that the launcher and `config` ask for."""
    return Accelerator(cpu=config.cpu, mixed_precision=config.mixed_precision)


class Engine:
    """Trains a task in a run folder.

    Args:
        task: built under `seed_all(config.seed)`, on the CPU.
        config: engine options.
        run: the run folder, created or opened.
        accelerator: from `make_accelerator`.
    """

    def __init__(self, task: Task, config: EngineConfig, run: RunFolder, accelerator: Accelerator):
        self.task = task
        self.config = config
        self.run = run
        self.accelerator = accelerator
        self.step = 0
        self._clock = 0.0
        for module in task.modules.values():
            module.to(accelerator.device)

    def train(self, *, resume: bool = False) -> None:
        """Train all stages to their end, from the newest sound checkpoint if `resume`.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
            CheckpointError: no sound checkpoint although there are some, or one cannot be written.
            RunError: the run folder is in use or cannot be written.
        """
        if self.accelerator.is_main_process:
            self.run.lock()
        try:
            seed_all(self.config.seed + self.accelerator.process_index)
            restored = self._restore() if resume else None
            position = restored["progress"]["metrics_bytes"] if restored else 0
            self._log = (
                MetricsLog(self.run, position, self.step)
                if self.accelerator.is_main_process
                else None
            )
            try:
                self._run_stages(restored)
            finally:
                if self._log is not None:
                    self._log.close()
        finally:
            self.run.unlock()

    def _run_stages(self, restored: dict[str, Any] | None) -> None:
        first = 0
        for stage in self.task.stages:
            last = first + stage.config.steps
            if self.step < last:
                self._run_stage(stage, first, last, restored if self.step > first else None)
            first = last

    def _run_stage(
        self, stage: Stage, first: int, last: int, restored: dict[str, Any] | None
    ) -> None:
        self._begin(stage, first)
        if restored is None:
            self._validate(stage)
        else:
            self._restore_stage(restored)
        bar = tqdm(
            total=stage.config.steps,
            initial=self.step - first,
            desc=stage.name,
            unit="step",
            disable=None if self.accelerator.is_main_process else True,
        )
        with bar:
            self._clock = time.perf_counter()
            while self.step < last:
                self._train_step(stage)
                bar.update()
                self._after_step(stage, bar, last)

    def _begin(self, stage: Stage, first: int) -> None:
        accelerator = self.accelerator
        for module in self.task.modules.values():
            module.eval()
        self._first = first
        self._loader = BatchLoader(
            stage.train_tensors(),
            stage.config.batch_size,
            seed=self.config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=accelerator.device,
        )
        self._averages = {}
        if self.config.ema_decay is not None:
            average = get_ema_multi_avg_fn(self.config.ema_decay)
            for name, module in stage.modules.items():
                self._averages[name] = AveragedModel(module, multi_avg_fn=average)
        self._optimizers = stage.optimizers()
        self._steppers = {name: accelerator.prepare(opt) for name, opt in self._optimizers.items()}
        self._wrapped = {
            name: accelerator.prepare(module) for name, module in stage.modules.items()
        }
        self._nets = {
            name: torch.compile(net) if self.config.compile else net
            for name, net in self._wrapped.items()
        }
        self._interval: dict[str, Tensor] = {}
        self._interval_steps = 0
        self._bad_step = torch.tensor(-1, device=accelerator.device)

    def _train_step(self, stage: Stage) -> None:
        for module in stage.modules.values():
            module.train()
        batch = self._loader.next_batch()
        logs: dict[str, Tensor] = {}
        for phase, stepper in self._steppers.items():
            for group in self._optimizers[phase].param_groups:
                group["lr"] = stage.lr(self.step - self._first)
            self._phase(stage, phase, stepper, batch, logs)
        self.step += 1
        for name, module in stage.modules.items():
            module.eval()
            if name in self._averages:
                self._averages[name].update_parameters(module)
        for name, value in logs.items():
            self._interval[name] = self._interval[name] + value if name in self._interval else value
        self._interval_steps += 1

    def _phase(
        self, stage: Stage, phase: str, stepper: Optimizer, batch: Batch, logs: dict[str, Tensor]
    ) -> None:
        parts = self._cut(batch)
        for i, part in enumerate(parts):
            with ExitStack() as stack:
                if i < len(parts) - 1:
                    for net in self._wrapped.values():
                        stack.enter_context(self.accelerator.no_sync(net))
                loss, values = stage.loss(phase, self._nets, part)
                self.accelerator.backward(loss / len(parts))
            failed = (self._bad_step < 0) & ~loss.detach().isfinite()
            self._bad_step = torch.where(failed, self.step + 1, self._bad_step)
            for name, value in values.items():
                share = value.detach().float() / len(parts)
                logs[name] = logs[name] + share if name in logs else share
        if self.config.max_grad_norm is not None:
            parameters = [
                p for group in self._optimizers[phase].param_groups for p in group["params"]
            ]
            self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        stepper.step()
        stepper.zero_grad()

    def _cut(self, batch: Batch) -> list[Batch]:
        count = self.config.accumulate
        if count == 1:
            return [batch]
        pieces = {key: value.chunk(count) for key, value in batch.items()}
        return [{key: value[i] for key, value in pieces.items()} for i in range(count)]

    def _after_step(self, stage: Stage, bar: tqdm, last: int) -> None:
        config, ends = self.config, self.step == last

        def due(every: int) -> bool:
            return ends or self.step % every == 0

        if due(config.log_every) or due(config.checkpoint_every):
            self._check_finite()
        if due(config.log_every):
            self._write_interval(stage, bar)
        if ends:
            self._adopt_averages(stage)
        if due(config.valid_every):
            self._validate(stage)
        if due(config.sample_every):
            self._draw(stage)
        if due(config.checkpoint_every):
            self._save(stage)

    def _check_finite(self) -> None:
        bad = [int(step) for step in self.accelerator.gather(self._bad_step[None]) if step >= 0]
        if bad:
            saved = ckpt.list_checkpoints(self.run.checkpoints)
            last = (
                f"the last good checkpoint is {saved[-1]}"
                if saved
                else "there is no checkpoint yet"
            )
            raise NonFiniteLossError(
                f"the loss is NaN or infinite at step {min(bad)}; {last}; lower the learning rate"
            )

    def _write_interval(self, stage: Stage, bar: tqdm) -> None:
        means = {name: value / self._interval_steps for name, value in self._interval.items()}
        means = {name: self.accelerator.reduce(value, "mean") for name, value in means.items()}
        now = time.perf_counter()
        if self._log is not None:
            values = stage.summarise(means)
            bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            speed = {"steps_per_second": self._interval_steps / (now - self._clock)}
            self._log.write(self.step, stage.name, "train", values | speed)
        self._interval, self._interval_steps, self._clock = {}, 0, now

    @contextmanager
    def _evaluating(self, stage: Stage) -> Iterator[dict[str, nn.Module]]:
        modules = dict(self.task.modules) | {n: a.module for n, a in self._averages.items()}
        for module in modules.values():
            module.eval()
        started = time.perf_counter()
        with torch.no_grad():
            yield modules
        self._clock += time.perf_counter() - started

    def _validate(self, stage: Stage) -> None:
        if self._log is None:
            return
        with self._evaluating(stage) as modules:
            values = stage.validate(modules)
        self._log.write(self.step, stage.name, "valid", values)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        tqdm.write(f"step {self.step:>6}  {stage.name}  valid: {shown}")

    def _draw(self, stage: Stage) -> None:
        if self._log is None:
            return
        with self._evaluating(stage) as modules:
            for name, images in stage.draw(modules).items():
                self.run.write_samples(f"step-{self.step:08d}-{name}", images)
                self._log.draw(self.step, stage.name, name, images)

    def _adopt_averages(self, stage: Stage) -> None:
        """The averaged weights are the stage's result: later stages build on them."""
        for name, average in self._averages.items():
            stage.modules[name].load_state_dict(average.module.state_dict())
        self._averages = {}

    def _save(self, stage: Stage) -> None:
        rng = get_rng_state(self.accelerator.device)
        rng = {
            name: self.accelerator.gather(value.to(self.accelerator.device)[None])
            for name, value in rng.items()
        }
        if self._log is None:
            return
        scaler = self.accelerator.scaler
        sections = {
            "model": {name: module.state_dict() for name, module in self.task.modules.items()},
            "averages": {name: average.state_dict() for name, average in self._averages.items()},
            "optimizers": {
                name: optimizer.state_dict() for name, optimizer in self._optimizers.items()
            },
            "rng": rng,
            "progress": {
                "stage": stage.name,
                "loader": self._loader.state_dict(),
                "interval": self._interval,
                "interval_steps": self._interval_steps,
                "scaler": None if scaler is None else scaler.state_dict(),
                "metrics_bytes": self._log.sync(),
            },
        }
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
        set_rng_state(
            {name: value[rank] for name, value in states.items()}, self.accelerator.device
        )

    def _restore_stage(self, sections: dict[str, Any]) -> None:
        progress = sections["progress"]
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(sections["optimizers"][name])
        for name, average in self._averages.items():
            average.load_state_dict(sections["averages"][name])
        self._loader.load_state_dict(progress["loader"])
        device = self.accelerator.device
        self._interval = {name: value.to(device) for name, value in progress["interval"].items()}
        self._interval_steps = progress["interval_steps"]
        if self.accelerator.scaler is not None and progress["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(progress["scaler"])


def load_weights(task: Task, sections: dict[str, Any], *, averaged: bool = False) -> None:
    """Put a checkpoint's weights into a task's modules; `averaged`: averages where it has them.

    Raises:
        CheckpointError: the weights are of another model.
    """
    try:
        for name, module in task.modules.items():
            module.load_state_dict(sections["model"][name])
        for name, state in sections["averages"].items() if averaged else ():
            state = {
                key.removeprefix("module."): value
                for key, value in state.items()
                if key != "n_averaged"
            }
            task.modules[name].load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint does not fit the configured model: {reason}"
        ) from error
