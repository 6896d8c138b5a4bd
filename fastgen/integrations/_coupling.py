"""What the coupling layers of several libraries share: our op as plain PyTorch would take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.integrations._calls import log_det_as, reason_against_dtypes

__all__ = ["CPU_FROM", "Given", "affine", "reason_against", "reason_against_cpu", "slower_on_cpu"]

#: Layers whose library's code was measured to be the faster one on CPUs (forward and backward of
#: the coupling, two threads), and from how many elements to transform it no longer is.
CPU_FROM: dict[str, int] = {"AffineCoupling": 2**16, "AllInOneBlock": 2**15}


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
    if (reason := reason_against_dtypes(x, *parameters)) is not None:
        return reason
    for t in parameters:
        if t.shape != x.shape:
            return f"parameters of shape {tuple(t.shape)} for an input of shape {tuple(x.shape)}"
    return None


def slower_on_cpu(layer: str) -> str:
    """Where, and why, a layer of CPU_FROM keeps its library's code although our op can run."""
    least = CPU_FROM[layer]
    if least == 0:
        return ""
    return f"on a CPU with fewer than {least} elements to transform (measured: slower there)"


def reason_against_cpu(layer: str, x: Tensor) -> str | None:
    """Why a layer of CPU_FROM transforms x by its library's code although our op can, or None.

    The same while torch.compile traces: the number of elements becomes a guard of the graph.
    """
    return slower_on_cpu(layer) if x.is_cpu and x.numel() < CPU_FROM[layer] else None


def affine(x: Tensor, raw_scale: Tensor, shift: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """ops.affine_coupling with PyTorch's promotion of dtypes, and log_det in the dtype of y; under
    autocast, which leaves sums in float32, as it is."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, raw_scale.dtype), shift.dtype)
    y, log_det = ops.affine_coupling(x.to(dtype), raw_scale.to(dtype), shift.to(dtype), **options)
    return y, log_det_as(log_det, dtype)
