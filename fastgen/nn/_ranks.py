"""Sums and means over the processes that train together, where there are several."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

__all__ = ["gather", "mean", "shared"]


def shared(sync: bool = True) -> bool:
    """Whether there are several ranks to share values with, and `sync` wants that."""
    return sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def mean(value: Tensor) -> Tensor:
    """The mean over ranks, without a gradient; `value` itself where there is one rank."""
    if not shared():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gather(value: Tensor) -> Tensor:
    """What each rank gave, (ranks, ...), of a shape that all have; differentiable, of any order.

    Its gradient is that of the sum of what all ranks compute from it, so that
    DistributedDataParallel, which averages gradients, gives that of the mean of the ranks' losses.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    others = torch.zeros_like(value)
    return _Sum.apply(torch.stack([value if i == rank else others for i in range(world)]))


class _Sum(Function):
    """The sum over ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Sum.apply(grad)
