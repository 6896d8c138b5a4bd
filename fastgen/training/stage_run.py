"""A stage while it trains: data, wrapped networks, optimisers, averaged weights, running means."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from fastgen.data import BatchLoader
from fastgen.random import derive_key
from fastgen.training.checkpoint import check_finite, check_like
from fastgen.training.config import EngineConfig
from fastgen.training.draws import Draws
from fastgen.training.errors import CheckpointError
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
            stage.train_source(),
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
        self._sums_are_restored = False
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
        if self._sums_are_restored:
            check_like(self._sums, logs, "progress.sums")
            self._sums_are_restored = False
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
        """Names of what is not finite: in the batch of a step, in what the losses logged in this
        interval, or, if nothing there, among the weights; none where it was another process's."""
        if int(self._bad_step) != step:
            return []
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

    def load_state_dict(self, sections: dict[str, Any], *, changed: bool = False) -> None:
        """Go on where `state_dict` was taken.

        Args:
            sections: of the checkpoint.
            changed: options or data are others now: those of the optimisers are taken from the
                configuration, the loader goes to the same number of batches, running means and
                averages that were not kept start anew.

        Raises:
            CheckpointError: what is missing, or not what this stage would have written.
        """
        progress = sections["progress"]
        self.steps_done = progress["steps_done"]
        self._load_optimizers(sections["optimizers"], changed)
        self._load_averages(sections["averages"], changed)
        self._load_position(progress.get("loader"), changed)
        if not changed:
            self._load_sums(progress.get("sums"), progress["summed_steps"])
        scaler, saved = self.accelerator.scaler, progress.get("scaler")
        if scaler is not None and saved is not None:
            check_like(saved, scaler.state_dict(), "progress.scaler")
            scaler.load_state_dict(saved)

    def _load_optimizers(self, saved: dict[str, Any], changed: bool) -> None:
        check_like({n: None for n in saved}, {n: None for n in self.optimizers}, "optimizers")
        for name, optimizer in self.optimizers.items():
            own, state = optimizer.state_dict(), saved[name]
            _check_optimizer(state, optimizer, f"optimizers.{name}", changed)
            optimizer.load_state_dict(
                {"state": state["state"], "param_groups": own["param_groups"]} if changed else state
            )

    def _load_averages(self, saved: dict[str, Any], changed: bool) -> None:
        own = {name: average.state_dict() for name, average in self.averages.items()}
        if changed:
            own = {name: state for name, state in own.items() if name in saved}
            saved = {name: saved[name] for name in own}
        check_like(saved, own, "averages")
        for name in own:
            weights = {f"module.{n}" for n, _ in self.averages[name].module.named_parameters()}
            check_finite({key: saved[name][key] for key in weights}, f"averages.{name}")
            self.averages[name].load_state_dict(saved[name])

    def _load_position(self, saved: Any, changed: bool) -> None:
        """A step takes a batch, so that the steps say where the loader is."""
        own = {"batches": self.steps_done}
        saved = own if changed else saved
        check_like(saved, own, "progress.loader")
        if saved != own:
            raise CheckpointError(
                f"progress.loader is {saved}, which is not where {self.steps_done} steps end"
            )
        self.loader.load_state_dict(saved)

    def _load_sums(self, saved: Any, steps: int) -> None:
        if not isinstance(saved, dict) or not all(isinstance(v, Tensor) for v in saved.values()):
            raise CheckpointError("progress.sums must be tensors by name")
        if steps > self.steps_done or bool(saved) != bool(steps):
            raise CheckpointError(
                f"progress.sums has {len(saved)} sums over {steps} of {self.steps_done} steps"
            )
        device = self.accelerator.device
        self._sums = {name: value.to(device) for name, value in saved.items()}
        self._summed_steps, self._sums_are_restored = steps, steps > 0


def _check_optimizer(saved: Any, optimizer: Optimizer, name: str, changed: bool) -> None:
    """Hold an optimiser's state to what it would keep itself: the kernels do not look at sizes."""
    own = optimizer.state_dict()
    kept = _kept_states(optimizer)
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise CheckpointError(f"{name}.state is missing in the checkpoint")
    for index, state in saved["state"].items():
        check_like({index: state}, {i: s for i, s in kept.items() if i == index}, f"{name}.state")
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        # a second moment may have overflown to infinity: its weight stands still then
        bad = {k: v.isnan().any() if v.ndim else ~v.isfinite() for k, v in tensors.items()}
        for key in (key for key, found in bad.items() if found):
            raise CheckpointError(f"{name}.state.{index}.{key} of the checkpoint is not finite")
    if changed:
        return
    groups: Any = saved.get("param_groups")
    check_like(groups, own["param_groups"], f"{name}.param_groups")
    for i, (group, wanted) in enumerate(zip(groups, own["param_groups"], strict=True)):
        if group["params"] != wanted["params"]:
            raise CheckpointError(f"{name}.param_groups.{i}.params are those of another model")


def _kept_states(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """What an optimiser keeps for each parameter, from a step of its twin on zeros; no storage."""
    twin_of = {
        key: value
        for key, value in vars(optimizer).items()
        if key != "step" and not key.startswith("_optimizer_")
    }
    kept: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            zeros = nn.Parameter(torch.zeros_like(parameter))
            zeros.grad = torch.zeros_like(zeros)
            twin = type(optimizer).__new__(type(optimizer))
            own = {"state": defaultdict(dict), "param_groups": [{**group, "params": [zeros]}]}
            twin.__setstate__(twin_of | own)
            twin.step()
            kept[len(kept)] = {
                key: value.to("meta") if isinstance(value, Tensor) else value
                for key, value in twin.state[zeros].items()
            }
    return kept


def warmed_up(decay: float, count: int) -> float:
    """The decay of an average of `count` values so far: lower at first, to forget the start."""
    return min(decay, (1 + count) / (10 + count))


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if not value.isfinite().all()]
