"""A copy that no compiler removes, for values that are overwritten before backward needs them.

Inductor takes `x.clone()` for a no-op and saves x itself for backward; where x is a buffer that the
same graph updates in place, backward would then read the updated values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.ops import _library
from fastgen.ops._autograd import Fused, run

_copy = _library.define("snapshot(Tensor x) -> Tensor")
_library.LIBRARY.impl("snapshot", torch.clone, "CompositeExplicitAutograd")


@_library.register_fake("snapshot")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _vmap(info: Any, in_dims: tuple, x: Tensor) -> tuple:
    return _copy(x), in_dims[0]


torch.library.register_vmap("fastgen::snapshot", _vmap, lib=_library.LIBRARY)


class _Snapshot(Fused):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _copy(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        # Zeros in place of no gradient would let an optimizer decay x.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad


def snapshot(x: Tensor) -> Tensor:
    """A copy of x, any shape and dtype, that also holds inside compiled graphs; differentiable."""
    return run(_Snapshot, _copy, (x,))
