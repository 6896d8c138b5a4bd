"""Rational-quadratic spline with linear tails: a monotone elementwise map and its log-derivative.

Durkan et al. 2019, "Neural Spline Flows", section 3.1. On [-B, B] the map is piecewise
rational-quadratic: K bins with widths and heights 2B softmax(.), none below 2B times its minimum,
and derivatives softplus(.) at the K - 1 inner knots. Outside it is the identity, with derivative 1
at -B and B. Inside bin k, with theta in [0, 1] the position in it, s = height / width, and d_k,
d_k+1 the derivatives at its ends,

    y = y_k + height (s theta^2 + d_k theta (1 - theta)) / E                           (eq. 4)
    dy/dx = s^2 (d_k+1 theta^2 + 2 s theta (1 - theta) + d_k (1 - theta)^2) / E^2      (eq. 5)
    E = s + (d_k + d_k+1 - 2 s) theta (1 - theta)

The raw derivatives are shifted so that zero parameters give the identity: with m the minimum,
d = m + softplus(raw + log(exp(1 - m) - 1)). (nflows leaves the shift out: its raw derivatives are
these plus the shift.) The inverse solves the quadratic of section 3.1 with its discriminant written
as a sum of squares and its root without cancellation, so that no input gives a negative one.

Minima far below the rounding error of a knot let rounded knots meet. A point on several of them
belongs to the bin above the last, B to the last bin; y stays in its bin. Knots closer than half the
minimum stand for a bin of that size, a constant for gradients.

Shapes: x (...), widths and heights (..., K), derivatives (..., K - 1), one dtype of float32,
float64, float16, bfloat16; y as x; log_det (...), or (B,) where summed, float32, float64 for
float64 inputs. Half inputs are computed in float32. Gradients: first order fused, second and higher
by the reference; log_det has a kink at each knot, where the bin above counts. Backends:
triton, cpu, reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen import backends
from fastgen.ops import _check, _library
from fastgen.ops._autograd import (
    Fused,
    accumulate_dtype,
    autocast_promote,
    reference_vjp,
    run,
)

__all__ = ["rq_spline"]

_OPTIONS = (
    "int batch_dims, bool inverse, float tail_bound, float min_bin_width, float min_bin_height, "
    "float min_derivative"
)
_TENSORS = "Tensor x, Tensor widths, Tensor heights, Tensor derivatives"

_fwd = _library.define(f"rq_spline_fwd({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)")
_bwd = _library.define(
    f"rq_spline_bwd(Tensor grad_y, Tensor grad_log_det, {_TENSORS}, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@_library.register_fake("rq_spline_fwd")
def _(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    batch_dims: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    log_det = x.new_empty(x.shape[:batch_dims], dtype=accumulate_dtype(x.dtype))
    return x.new_empty(x.shape), log_det


@_library.register_fake("rq_spline_bwd")
def _(
    grad_y: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, widths, heights, derivatives))


def _register_vmap(name: str, n_tensors: int) -> None:
    """vmap by one more leading dimension: the raw operators take any number of them."""
    op = getattr(torch.ops.fastgen, name)

    def more_dims(info: Any, in_dims: tuple, *args: Any) -> tuple:
        tensors = [
            t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
            for t, dim in zip(args[:n_tensors], in_dims, strict=False)
        ]
        batch_dims, *options = args[n_tensors:]
        out = op(*tensors, batch_dims + 1, *options)
        return out, (0,) * len(out)

    torch.library.register_vmap(f"fastgen::{name}", more_dims, lib=_library.LIBRARY)


_register_vmap("rq_spline_fwd", 4)
_register_vmap("rq_spline_bwd", 6)
_library.register_triton("rq_spline", "rq_spline_fwd", "rq_spline_bwd")


def _knots(raw: Tensor, tail_bound: float, minimum: float) -> Tensor:
    """(..., K) raw sizes -> (..., K + 1) knots from exactly -tail_bound to exactly tail_bound."""
    bins = raw.shape[-1]
    sizes = minimum + (1 - minimum * bins) * torch.softmax(raw, -1)
    inner = 2 * tail_bound * torch.cumsum(sizes, -1)[..., :-1] - tail_bound
    return F.pad(F.pad(inner, (1, 0), value=-tail_bound), (0, 1), value=tail_bound)


def _position(
    s: Tensor, d0: Tensor, d1: Tensor, eta: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """theta and 1 - theta of the point at eta = 1 - rest of its bin's height.

    With p = d0 rest - d1 eta, the coefficients of section 3.1, divided by the height, are
    b = p + 2 s eta, c = -s eta and a = s - b. So b^2 - 4 a c = p^2 + 4 s^2 eta rest, whose root r
    gives theta = 2 s eta / (2 s eta + p + r), or (r - p) / (r - p + 2 s rest): the form that adds
    positive numbers is taken.
    """
    p = d0 * rest - d1 * eta
    # Squares of small derivatives vanish, and a root of 0 has no gradient: hence the unit.
    unit = torch.maximum(p.abs(), 2 * s * torch.sqrt(eta * rest).clamp_min(2.0**-60)).detach()
    p_unit, s_unit = p / unit, 2 * s / unit
    squares = p_unit * p_unit + (s_unit * eta) * (s_unit * rest)
    root = unit * torch.sqrt(squares + torch.finfo(s.dtype).tiny)
    falls = p < 0
    left = torch.where(falls, root - p, 2 * s * eta)
    right = torch.where(falls, 2 * s * rest, root + p)
    return left / (left + right), right / (left + right)


def _least_size(tail_bound: float, minimum: float, dtype: torch.dtype) -> float:
    """The size that a bin has where its rounded knots lie closer than that: half its minimum.

    Of still smaller minima the squares of slopes would overflow.
    """
    return tail_bound * max(minimum, 2.0**-200 if dtype == torch.float64 else 2.0**-40)


def rq_spline_reference(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    batch_dims: int,
    inverse: bool,
    tail_bound: float,
    min_bin_width: float,
    min_bin_height: float,
    min_derivative: float,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; log_det is summed over all but x's first `batch_dims` dimensions."""
    dtype = accumulate_dtype(x.dtype)
    # Tails take a harmless point through the maths, so that no gradient of theirs is NaN.
    outside = x.abs() > tail_bound
    v = torch.where(outside, 0, x).to(dtype)
    knots_x = _knots(widths.to(dtype), tail_bound, min_bin_width)
    knots_y = _knots(heights.to(dtype), tail_bound, min_bin_height)
    shift = math.log(math.expm1(1 - min_derivative))
    slopes = min_derivative + F.softplus(F.pad(derivatives.to(dtype), (1, 1)) + shift, threshold=50)
    # The upper end of the box belongs to the last bin, even where rounded knots reach it before.
    reach = torch.where(v < tail_bound, v, math.inf).unsqueeze(-1)
    past = (knots_y if inverse else knots_x)[..., :-1] <= reach
    index = (past * torch.arange(past.shape[-1], device=x.device)).amax(-1, keepdim=True)

    def ends(knots: Tensor) -> tuple[Tensor, Tensor]:
        return knots.gather(-1, index).squeeze(-1), knots.gather(-1, index + 1).squeeze(-1)

    (x0, x1), (y0, y1), (d0, d1) = ends(knots_x), ends(knots_y), ends(slopes)
    width, height = x1 - x0, y1 - y0
    least_width = _least_size(tail_bound, min_bin_width, dtype)
    least_height = _least_size(tail_bound, min_bin_height, dtype)
    narrow, low = width < least_width, height < least_height
    width, height = width.masked_fill(narrow, least_width), height.masked_fill(low, least_height)
    s = height / width
    if inverse:
        rest = (y1 - v) / height
        theta, phi = _position(s, d0, d1, torch.where(low, 1 - rest, (v - y0) / height), rest)
    else:
        phi = (x1 - v) / width
        theta = torch.where(narrow, 1 - phi, (v - x0) / width)
    e = s * (theta * theta + phi * phi) + (d0 + d1) * theta * phi
    q = d1 * theta * theta + 2 * s * theta * phi + d0 * phi * phi
    log_slope = torch.log(q) + 2 * torch.log(s / e)
    if inverse:
        y, top, log_det = x0 + width * theta, x1, -log_slope
    else:
        y, top, log_det = y0 + height * theta * (s * theta + d0 * phi) / e, y1, log_slope
    # Rounded, y can pass the end of its bin; its gradients are those of before.
    y = y - (y - top.clamp_max(tail_bound)).clamp_min(0).detach()
    log_det = torch.where(outside, 0, log_det)
    if batch_dims < x.dim():
        log_det = log_det.flatten(batch_dims).sum(-1)
    return torch.where(outside, x, y.to(x.dtype)), log_det


