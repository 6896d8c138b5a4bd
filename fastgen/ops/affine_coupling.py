"""Affine coupling: the transformed half of a coupling layer and its log-determinant, in one pass.

    y = s * x + t,  log_det = sum(log s)            (forward)
    y = (x - t) / s,  log_det = -sum(log s)         (inverse)

with s > 0 computed from the raw output a of the conditioner: log s = a ("exp", RealNVP: Dinh et al.
2017, eq. 7), f * tanh(a) ("tanh", the bounded form that RealNVP trains with), log sigmoid(a + 2)
("sigmoid", Glow: Kingma & Dhariwal 2018), f * (2/pi) * atan(a) ("atan", the soft clamp of Ardizzone
et al. 2019), log softplus(a) ("softplus"), where f is `scale_factor`. With `min_scale` m, s is
sigmoid(a + 2) + m or softplus(a) + m, which m is a floor under (nflows, Durkan et al. 2020: 1e-3).

Shapes: x, raw_scale, shift (B, ...), one dtype of float32, float64, float16, bfloat16; y as x;
log_det (B,) float32, float64 for float64 inputs. Half inputs are computed in float32. Gradients:
first order fused, second and higher by the reference. Backends:
triton, cpu, reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastgen import backends
from fastgen.ops import _check, _library
from fastgen.ops._autograd import (
    Fused,
    accumulate_dtype,
    autocast_promote,
    reference_vjp,
    run,
    sum_per_sample,
)

__all__ = ["affine_coupling"]

SCALES = ("exp", "tanh", "sigmoid", "atan", "softplus")
#: Those that take a floor, `min_scale`.
FLOORED = ("sigmoid", "softplus")

_fwd = _library.define(
    "affine_coupling_fwd(Tensor x, Tensor raw_scale, Tensor shift, str scale, bool inverse, "
    "float scale_factor, float min_scale) -> (Tensor, Tensor)"
)
# Of its third result, the gradient of shift, forward has none (0,): there it is grad_y itself.
_bwd = _library.define(
    "affine_coupling_bwd(Tensor grad_y, Tensor grad_log_det, Tensor x, Tensor raw_scale, "
    "Tensor shift, str scale, bool inverse, float scale_factor, float min_scale) "
    "-> (Tensor, Tensor, Tensor)"
)


@_library.register_fake("affine_coupling_fwd")
def _(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    scale: str,
    inverse: bool,
    scale_factor: float,
    min_scale: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=accumulate_dtype(x.dtype))


@_library.register_fake("affine_coupling_bwd")
def _(
    grad_y: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    scale: str,
    inverse: bool,
    scale_factor: float,
    min_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_shift = x.new_empty(x.shape if inverse else (0,))
    return x.new_empty(x.shape), x.new_empty(x.shape), grad_shift


_library.register_vmap_fold("affine_coupling_fwd")
_library.register_vmap_fold("affine_coupling_bwd")
_library.register_triton("affine_coupling", "affine_coupling_fwd", "affine_coupling_bwd")


def _log_scale(a: Tensor, scale: str, scale_factor: float, min_scale: float) -> Tensor:
    """log s of the raw output a."""
    if scale == "exp":
        return a
    if scale == "tanh":
        return scale_factor * torch.tanh(a)
    if scale == "atan":
        return scale_factor * (2 / math.pi) * torch.atan(a)
    if scale == "sigmoid" and min_scale == 0:
        return logsigmoid(a + 2)
    if scale == "sigmoid":
        return torch.log(torch.sigmoid(a + 2) + min_scale)
    # softplus(a) = -logsigmoid(-a); PyTorch's softplus is a itself from 20 on.
    if min_scale != 0:
        return torch.log(min_scale - logsigmoid(-a))
    # log softplus(a) is a as far as rounding goes below -40, long before softplus underflows.
    # (What a clamp's gradient is at its bound depends on PyTorch's release.)
    far = a < -40
    return torch.where(far, a, torch.log(-logsigmoid(-a.masked_fill(far, -40.0))))


def affine_coupling_reference(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    scale: str,
    inverse: bool,
    scale_factor: float,
    min_scale: float,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; arguments as :func:`affine_coupling`, all positional."""
    dtype = accumulate_dtype(x.dtype)
    log_s = _log_scale(raw_scale.to(dtype), scale, scale_factor, min_scale)
    log_det = sum_per_sample(log_s)
    if inverse:
        return ((x.to(dtype) - shift.to(dtype)) * torch.exp(-log_s)).to(x.dtype), -log_det
    return (x.to(dtype) * torch.exp(log_s) + shift.to(dtype)).to(x.dtype), log_det


