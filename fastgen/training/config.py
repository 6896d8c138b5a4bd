"""Options that all recipes share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from fastgen.training.ranges import BelowOne, Count, Options, Range, Seed, Share, Steps


@dataclass
class EngineConfig(Options):
    """Options common to all recipes.

    Args:
        seed: seed of the initial weights, the order of the data, and all noise.
        init_from: a run folder: start from the weights of its newest checkpoint, the averaged ones
            where it has them; null for random weights.
        cpu: stay on the CPU even where there is a GPU.
        mixed_precision: autocast dtype of the forward pass.
        accumulate: parts that a batch is cut into, to save memory; gradients add up.
        max_grad_norm: clip the gradient's norm; null for none.
        ema_decay: average the weights with this decay a step, at the start of a stage with less,
            (1 + n) / (10 + n) after n steps, and validate, draw and sample with the averages; null
            for none.
        compile: pass the networks through torch.compile.
        log_every: steps between lines of training metrics.
        valid_every: steps between validations.
        sample_every: steps between sample grids.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many checkpoints to keep, the newest ones.
    """

    seed: Seed = 0
    init_from: str | None = None
    cpu: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    accumulate: Count = 1
    max_grad_norm: Annotated[float, Range(0, 10**9, above=True)] | None = None
    ema_decay: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
    compile: bool = False
    log_every: Count = 50
    valid_every: Count = 250
    sample_every: Count = 1000
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2


@dataclass
class OptimizerConfig(Options):
    """AdamW with a linear warm-up and a cosine decay.

    Args:
        lr: peak learning rate.
        betas: decay rates of the two moments.
        weight_decay: decoupled weight decay, on matrices and convolution weights only.
        warmup_steps: steps of linear warm-up.
        final_lr: learning rate at the end, as a share of the peak.
    """

    lr: Annotated[float, Range(0, 100, above=True)] = 1e-3
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    warmup_steps: Steps = 100
    final_lr: Share = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr * self.weight_decay > 1:
            raise ValueError(
                "lr times weight_decay must be at most 1, or a step turns the weights' signs, got "
                f"{self.lr} and {self.weight_decay}"
            )

    def build(self, modules: Iterable[nn.Module]) -> Optimizer:
        """The optimiser over the modules' trainable parameters."""
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # one pass over each tensor; on a CPU the default is a dozen small ops a tensor
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` of `steps`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)
        cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)


@dataclass
class StageConfig(Options):
    """Length, batch and optimiser of a stage.

    Args:
        steps: optimiser steps; 0 skips the stage.
        batch_size: images a step, over all processes and accumulated parts together.
        optimizer: the optimiser.
    """

    steps: Steps = 1000
    batch_size: Count = 128
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
