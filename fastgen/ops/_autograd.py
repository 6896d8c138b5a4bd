"""Pieces that the autograd.Function pairs of the ops share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as functorch_active
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    unwrap_if_dead,
)
from torch.autograd import Function, forward_ad

from fastgen.ops._check import FLOATS


class Fused(Function):
    """An autograd.Function that torch.func and torch.compile can take in any order.

    Subclasses have ``forward(*args)``, ``setup_context`` and ``backward``, all static; the raw
    operators that these call have fake kernels and vmap rules.
    """

    generate_vmap_rule = True

    #: Every subclass by its key.
    functions: ClassVar[dict[str, type[Fused]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        key = f"{cls.__module__}.{cls.__qualname__}"
        Fused.functions[key] = cls
        cls.key = staticmethod(lambda: key)  # type: ignore[method-assign]

    @staticmethod
    def key() -> str:
        """The name that a compiled graph calls it by; Dynamo reads no other attribute of it."""
        raise NotImplementedError


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must see the call: to record it, or to refuse it in forward mode."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
        if functorch_active() and (torch.compiler.is_compiling() or _hides_grad(tensors)):
            return True
    return forward_ad._current_level >= 0


def _hides_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether one of them wraps a tensor that requires grad, as the slices that vmap gives may.

    Such a wrapper does not require grad itself: an outer transform, or autograd, records below it.
    Not for Dynamo, which cannot unwrap.
    """
    for t in tensors:
        while t is not None and is_functorch_wrapped_tensor(t):
            t = get_unwrapped(t)
            if t.requires_grad:
                return True
    return False


def is_batched(t: Tensor) -> bool:
    """Whether torch.vmap made it, at any depth of transforms: it then has no values to read."""
    while functorch_active() and is_functorch_wrapped_tensor(t):
        if is_batchedtensor(t):
            return True
        t = get_unwrapped(t)
    return False


def apply(function: type[Fused], *args: Any) -> Any:
    """``function.apply(*args)``, without what only torch.func needs where that is not active.

    `apply` first binds the arguments to the signature of ``forward``, in Python, which costs more
    than a small kernel does; its C++ base class runs ``forward`` and ``setup_context`` as well.
    """
    if torch.compiler.is_compiling():
        if functorch_active():
            # Imports Dynamo; only what Dynamo traces comes here.
            from fastgen.ops import _in_graph

            return _in_graph.apply(function.key(), *args)
        return function.apply(*args)
    if functorch_active():
        return function.apply(*args)
    alive = [unwrap_if_dead(arg) if isinstance(arg, Tensor) else arg for arg in args]
    return super(Function, function).apply(*alive)  # type: ignore[misc]


def run(
    function: type[Fused],
    raw: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    *options: Any,
) -> Any:
    """`function` of the tensors and options, or the `raw` operator where nothing is recorded."""
    if needs_grad(*tensors):
        return apply(function, *tensors, *options)
    return raw(*tensors, *options)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic is done in: float32 for half and bfloat16, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def sum_per_sample(t: Tensor) -> Tensor:
    """(B, ...) -> (B,): the sum over every dimension but the first."""
    return t.sum(tuple(range(1, t.dim()))) if t.dim() > 1 else t.clone()


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for such a device; for meta tensors there is none to ask."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Turns autocast off for such a device."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_promote(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The "promote" autocast policy: under autocast, mixed dtypes become the widest of them.

    Outside autocast nothing is cast, and mixed dtypes are an error of the caller. None stays None.
    Nor is anything cast where one is not floating, which the caller then names.
    """
    first, *others = tensors
    if not isinstance(first, Tensor):
        return tensors
    widest, mixed = first.dtype, False
    for t in others:
        if t is None:
            continue
        if not isinstance(t, Tensor):
            return tensors
        if t.dtype != widest:
            if t.dtype not in FLOATS or widest not in FLOATS:
                return tensors
            widest, mixed = torch.promote_types(widest, t.dtype), True
    if not mixed or not under_autocast(first.device):
        return tensors
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
