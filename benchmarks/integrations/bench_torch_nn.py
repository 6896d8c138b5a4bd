"""torch.nn: CycleGAN's generator (Zhu et al. 2017, section 7.2: nine residual blocks), whole and
its instance norms alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.integrations.case import patched_case
from benchmarks.models.case import ModelCase, Training


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def generator(width: int = 64, blocks: int = 9) -> nn.Sequential:
    """From (B, 3, H, W) to the same."""

    def norm(channels: int) -> list[nn.Module]:
        return [nn.InstanceNorm2d(channels), nn.ReLU(True)]

    wide = 4 * width
    return nn.Sequential(
        nn.ReflectionPad2d(3),
        nn.Conv2d(3, width, 7),
        *norm(width),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        *norm(2 * width),
        nn.Conv2d(2 * width, wide, 3, stride=2, padding=1),
        *norm(wide),
        *(Residual(wide) for _ in range(blocks)),
        nn.ConvTranspose2d(wide, 2 * width, 3, stride=2, padding=1, output_padding=1),
        *norm(2 * width),
        nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1),
        *norm(width),
        nn.ReflectionPad2d(3),
        nn.Conv2d(width, 3, 7),
        nn.Tanh(),
    )


def _generator(side: int) -> Training:
    model = generator()
    return Training(model, (torch.rand(1, 3, side, side),), lambda x: (model(x) - x).abs().mean())


class _Sink(torch.autograd.Function):
    """A loss whose gradients are given, so that nothing beside the norms is timed."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return start.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient, None, *ctx.gradients


class Norms(nn.Module):
    """The norms of a generator, each on the input that it has there."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.ones(()))
        self.norms = nn.ModuleList(m for m in model.modules() if isinstance(m, nn.InstanceNorm2d))
        self.inputs: list[Tensor] = []
        hooks = [n.register_forward_pre_hook(self._keep) for n in self.norms]
        with torch.no_grad():
            model(x)
        for hook in hooks:
            hook.remove()
        self.gradients = [torch.randn_like(x) for x in self.inputs]

    def _keep(self, norm: nn.Module, args: tuple[Tensor]) -> None:
        self.inputs.append(args[0].clone().requires_grad_())

    def forward(self) -> Tensor:
        for x in self.inputs:
            x.grad = None
        outputs = [norm(x) for norm, x in zip(self.norms, self.inputs, strict=True)]
        return _Sink.apply(self.start, self.gradients, *outputs)


def _norms(side: int) -> Training:
    model = Norms(generator(), torch.rand(1, 3, side, side))
    return Training(model, (), model)


def _cases(side: int) -> list[ModelCase]:
    size = f"{side}x{side}, B=1"
    return [
        patched_case("torch_nn", "torch", f"CycleGAN generator {size}", partial(_generator, side)),
        patched_case("torch_nn", "torch", f"its norms alone {size}", partial(_norms, side)),
    ]


CASES = [*_cases(128), *_cases(256)]
