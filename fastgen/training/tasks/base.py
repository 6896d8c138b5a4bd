"""What the engine asks of a task: stages of optimisation, then samples and a verdict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastgen.data import Batch, Source
from fastgen.training.config import StageConfig
from fastgen.training.draws import Draws

Nets = Mapping[str, Callable[..., Any]]


class PhaseLoss(NamedTuple):
    """The scalar to minimise, and tensors of fixed shape to average over the logging interval."""

    loss: Tensor
    logs: dict[str, Tensor]


class Stage(ABC):
    """One optimisation: which weights move, by which losses, and what to report.

    A step runs every phase once: one for an autoencoder, discriminator and generator for a GAN.

    Attributes:
        name: in logs and file names.
        config: length, batch size, optimiser.
        modules: the modules trained here, keys of the task's own.
        averaged: names of those whose weights `engine.ema_decay` averages; None for all.
        rows_together: rows that the loss compares with each other: several processes get whole
            groups of so many.
        steps_done: steps before the current one; the engine keeps it.
    """

    name: str
    config: StageConfig
    modules: dict[str, nn.Module]
    averaged: Collection[str] | None = None
    rows_together: int = 1
    steps_done: int = 0

    @abstractmethod
    def train_source(self) -> Source | Sequence[Source]:
        """The training data; called once, when the stage begins.

        A batch has rows of each, of several sources: theirs are names of their own.
        """

    def optimizers(self) -> dict[str, Optimizer]:
        """Phase -> its optimiser, in the order of a step."""
        return {self.name: self.config.optimizer.build(self.modules.values())}

    def lr(self, step: int) -> float:
        """Learning rate of the stage's step `step`, of all phases."""
        return self.config.optimizer.lr_at(step, self.config.steps)

    @abstractmethod
    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws) -> PhaseLoss:
        """The loss of a phase, to be averaged over equal parts of the joint batch.

        Several processes train as one on their joint batch if what is random comes from `draws`
        (noise, timesteps, masks) or from `fastgen.nn.Dropout`, and not from torch's own generators,
        which differ from process to process; and if the loss is a mean over rows. What it takes
        from the batch otherwise must be of all processes, as the statistics of a `FlowBatchNorm`
        and of an EMA codebook are, or of rows that lie together, `rows_together`.

        Args:
            phase: one of `optimizers`.
            nets: `modules` as wrapped for DDP, autocast and compile.
            batch: a part of the joint batch, its rows on the device.
            draws: random numbers for those rows, a function of seed, stage, phase, step and row.
        """

    @abstractmethod
    def summarise(self, logs: dict[str, Tensor]) -> dict[str, float]:
        """Numbers to report from the averages of `PhaseLoss.logs` over an interval."""

    @abstractmethod
    def validate(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """Numbers on the validation split; `modules` are in eval mode, averaged where they are."""

    @abstractmethod
    def draw(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Name -> images (N, C, H, W) to look at; must not touch the global generators."""


class Task(ABC):
    """A model family with its recipe.

    Attributes:
        modules: all modules of the task, by name: what a checkpoint holds.
        stages: in the order of training.
        dataset: what it was built for, with the splits train, valid and test.
    """

    modules: dict[str, nn.Module]
    stages: list[Stage]
    dataset: Any

    @abstractmethod
    def sample(
        self, num: int, *, labels: Tensor | None, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """Images (num, C, H, W) from the trained model."""

    @abstractmethod
    def evaluate(self) -> dict[str, dict[str, float]]:
        """Split -> measure -> value, on the held-out splits."""

    @property
    def total_steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.config.steps for stage in self.stages)
