"""What the files of this package ask of the tensors of one call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy

from fastgen.ops._autograd import accumulate_dtype, under_autocast
from fastgen.ops._check import FLOATS

__all__ = [
    "common_dtype",
    "derivative_shift",
    "is_number",
    "log_det_as",
    "reason_against",
    "reason_against_dtypes",
    "reason_against_minima",
    "reason_against_tracer",
]


def is_number(value: Any) -> bool:
    """Whether an option is a plain number: what ops take, unlike a tensor."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def reason_against_tracer(*inputs: Any) -> str | None:
    """Why a call is for PyTorch's own operators, whatever its tensors hold, or None.

    Forward mode has no rule for fastgen's; torch.jit.trace would write them into a file that other
    programs load, torch.onnx.export cannot; and what torch.fx passes are no tensors.
    """
    if forward_ad._current_level >= 0:  # tangents may be asked for
        return "forward-mode differentiation"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "torch.onnx.export"
    for x in inputs:
        if isinstance(x, Proxy):
            return "torch.fx.symbolic_trace"
    return None


def reason_against_dtypes(*tensors: Tensor) -> str | None:
    """Why no op of fastgen computes with such tensors, whatever their shapes, or None."""
    if (reason := reason_against_tracer(*tensors)) is not None:
        return reason
    for t in tensors:
        if t.dtype not in FLOATS:
            return f"tensors of {t.dtype}"
    return None


def reason_against(x: Any, *others: Tensor) -> str | None:
    """Why fastgen's ops cannot take these tensors the way the library does, or None."""
    if not isinstance(x, Tensor):
        return f"its input is a {type(x).__name__}, not a tensor"
    if (reason := reason_against_dtypes(x, *others)) is not None:
        return reason
    if any(t.device != x.device for t in others):
        return "tensors of different devices"
    if any(t.dtype != x.dtype for t in others) and not under_autocast(x.device):
        return "tensors of different dtypes"
    return None


def common_dtype(x: Tensor, *others: Tensor) -> torch.dtype:
    """What to compute in: the widest dtype of the tensors, float32 at least."""
    dtype = x.dtype
    for t in others:
        dtype = torch.promote_types(dtype, t.dtype)
    return accumulate_dtype(dtype)


def log_det_as(log_det: Tensor, dtype: torch.dtype) -> Tensor:
    """A log-determinant in the dtype the library has it in; under autocast, where a layer before
    may have rounded to half what that follows, as it is."""
    keep = log_det.dtype == dtype or under_autocast(log_det.device)
    return log_det if keep else log_det.to(dtype)


def derivative_shift(min_derivative: float) -> float:
    """What raw derivatives of nflows, and of normflows after it, are above those of rq_spline."""
    return math.log(math.expm1(1 - min_derivative))


def reason_against_minima(
    bins: int, min_bin_width: float, min_bin_height: float, min_derivative: float
) -> str | None:
    """Why rq_spline has no spline of that many bins with these least sizes and slope, or None."""
    for name, least, most in (
        ("min_bin_width", min_bin_width, 1 / bins),
        ("min_bin_height", min_bin_height, 1 / bins),
        ("min_derivative", min_derivative, 1.0),
    ):
        if not 0 < least < most:
            return f"{name}={least} is not between 0 and {most:g}"
    return None