class _RQSpline(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple:
        tensors = (grad_y, grad_log_det, *ctx.saved_tensors)
        grads = run(_RQSplineBackward, _bwd, tensors, *ctx.options)
        return *grads, None, None, None, None, None, None


class _RQSplineBackward(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _bwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        grad_y, grad_log_det, *primals = ctx.saved_tensors

        def reference(
            x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor
        ) -> tuple[Tensor, Tensor]:
            return rq_spline_reference(x, widths, heights, derivatives, *ctx.options)

        gx, gw, gh, gd, ggy, ggld = reference_vjp(reference, primals, (grad_y, grad_log_det), grads)
        return ggy, ggld, gx, gw, gh, gd, None, None, None, None, None, None


def _fused(
    x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return run(_RQSpline, _fwd, (x, widths, heights, derivatives), *options)


def _prepare(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    tail_bound: float = 3.0,
    inverse: bool = False,
    sum_log_det: bool = False,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> tuple:
    x, widths, heights, derivatives = autocast_promote(x, widths, heights, derivatives)
    _check.floating(x, "x")
    if sum_log_det:
        _check.rank(x, "x", 1, "at least one dimension, (B, ...), to sum log_det over the others")
    _check.matches(widths, "widths", x, "x")
    _check.rank(widths, "widths", 1, "(..., K)")
    bins = widths.shape[-1]
    if bins == 0:
        raise ValueError(f"widths: expected at least one bin, got shape {tuple(widths.shape)}")
    _check.shape(widths, "widths", (*x.shape, bins), "that of x and K")
    for value, name, last, meaning in (
        (heights, "heights", bins, "that of widths"),
        (derivatives, "derivatives", bins - 1, "that of x and K - 1"),
    ):
        _check.matches(value, name, x, "x")
        _check.shape(value, name, (*x.shape, last), meaning)
    _check.positive(tail_bound, "tail_bound")
    for minimum, name, sizes in (
        (min_bin_width, "min_bin_width", bins),
        (min_bin_height, "min_bin_height", bins),
        (min_derivative, "min_derivative", 1),
    ):
        _check.positive(minimum, name)
        if minimum * sizes >= 1:
            raise ValueError(f"{name}: expected less than {1 / sizes:g}, got {minimum}")
    batch_dims = 1 if sum_log_det else x.dim()
    minima = (float(min_bin_width), float(min_bin_height), float(min_derivative))
    return x, widths, heights, derivatives, batch_dims, bool(inverse), float(tail_bound), *minima


_OP = backends.Op("rq_spline", _prepare)
_OP.implement(
    "triton", _fused, device=_library.triton_device, unavailable=_library.triton_unavailable
)
_OP.implement("cpu", _fused, device="cpu", unavailable=_library.cpu_unavailable_beside_triton)
_OP.implement("reference", rq_spline_reference)


def rq_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    tail_bound: float = 3.0,
    inverse: bool = False,
    sum_log_det: bool = False,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Applies a monotone rational-quadratic spline to every element and gives its log-derivative.

    Args:
        x: (...), what to transform; (B, ...) with `sum_log_det`.
        widths: (..., K), raw bin widths (before the softmax).
        heights: (..., K), raw bin heights.
        derivatives: (..., K - 1), raw derivatives at the inner knots (before the softplus); zero
            means 1. Slices of one (..., 3K - 1) tensor are read where they lie.
        tail_bound: B; outside [-B, B] the map is the identity.
        inverse: apply the inverse map instead.
        sum_log_det: sum the log-derivatives of each sample.
        min_bin_width, min_bin_height: least share of 2B that a bin has, below 1 / K. With minima
            below the rounding error of a knot (1e-7 in float32) two knots can round to the same
            number. A point there belongs to the bin above both, B to the last bin; a bin so lost
            has half the minimum for its size in log_det, 2^-41 of 2B at least (float64: 2^-201).
        min_derivative: least derivative at a knot, below 1.
        backend: force "triton", "cpu" or "reference".

    Returns:
        y: (...), dtype of x.
        log_det: log|dy/dx| (...), or its sum (B,), in nats, float32 (float64 for float64 inputs).
        Finite for all finite inputs, raw derivatives up to 1e18 in float32; so are the gradients
        of the fused backends, which are cut at 2^80 (float64: 2^500) with respect to x.

    Raises:
        TypeError: not tensors, not floating, or mixed dtypes outside autocast.
        ValueError: shapes or devices do not fit; a bound or minimum outside its range; unknown
            `backend`.

    Autocast: mixed dtypes become the widest of them.
    """
    args = _prepare(
        x,
        widths,
        heights,
        derivatives,
        tail_bound=tail_bound,
        inverse=inverse,
        sum_log_det=sum_log_det,
        min_bin_width=min_bin_width,
        min_bin_height=min_bin_height,
        min_derivative=min_derivative,
    )
    return _OP(args, backend)
