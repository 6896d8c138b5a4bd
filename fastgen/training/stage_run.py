"""A stage while it trains: data, wrapped networks, optimisers, averaged weights, running means."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastgen.data import BatchLoader
from fastgen.random import derive_key
from fastgen.training.config import EngineConfig
from fastgen.training.draws import Draws
from fastgen.training.tasks.base import Batch, Stage


class StageRun:
    """Takes the steps of a stage.

    Args:
        stage: the stage; its modules are on the accelerator's device.
        config: engine options.
        accelerator: wraps networks and optimisers.
    """

    def __init__(self, stage: Stage, config: EngineConfig, accelerator: Accelerator):
        self.stage = stage
        self.config = config
        self.accelerator = accelerator
        self.steps_done = 0
        self.loader = BatchLoader(
            stage.train_tensors(),
            stage.config.batch_size,
            seed=config.seed,
            parts=config.accumulate,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=accelerator.device,
        )
        self.averages = self._start_averages()
        self.optimizers = stage.optimizers()
        wrapped = accelerator.prepare(*stage.modules.values(), *self.optimizers.values())
        wrapped = wrapped if isinstance(wrapped, tuple) else (wrapped,)
        count = len(stage.modules)
        self._wrapped = dict(zip(stage.modules, wrapped[:count], strict=True))
        self._steppers = dict(zip(self.optimizers, wrapped[count:], strict=True))
        self._nets = {
            name: torch.compile(net) if config.compile else net
            for name, net in self._wrapped.items()
        }
        self._sums: dict[str, Tensor] = {}
        self._summed_steps = 0
        self._bad_step = torch.tensor(-1, device=accelerator.device)

    def _start_averages(self) -> dict[str, AveragedModel]:
        if self.config.ema_decay is None:
            return {}
        decay = self.config.ema_decay

        def average(averages: Any, weights: Any, _: object) -> None:
            # the count that torch gives is on the device, which would have to be waited for
            before = self.steps_done - 1
            torch._foreach_lerp_(averages, weights, 1 - warmed_up(decay, before))

        wanted = self.stage.averaged
        return {
            name: AveragedModel(module, multi_avg_fn=average)
            for name, module in self.stage.modules.items()
            if wanted is None or name in wanted
        }

    def step(self) -> None:
        """One optimiser step of every phase, on one batch."""
        batch = self.loader.next_batch()
        self.stage.steps_done = self.steps_done
        logs: dict[str, Tensor] = {}
        for phase in self.optimizers:
            for name, value in self._phase(phase, batch).items():
                logs[name] = logs[name] + value if name in logs else value
        self.steps_done += 1
        for name, average in self.averages.items():
            average.update_parameters(self.stage.modules[name])
        for name, value in logs.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._summed_steps += 1

    def _phase(self, phase: str, batch: Batch) -> dict[str, Tensor]:
        optimizer = self.optimizers[phase]
        for group in optimizer.param_groups:
            group["lr"] = self.stage.lr(self.steps_done)
        logs: dict[str, Tensor] = {}
        key = self._key(phase)
        parts = self._cut(batch)
        for i, part in enumerate(parts):
            count = len(next(iter(part.values())))
            draws = Draws(count, key, self.loader.first_rows[i])
            found = self._backward(phase, part, draws, last=i == len(parts) - 1)
            for name, value in found.items():
                logs[name] = logs[name] + value if name in logs else value
        if self.config.max_grad_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self._steppers[phase].step()
        # all of them: a generator's phase also leaves gradients in the discriminator
        for stepper in self._steppers.values():
            stepper.zero_grad()
        return logs

    def _key(self, phase: str) -> Tensor:
        """Of what a phase draws in this step: nothing of it need be in a checkpoint."""
        number = zlib.crc32(f"{self.stage.name}/{phase}".encode())
        seed, device = self.config.seed, self.accelerator.device
        return derive_key(seed, number, self.steps_done, device=device)

    def _backward(self, phase: str, part: Batch, draws: Draws, *, last: bool) -> dict[str, Tensor]:
        """Add a part's gradients; those of the last part are averaged over the processes."""
        share = 1 / self.config.accumulate
        with ExitStack() as stack:
            stack.enter_context(draws.dropout(self.stage.modules.values()))
            for net in self._wrapped.values() if not last else ():
                stack.enter_context(self.accelerator.no_sync(net))
            loss, logs = self.stage.loss(phase, self._nets, part, draws)
            self.accelerator.backward(loss * share)
        failed = (self._bad_step < 0) & ~loss.detach().isfinite()
        self._bad_step = torch.where(failed, self.steps_done + 1, self._bad_step)
        return {name: value.detach().float() * share for name, value in logs.items()}

    def _cut(self, batch: Batch) -> list[Batch]:
        count = self.config.accumulate
        pieces = {key: value.chunk(count) for key, value in batch.items()}
        return [{key: value[i] for key, value in pieces.items()} for i in range(count)]

    def first_bad_step(self) -> int | None:
        """The first step of this stage whose loss was not finite on any process, or None."""
        steps = self.accelerator.gather(self._bad_step[None])
        return min((int(step) for step in steps if step >= 0), default=None)

    def note_bad_weights(self) -> None:
        """Count the last step as bad if it left a weight that is not finite: its loss may be."""
        weights = [p for module in self.stage.modules.values() for p in module.parameters()]
        bad = ~torch.stack([p.detach().isfinite().all() for p in weights]).all()
        failed = (self._bad_step < 0) & bad
        self._bad_step = torch.where(failed, self.steps_done, self._bad_step)

    def bad_tensors(self, step: int) -> list[str]:
        """Names of what is not finite, here: in the batch of a step, in what the losses logged in
        this interval, or, if nothing there, among the weights."""
        batch = self.loader.batch_of(step - 1)
        names = [f"{name} of the batch" for name in _not_finite(batch)] + _not_finite(self._sums)
        modules = self.stage.modules.items()
        return names or [
            f"{m}.{name}" for m, net in modules for name in _not_finite(net.state_dict())
        ]

    def take_means(self) -> tuple[dict[str, Tensor], int]:
        """Means of what the losses logged since the last call, over all processes; the steps."""
        steps, sums = self._summed_steps, self._sums
        self._sums, self._summed_steps = {}, 0
        means = {n: self.accelerator.reduce(v / steps, "mean") for n, v in sums.items()}
        return means, steps

    def best_modules(self) -> dict[str, nn.Module]:
        """The stage's modules, averaged where averages are kept."""
        return self.stage.modules | {name: a.module for name, a in self.averages.items()}

    def adopt_averages(self) -> None:
        """Make the averaged weights the modules' own, and stop averaging."""
        for name, average in self.averages.items():
            self.stage.modules[name].load_state_dict(average.module.state_dict())
        self.averages = {}

    def state_dict(self) -> dict[str, Any]:
        """All but the modules' weights: sections of a checkpoint."""
        scaler = self.accelerator.scaler
        return {
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers.items()},
            "progress": {
                "stage": self.stage.name,
                "steps_done": self.steps_done,
                "loader": self.loader.state_dict(),
                "sums": self._sums,
                "summed_steps": self._summed_steps,
                "scaler": None if scaler is None else scaler.state_dict(),
            },
        }

    def load_state_dict(self, sections: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(sections["optimizers"][name])
        for name, average in self.averages.items():
            average.load_state_dict(sections["averages"][name])
        progress = sections["progress"]
        self.steps_done = progress["steps_done"]
        self.loader.load_state_dict(progress["loader"])
        device = self.accelerator.device
        self._sums = {name: value.to(device) for name, value in progress["sums"].items()}
        self._summed_steps = progress["summed_steps"]
        if self.accelerator.scaler is not None and progress["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(progress["scaler"])


def warmed_up(decay: float, count: int) -> float:
    """The decay of an average of `count` values so far: lower at first, to forget the start."""
    return min(decay, (1 + count) / (10 + count))


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if not value.isfinite().all()]
