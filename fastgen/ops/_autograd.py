"""Pieces that the autograd.Function pairs of the ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record: where it need not, the raw op is called without a Function."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic is done in: float32 for half and bfloat16, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def sum_per_sample(t: Tensor) -> Tensor:
    """(B, ...) -> (B,): the sum over every dimension but the first."""
    return t.sum(tuple(range(1, t.dim()))) if t.dim() > 1 else t.clone()


def autocast_promote(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The "promote" autocast policy: under autocast, mixed dtypes become the widest of them.

    Outside autocast nothing is cast, and mixed dtypes are an error of the caller. None stays None.
    """
    given = [t for t in tensors if t is not None]
    if not all(isinstance(t, Tensor) for t in given):
        return tensors
    if not torch.is_autocast_enabled(given[0].device.type):
        return tensors
    widest = given[0].dtype
    for t in given[1:]:
        widest = torch.promote_types(widest, t.dtype)
    return tuple(None if t is None else t.to(widest) for t in tensors)


def reference_vjp(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    primals: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Gradient of an op's gradient, by the op's reference.

    The op's backward computes ``g = J(primals)^T cotangents``. Given `grads`, the cotangents of g
    (None where an output of the backward was not used), this returns the gradients with respect to
    all `primals` and then all `cotangents`. It is made of differentiable torch ops, so any higher
    order follows, and of torch.func transforms, so it also works under them.

    Args:
        reference: the op in plain PyTorch, as a function of the primals only.
        primals: the differentiable inputs of the op.
        cotangents: the gradients of its outputs.
        grads: one entry for each primal.
    """
    single = len(cotangents) == 1

    def backward(*args: Tensor) -> tuple[Tensor, ...]:
        inputs, outputs = args[: len(primals)], args[len(primals) :]
        _, pullback, *_ = torch.func.vjp(reference, *inputs)
        return pullback(outputs[0] if single else outputs)

    result, pullback, *_ = torch.func.vjp(backward, *primals, *cotangents)
    full = tuple(
        torch.zeros_like(r) if g is None else g for r, g in zip(result, grads, strict=True)
    )
    return pullback(full)
