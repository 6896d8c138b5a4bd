"""What the coupling layers of several libraries share: our op as plain PyTorch would take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.integrations._calls import in_forward_mode
from fastgen.ops._check import FLOATS

__all__ = ["Given", "affine", "reason_against"]


class Given:
    """Stands for a module in its library's code, with what some of its parts give known already.

    So that code can still run where only a conditioner's output shows that it must, and the
    conditioner, which may draw dropout or count batches, is not called twice.
    """

    def __init__(self, module: nn.Module, **outputs: Tensor) -> None:
        self._module = module
        self._outputs = outputs

    def __getattr__(self, name: str) -> Any:
        if name in self._outputs:
            return lambda *_: self._outputs[name]
        return getattr(self._module, name)


def reason_against(x: Tensor, *parameters: Tensor) -> str | None:
    """Why our ops cannot transform x by parameters that ought to have its shape, or None."""
    if in_forward_mode():
        return "forward-mode differentiation"
    for t in (x, *parameters):
        if t.dtype not in FLOATS:
            return f"dtype {t.dtype}"
        if t.shape != x.shape:
            return f"parameters of shape {tuple(t.shape)} for an input of shape {tuple(x.shape)}"
    return None


def affine(x: Tensor, raw_scale: Tensor, shift: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """ops.affine_coupling with PyTorch's promotion of dtypes, and log_det in the dtype of y.

    Autocast leaves sums in float32, and so log_det there.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, raw_scale.dtype), shift.dtype)
    y, log_det = ops.affine_coupling(x.to(dtype), raw_scale.to(dtype), shift.to(dtype), **options)
    return y, log_det if torch.is_autocast_enabled(x.device.type) else log_det.to(dtype)
