"""rq_spline in Triton: value and log-derivative in one pass over the parameters, and their
gradient, recomputed from the inputs, in another.

Bytes an element moves, at least, with P = 3K - 1 parameters of v bytes: (P + 2) v + 4 forward,
(2 P + 3) v + 4 backward. A program works on a tile of elements by bins, (T, K), of whole samples or
of one of the equal chunks of a long sample; sums of chunks are added in a fixed order. Names follow
Durkan et al. 2019: theta is the position inside the bin, phi = 1 - theta, s the slope of the bin,
d0 and d1 the derivatives at its ends.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from fastgen.kernels import _math
from fastgen.kernels._launch import accumulate_dtype, check, options, records
from torch import Tensor

#: Bytes of a tensor's tile: 16 a thread of 4 warps.
_TILE_BYTES = 2048


@triton.jit
def _elements(n_samples, size, chunks, SAMPLES: tl.constexpr, ELEMENTS: tl.constexpr):
    """Of each element of this program's tile: its sample, its position in x, whether it exists."""
    pid = tl.program_id(0)
    i = tl.arange(0, SAMPLES * ELEMENTS)
    sample = (pid // chunks).to(tl.int64) * SAMPLES + i // ELEMENTS
    element = (pid % chunks).to(tl.int64) * ELEMENTS + i % ELEMENTS
    return sample, sample * size + element, (sample < n_samples) & (element < size)


@triton.jit
def _load_records(ptr, stride, index, mask, column, SIZE: tl.constexpr, T: tl.constexpr):
    ptrs = ptr + (index * stride)[:, None] + column[None, :]
    return tl.load(ptrs, mask[:, None] & (column < SIZE)[None, :], 0.0).to(T)


@triton.jit
def _store_records(ptr, index, mask, column, SIZE: tl.constexpr, value):
    ptrs = ptr + (index * SIZE)[:, None] + column[None, :]
    tl.store(ptrs, value, mask[:, None] & (column < SIZE)[None, :])


@triton.jit
def _split(values, CENTRE: tl.constexpr):
    """values as multiples of the last bit of CENTRE, whose sums up to CENTRE are exact, and the
    rest. float64 is exact enough as it is."""
    coarse = values if values.dtype == tl.float64 else (values + CENTRE) - CENTRE
    return coarse, values - coarse


@triton.jit
def _knots(
    raw,
    column,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BOUND: tl.constexpr,
    CENTRE: tl.constexpr,
    MINIMUM: tl.constexpr,
    LOST: tl.constexpr,
):
    """The softmax of raw sizes, and the upper ends of the bins. SCALE, rounded, lacks LOST."""
    LOW: tl.constexpr = 2 * BOUND * MINIMUM
    SCALE: tl.constexpr = 2 * BOUND * (1 - MINIMUM * BINS)
    raw = tl.where((column < BINS)[None, :], raw, -float("inf"))
    e = _math.exp(raw - tl.max(raw, 1, keep_dims=True))
    # SCALE / total and total in two numbers each: in one, their rounding would move every knot.
    coarse, fine = _split(e, 3.0 * COLUMNS)
    total, more = tl.sum(coarse, 1, keep_dims=True), tl.sum(fine, 1, keep_dims=True)
    inverse = 1.0 / (total + more)
    factor = SCALE * inverse
    rest = tl.fma(-factor, total, tl.full(total.shape, SCALE, total.dtype))
    rest += LOST - factor * more
    sizes = e * factor + (e * (rest * inverse) + LOW)
    coarse, fine = _split(sizes, CENTRE)
    ends = (tl.cumsum(coarse, 1) - BOUND) + tl.cumsum(fine, 1)
    return e * inverse, tl.where((column == BINS - 1)[None, :], BOUND, ends)


@triton.jit
def _pick(values, column, index):
    """values[i, index[i]], or 0 where there is no such column."""
    return tl.sum(tl.where(column[None, :] == index[:, None], values, 0.0), 1)


@triton.jit
def _find_bin(
    v,
    ends_x,
    ends_y,
    raw_derivatives,
    column,
    INVERSE: tl.constexpr,
    BINS: tl.constexpr,
    BOUND: tl.constexpr,
):
    """The bin that holds v: its number, its corners, the raw derivatives there (0 means 1)."""
    ends = ends_y if INVERSE else ends_x
    # The upper end of the box belongs to the last bin, even where rounded knots reach it before.
    reach = tl.where(v < BOUND, v, float("inf"))
    past = (ends <= reach[:, None]) & (column < BINS - 1)[None, :]
    index = tl.max(tl.where(past, column[None, :] + 1, 0), 1)
    first = index == 0
    x0 = tl.where(first, -BOUND, _pick(ends_x, column, index - 1))
    y0 = tl.where(first, -BOUND, _pick(ends_y, column, index - 1))
    x1, y1 = _pick(ends_x, column, index), _pick(ends_y, column, index)
    raw0 = _pick(raw_derivatives, column, index - 1)
    raw1 = _pick(raw_derivatives, column, index)
    return index, x0, x1, y0, y1, raw0, raw1


@triton.jit
def _evaluate(
    v,
    x0,
    x1,
    y0,
    y1,
    raw0,
    raw1,
    INVERSE: tl.constexpr,
    BOUND: tl.constexpr,
    LEAST_WIDTH: tl.constexpr,
    LEAST_HEIGHT: tl.constexpr,
    MIN_DERIVATIVE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The spline inside its bin; every term below is positive.

    y = y0 + height theta (s theta + d0 phi) / E and dy/dx = s^2 q / E^2, where
    E = s (theta^2 + phi^2) + (d0 + d1) theta phi, q = d1 theta^2 + 2 s theta phi + d0 phi^2.
    """
    # Only minima far below the rounding error of a knot let two of them meet.
    narrow, low = x1 - x0 < LEAST_WIDTH, y1 - y0 < LEAST_HEIGHT
    width = tl.where(narrow, LEAST_WIDTH, x1 - x0)
    height = tl.where(low, LEAST_HEIGHT, y1 - y0)
    s = height / width
    d0 = MIN_DERIVATIVE + _math.softplus(raw0 + SHIFT)
    d1 = MIN_DERIVATIVE + _math.softplus(raw1 + SHIFT)
    if INVERSE:
        # The discriminant is a sum of squares; of the two equal forms of the root, the one that
        # adds positive numbers is taken.
        rest = (y1 - v) / height
        eta = tl.where(low, 1.0 - rest, (v - y0) / height)
        p = d0 * rest - d1 * eta
        both = tl.sqrt(p * p + 4.0 * s * s * (eta * rest)) + tl.abs(p)
        left = tl.where(p < 0.0, both, 2.0 * s * eta)
        right = tl.where(p < 0.0, 2.0 * s * rest, both)
        scale = 1.0 / (left + right)
        theta, phi = left * scale, right * scale
    else:
        phi = (x1 - v) / width
        theta = tl.where(narrow, 1.0 - phi, (v - x0) / width)
    product = theta * phi
    inverse_e = 1.0 / (s * (theta * theta + phi * phi) + (d0 + d1) * product)
    ratio = theta * (s * theta + d0 * phi) * inverse_e
    q = d1 * theta * theta + 2.0 * s * product + d0 * phi * phi
    value, top = (x0 + width * theta, x1) if INVERSE else (y0 + height * ratio, y1)
    value = tl.minimum(value, tl.minimum(top, BOUND), propagate_nan=tl.PropagateNan.ALL)
    return narrow, low, width, height, s, d0, d1, theta, phi, inverse_e, ratio, q, value


@triton.jit
def _forward_kernel(
    x_ptr,
    widths_ptr,
    heights_ptr,
    derivatives_ptr,
    y_ptr,
    log_det_ptr,
    n_samples,
    size,
    chunks,
    STRIDE_WIDTHS: tl.constexpr,
    STRIDE_HEIGHTS: tl.constexpr,
    STRIDE_DERIVATIVES: tl.constexpr,
    INVERSE: tl.constexpr,
    BOUND: tl.constexpr,
    CENTRE: tl.constexpr,
    MIN_WIDTH: tl.constexpr,
    MIN_HEIGHT: tl.constexpr,
    MIN_DERIVATIVE: tl.constexpr,
    SHIFT: tl.constexpr,
    LEAST_WIDTH: tl.constexpr,
    LEAST_HEIGHT: tl.constexpr,
    LOST_WIDTH: tl.constexpr,
    LOST_HEIGHT: tl.constexpr,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SAMPLES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    T: tl.constexpr = log_det_ptr.dtype.element_ty
    sample, index, mask = _elements(n_samples, size, chunks, SAMPLES, ELEMENTS)
    column = tl.arange(0, COLUMNS)
    raw_w = _load_records(widths_ptr, STRIDE_WIDTHS, index, mask, column, BINS, T)
    raw_h = _load_records(heights_ptr, STRIDE_HEIGHTS, index, mask, column, BINS, T)
    raw_d = _load_records(derivatives_ptr, STRIDE_DERIVATIVES, index, mask, column, BINS - 1, T)
    v = tl.load(x_ptr + index, mask, 0.0).to(T)
    # Tails take a harmless point through the maths; NaN stays.
    outside = (v < -BOUND) | (v > BOUND)
    safe = tl.where(outside, 0.0, v)
    _, ends_x = _knots(raw_w, column, BINS, COLUMNS, BOUND, CENTRE, MIN_WIDTH, LOST_WIDTH)
    _, ends_y = _knots(raw_h, column, BINS, COLUMNS, BOUND, CENTRE, MIN_HEIGHT, LOST_HEIGHT)
    _, x0, x1, y0, y1, raw0, raw1 = _find_bin(
        safe, ends_x, ends_y, raw_d, column, INVERSE, BINS, BOUND
    )
    _, _, _, _, s, _, _, _, _, inverse_e, _, q, value = _evaluate(
        safe,
        x0,
        x1,
        y0,
        y1,
        raw0,
        raw1,
        INVERSE,
        BOUND,
        LEAST_WIDTH,
        LEAST_HEIGHT,
        MIN_DERIVATIVE,
        SHIFT,
    )
    tl.store(y_ptr + index, tl.where(outside, v, value), mask)
    log_slope = _math.log(q) + 2.0 * _math.log(s * inverse_e)
    log_det = tl.where(outside | ~mask, 0.0, -log_slope if INVERSE else log_slope)
    if ELEMENTS == 1:
        tl.store(log_det_ptr + sample * chunks, log_det, mask)
    else:
        log_det = tl.sum(tl.reshape(log_det, (SAMPLES, ELEMENTS)), 1)
        first = (tl.program_id(0) // chunks).to(tl.int64) * SAMPLES
        row = first + tl.arange(0, SAMPLES)
        tl.store(log_det_ptr + row * chunks + tl.program_id(0) % chunks, log_det, row < n_samples)


@triton.jit
def _limit(x, LARGEST: tl.constexpr):
    """x, at most LARGEST in size; tl.clamp of float64 with NaN does not compile."""
    low = tl.maximum(x, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sizes_gradient(
    p,
    column,
    index,
    start,
    size,
    BINS: tl.constexpr,
    BOUND: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    """Gradient of raw sizes with the softmax p. A bin before that of the element moves its lower
    end (gradient `start`), its own changes its size (`size`), later ones nothing."""
    SCALE: tl.constexpr = 2 * BOUND * (1 - MINIMUM * BINS)
    own = tl.where(column[None, :] == index[:, None], size[:, None], 0.0)
    g = tl.where(column[None, :] < index[:, None], start[:, None], own)
    return SCALE * p * (g - tl.sum(p * g, 1, keep_dims=True))


@triton.jit
def _backward_kernel(
    grad_y_ptr,
    grad_log_det_ptr,
    x_ptr,
    widths_ptr,
    heights_ptr,
    derivatives_ptr,
    grad_x_ptr,
    grad_widths_ptr,
    grad_heights_ptr,
    grad_derivatives_ptr,
    n_samples,
    size,
    chunks,
    STRIDE_WIDTHS: tl.constexpr,
    STRIDE_HEIGHTS: tl.constexpr,
    STRIDE_DERIVATIVES: tl.constexpr,
    INVERSE: tl.constexpr,
    BOUND: tl.constexpr,
    CENTRE: tl.constexpr,
    MIN_WIDTH: tl.constexpr,
    MIN_HEIGHT: tl.constexpr,
    MIN_DERIVATIVE: tl.constexpr,
    SHIFT: tl.constexpr,
    LEAST_WIDTH: tl.constexpr,
    LEAST_HEIGHT: tl.constexpr,
    LOST_WIDTH: tl.constexpr,
    LOST_HEIGHT: tl.constexpr,
    BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SAMPLES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    T: tl.constexpr = grad_log_det_ptr.dtype.element_ty
    sample, index, mask = _elements(n_samples, size, chunks, SAMPLES, ELEMENTS)
    column = tl.arange(0, COLUMNS)
    raw_w = _load_records(widths_ptr, STRIDE_WIDTHS, index, mask, column, BINS, T)
    raw_h = _load_records(heights_ptr, STRIDE_HEIGHTS, index, mask, column, BINS, T)
    raw_d = _load_records(derivatives_ptr, STRIDE_DERIVATIVES, index, mask, column, BINS - 1, T)
    v = tl.load(x_ptr + index, mask, 0.0).to(T)
    # Products of a few such gradients, sizes and slopes do not overflow.
    LARGEST: tl.constexpr = 2.0**500 if v.dtype == tl.float64 else 2.0**80
    whole_gy = tl.load(grad_y_ptr + index, mask, 0.0).to(T)
    gl = tl.load(grad_log_det_ptr + sample, mask, 0.0)
    outside = (v < -BOUND) | (v > BOUND)
    safe = tl.where(outside, 0.0, v)
    p_w, ends_x = _knots(raw_w, column, BINS, COLUMNS, BOUND, CENTRE, MIN_WIDTH, LOST_WIDTH)
    p_h, ends_y = _knots(raw_h, column, BINS, COLUMNS, BOUND, CENTRE, MIN_HEIGHT, LOST_HEIGHT)
    bin_, x0, x1, y0, y1, raw0, raw1 = _find_bin(
        safe, ends_x, ends_y, raw_d, column, INVERSE, BINS, BOUND
    )
    narrow, low, width, height, s, d0, d1, theta, phi, inverse_e, ratio, q, _ = _evaluate(
        safe,
        x0,
        x1,
        y0,
        y1,
        raw0,
        raw1,
        INVERSE,
        BOUND,
        LEAST_WIDTH,
        LEAST_HEIGHT,
        MIN_DERIVATIVE,
        SHIFT,
    )
    gy = tl.where(outside, 0.0, whole_gy)
    gl = tl.where(outside, 0.0, gl)

    inverse_width, inverse_s = 1.0 / width, width / height
    inverse_q = _limit(1.0 / q, LARGEST)
    theta2, phi2, product, skew = theta * theta, phi * phi, theta * phi, phi - theta
    # Derivatives of log|dy/dx| with respect to theta, s, and what d0 and d1 share.
    log_theta = 2.0 * (
        (d1 * theta + s * skew - d0 * phi) * inverse_q - skew * (d0 + d1 - 2.0 * s) * inverse_e
    )
    log_both = 2.0 * product * inverse_e
    log_s = (d0 + d1) * log_both * inverse_s + 2.0 * product * inverse_q
    if INVERSE:
        # x of y = f(x, p) has dx = (dy - f_p dp) / f': the gradient of f with -gx / f' for gy and
        # the log-determinant's sign turned.
        gl = -gl
        g_x0 = gy
        scale = inverse_s / inverse_e
        g_v = (gl * log_theta * inverse_width + gy) * (scale * (scale * inverse_q))
        g_v = _limit(g_v, LARGEST)
        gy = -g_v
    gr = gy * height * inverse_e * inverse_e
    gr_product = gr * product
    g_s = gl * log_s + gr_product * (d1 * theta2 - d0 * phi2)
    g_d0 = gl * (phi2 * inverse_q - log_both) + gr_product * phi * (s * phi + d1 * theta)
    g_d1 = gl * (theta2 * inverse_q - log_both) - gr_product * theta * (s * theta + d0 * phi)
    if not INVERSE:
        g_v = (gl * log_theta + gr * s * q) * inverse_width
        g_v = _limit(g_v, LARGEST)
        g_x0 = -g_v
    # A size that is the least one is a constant; of the axis of v it still moves the upper end.
    g_width = g_x0 * theta - g_s * s * inverse_width
    g_width = tl.where(narrow, 0.0 if INVERSE else g_x0, g_width)
    g_height = gy * ratio + g_s * inverse_width
    g_height = tl.where(low, gy if INVERSE else 0.0, g_height)
    g_raw0 = g_d0 * _math.sigmoid(raw0 + SHIFT)
    g_raw1 = g_d1 * _math.sigmoid(raw1 + SHIFT)

    tl.store(grad_x_ptr + index, tl.where(outside, whole_gy, g_v), mask)
    g_w = _sizes_gradient(p_w, column, bin_, g_x0, g_width, BINS, BOUND, MIN_WIDTH)
    _store_records(grad_widths_ptr, index, mask, column, BINS, g_w)
    g_h = _sizes_gradient(p_h, column, bin_, gy, g_height, BINS, BOUND, MIN_HEIGHT)
    _store_records(grad_heights_ptr, index, mask, column, BINS, g_h)
    before = tl.where(column[None, :] == bin_[:, None] - 1, g_raw0[:, None], 0.0)
    g_d = tl.where(column[None, :] == bin_[:, None], g_raw1[:, None], before)
    _store_records(grad_derivatives_ptr, index, mask, column, BINS - 1, g_d)


def _plan(n_samples: int, size: int, bins: int, dtype: torch.dtype) -> tuple[int, int, dict]:
    """(programs, chunks of a sample, options of the launch); sums depend on size, bins, dtype."""
    columns = triton.next_power_of_2(bins)
    values = _TILE_BYTES // min(4, dtype.itemsize)
    tile = max(1, values // columns)
    # A sample up to four tiles long is one larger tile, so that log_det needs no second kernel.
    elements = min(triton.next_power_of_2(size), 4 * tile)
    if size > elements:
        elements = tile
    tile = max(tile, elements)
    chunks = triton.cdiv(size, elements)
    programs = triton.cdiv(n_samples, tile // elements) * chunks
    blocks = {"BINS": bins, "COLUMNS": columns, "SAMPLES": tile // elements, "ELEMENTS": elements}
    return programs, chunks, {**blocks, **options(min(16, 4 * tile * columns // values))}


@functools.lru_cache
def _constants(
    inverse: bool, bound: float, minima: tuple[float, ...], bins: int, dtype: torch.dtype
) -> dict[str, Any]:
    width, height, derivative = minima
    # As the reference has it.
    least = 2.0**-200 if dtype == torch.float64 else 2.0**-40

    def lost(minimum: float) -> float:
        scale = 2 * bound * (1 - minimum * bins)
        return scale - torch.tensor(scale, dtype=accumulate_dtype(dtype), device="cpu").item()

    return {
        "INVERSE": inverse,
        "BOUND": bound,
        # 1.5 times the first power of two that is no less than the bound.
        "CENTRE": 1.5 * 2.0 ** math.ceil(math.log2(bound)),
        "MIN_WIDTH": width,
        "MIN_HEIGHT": height,
        "MIN_DERIVATIVE": derivative,
        "SHIFT": math.log(math.expm1(1 - derivative)),
        "LEAST_WIDTH": bound * max(width, least),
        "LEAST_HEIGHT": bound * max(height, least),
        "LOST_WIDTH": lost(width),
        "LOST_HEIGHT": lost(height),
    }


def _samples(x: Tensor, batch_dims: int) -> tuple[int, int]:
    """Number of samples and elements of one."""
    if not 0 <= batch_dims <= x.dim():
        raise RuntimeError("rq_spline: batch_dims is out of range")
    return math.prod(x.shape[:batch_dims]), math.prod(x.shape[batch_dims:])


def _parameters(
    x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor
) -> tuple[int, list[Tensor], dict[str, int]]:
    """Number of bins; the parameters as records, and the strides of those."""
    bins = widths.shape[-1] if widths.dim() > 0 else 0
    if bins == 0:
        raise RuntimeError("rq_spline: widths must have at least one bin")
    tensors, strides = [], {}
    for name, t, size in (
        ("widths", widths, bins),
        ("heights", heights, bins),
        ("derivatives", derivatives, bins - 1),
    ):
        check(f"rq_spline: {name}", t, x, (*x.shape, size), x.dtype)
        flat, strides[f"STRIDE_{name.upper()}"] = records(t)
        tensors.append(flat)
    return bins, tensors, strides


def rq_spline_fwd(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    batch_dims: int,
    inverse: bool,
    tail_bound: float,
    *minima: float,
) -> tuple[Tensor, Tensor]:
    """Raw operator fastgen::rq_spline_fwd."""
    n_samples, size = _samples(x, batch_dims)
    bins, parameters, strides = _parameters(x, widths, heights, derivatives)
    y = x.new_empty(x.shape)
    shape, dtype = x.shape[:batch_dims], accumulate_dtype(x.dtype)
    if x.numel() == 0:
        return y, x.new_zeros(shape, dtype=dtype)
    programs, chunks, launch = _plan(n_samples, size, bins, x.dtype)
    log_det = x.new_empty((*shape, chunks) if chunks > 1 else shape, dtype=dtype)
    _forward_kernel[(programs,)](
        x.contiguous(),
        *parameters,
        y,
        log_det,
        n_samples,
        size,
        chunks,
        **strides,
        **_constants(inverse, tail_bound, minima, bins, x.dtype),
        **launch,
    )
    return y, log_det.sum(-1) if chunks > 1 else log_det


def rq_spline_bwd(
    grad_y: Tensor,
    grad_log_det: Tensor,
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    batch_dims: int,
    inverse: bool,
    tail_bound: float,
    *minima: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw operator fastgen::rq_spline_bwd."""
    n_samples, size = _samples(x, batch_dims)
    bins, parameters, strides = _parameters(x, widths, heights, derivatives)
    check("rq_spline: grad_y", grad_y, x, x.shape, x.dtype)
    sums = accumulate_dtype(x.dtype)
    check("rq_spline: grad_log_det", grad_log_det, x, x.shape[:batch_dims], sums)
    grads = tuple(t.new_empty(t.shape) for t in (x, widths, heights, derivatives))
    if x.numel() == 0:
        return grads
    programs, chunks, launch = _plan(n_samples, size, bins, x.dtype)
    _backward_kernel[(programs,)](
        grad_y.contiguous(),
        grad_log_det.contiguous(),
        x.contiguous(),
        *parameters,
        *grads,
        n_samples,
        size,
        chunks,
        **strides,
        **_constants(inverse, tail_bound, minima, bins, x.dtype),
        **launch,
    )
    return grads