class _AffineCoupling(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple:
        tensors = (grad_y, grad_log_det, *ctx.saved_tensors)
        grads = run(_AffineCouplingBackward, _bwd, tensors, *ctx.options)
        grad_x, grad_raw_scale, grad_shift = grads
        inverse = ctx.options[1]
        grad_shift = grad_shift if inverse else grad_y
        return grad_x, grad_raw_scale, grad_shift, None, None, None, None


class _AffineCouplingBackward(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _bwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        grad_y, grad_log_det, *primals = ctx.saved_tensors

        def reference(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
            return affine_coupling_reference(x, raw_scale, shift, *ctx.options)

        inverse = ctx.options[1]
        wanted = (*grads[:2], grads[2] if inverse else None)
        gx, graw, gshift, ggy, ggld = reference_vjp(
            reference, primals, (grad_y, grad_log_det), wanted
        )
        return ggy, ggld, gx, graw, gshift, None, None, None, None


def _fused(x: Tensor, raw_scale: Tensor, shift: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return run(_AffineCoupling, _fwd, (x, raw_scale, shift), *options)


def check_scale(scale: str, scale_factor: float, min_scale: float) -> None:
    """Raises where these are no options of :func:`affine_coupling`."""
    _check.one_of(scale, "scale", SCALES)
    _check.positive(scale_factor, "scale_factor")
    _check.non_negative(min_scale, "min_scale")
    if min_scale == 0:
        return
    if scale not in FLOORED:
        raise ValueError(
            f"min_scale: expected 0 with scale={scale!r}, which has no floor, got {min_scale}"
        )
    if min_scale < torch.finfo(torch.float32).tiny:
        raise ValueError(f"min_scale: expected 0 or a normal float32 number, got {min_scale}")


def _prepare(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    *,
    scale: str = "tanh",
    inverse: bool = False,
    scale_factor: float = 1.0,
    min_scale: float = 0.0,
) -> tuple:
    alike = _check.alike(x, raw_scale, shift)
    if not alike:
        x, raw_scale, shift = autocast_promote(x, raw_scale, shift)
        _check.floating(x, "x")
    _check.rank(x, "x", 1, "at least one dimension, (B, ...)")
    if not alike:
        for value, name in ((raw_scale, "raw_scale"), (shift, "shift")):
            _check.like(value, name, x, "x")
    check_scale(scale, scale_factor, min_scale)
    return x, raw_scale, shift, scale, bool(inverse), float(scale_factor), float(min_scale)


_OP = backends.Op("affine_coupling", _prepare)
_OP.implement(
    "triton", _fused, device=_library.triton_device, unavailable=_library.triton_unavailable
)
_OP.implement("cpu", _fused, device="cpu", unavailable=_library.cpu_unavailable_beside_triton)
_OP.implement("reference", affine_coupling_reference)


def affine_coupling(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    *,
    scale: str = "tanh",
    inverse: bool = False,
    scale_factor: float = 1.0,
    min_scale: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Transforms the second half of a coupling layer and gives the log-determinant of its Jacobian.

    Args:
        x: (B, ...), the half to transform.
        raw_scale: (B, ...), the conditioner's raw scale output.
        shift: (B, ...), the conditioner's shift output.
        scale: how s comes from `raw_scale`: "exp" | "tanh" | "sigmoid" | "atan" | "softplus"
            (module docstring).
        inverse: undo the transform instead.
        scale_factor: bound f of log s for "tanh" and "atan"; the others ignore it.
        min_scale: floor m, added to the s of "sigmoid" and "softplus": 0, or a normal float32
            number.
        backend: force "triton", "cpu" or "reference".

    Returns:
        y: (B, ...), dtype of x.
        log_det: (B,) in nats, float32 (float64 for float64 inputs).

    Raises:
        TypeError: not tensors, not floating, or mixed dtypes outside autocast.
        ValueError: shapes or devices differ; unknown `scale` or `backend`; `scale_factor` not
            positive; `min_scale` negative, not finite, subnormal, or with a scale without floor.

    Autocast: mixed dtypes become the widest of them.
    """
    args = _prepare(
        x,
        raw_scale,
        shift,
        scale=scale,
        inverse=inverse,
        scale_factor=scale_factor,
        min_scale=min_scale,
    )
    return _OP(args, backend)
