"""affine_coupling in Triton: forward or inverse in one pass, and its gradient in one pass.

Values an element moves, at least: 4 forward (x, raw_scale, shift; y), 5 in its gradient (grad_y, x,
raw_scale; two gradients, that of shift being grad_y), 7 in that of the inverse. A program works on
a tile of whole rows, or on one of the equal chunks of a long row; sums of chunks are added in a
fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastgen.kernels import _math
from fastgen.kernels._launch import accumulate_dtype, check, options, rows
from torch import Tensor

#: Rows up to this size are one tile, so that log_det needs no second kernel. A quarter of it
#: in float64, and so for the others.
_WHOLE_ROW = 8192
_CHUNK = 4096
#: Elements of a tile of several short rows.
_TILE = 1024


@triton.jit
def _log_scale(raw, FACTOR: tl.constexpr, SCALE: tl.constexpr):
    """log s and d(log s) / d(raw)."""
    if SCALE == "exp":
        return raw, tl.full(raw.shape, 1.0, raw.dtype)
    if SCALE == "tanh":
        t = _math.tanh(raw)
        return FACTOR * t, FACTOR * (1.0 - t * t)
    if SCALE == "sigmoid":
        # log sigmoid(a) = -softplus(-a): log(sigmoid(a)) underflows for a < -88.
        return -_math.softplus(-2.0 - raw), _math.sigmoid(-2.0 - raw)
    SCALED: tl.constexpr = FACTOR * 0.6366197723675814
    return SCALED * _math.atan(raw), SCALED / (1.0 + raw * raw)


@triton.jit
def _log_sum(total, whole, rest):
    """log(whole + rest) for a sum rounded to total, whole being 0 or 1: what the sum of 1 and a
    small rest has no room for is most of its logarithm."""
    return _math.log(total) + tl.where(rest < 1.0, rest - (total - whole), 0.0)


@triton.jit
def _raised_sigmoid(raw, MIN_SCALE: tl.constexpr):
    """As :func:`_softplus`, of s = sigmoid(raw + 2) + MIN_SCALE."""
    WHOLE: tl.constexpr = 0.0 if MIN_SCALE < 0.5 else 1.0
    BEYOND: tl.constexpr = MIN_SCALE - WHOLE
    a = raw + 2.0
    e = _math.exp(-tl.abs(a))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    whole = tl.where(a < 0.0, WHOLE, 1.0)
    rest = tl.where(a < 0.0, BEYOND + smaller, MIN_SCALE - smaller)
    s = whole + rest
    return _log_sum(s, whole, rest), larger * smaller * (1.0 / s), s


@triton.jit
def _softplus(raw, MIN_SCALE: tl.constexpr):
    """log s, d(log s) / d(raw) and s = softplus(raw) + MIN_SCALE."""
    WHOLE: tl.constexpr = 0.0 if MIN_SCALE < 0.5 else 1.0
    BEYOND: tl.constexpr = MIN_SCALE - WHOLE
    e = _math.exp(-tl.abs(raw))
    rest = BEYOND + _math.softplus(raw)
    s = WHOLE + rest
    slope = tl.where(raw < 0.0, e, 1.0) / (1.0 + e) * (1.0 / s)
    if MIN_SCALE > 0.0:
        return _log_sum(s, WHOLE, rest), slope, s
    # log softplus(a) is a as far as rounding goes below -40; softplus itself underflows.
    low = raw < -40.0
    log_s = tl.where(low, raw, _math.log(tl.where(low, 1.0, s)))
    return log_s, tl.where(low, 1.0, slope), s


@triton.jit
def _scale_terms(
    raw, FACTOR: tl.constexpr, MIN_SCALE: tl.constexpr, SCALE: tl.constexpr, INVERSE: tl.constexpr
):
    """log s, d(log s) / d(raw), and what x is multiplied by: s, or 1 / s for the inverse."""
    if SCALE == "softplus":
        log_s, slope, s = _softplus(raw, MIN_SCALE)
        return log_s, slope, 1.0 / s if INVERSE else s
    if SCALE == "sigmoid" and MIN_SCALE > 0.0:
        log_s, slope, s = _raised_sigmoid(raw, MIN_SCALE)
        return log_s, slope, 1.0 / s if INVERSE else s
    log_s, slope = _log_scale(raw, FACTOR, SCALE)
    return log_s, slope, _math.exp(-log_s if INVERSE else log_s)


@triton.jit
def _tile(n_rows, size, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tile: its first row and column, the rows (ROWS, 1) and columns (1, BLOCK)
    from there, and which of them exist."""
    pid = tl.program_id(0)
    first_row = (pid // chunks).to(tl.int64) * ROWS
    first_column = (pid % chunks).to(tl.int64) * BLOCK
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < n_rows - first_row) & (column < size - first_column)
    return first_row, first_column, row, column, mask


@triton.jit
def _load(ptr, stride, tile, T: tl.constexpr):
    first_row, first_column, row, column, mask = tile
    # One 64-bit offset a tile; those inside it fit 32 bits (rows() sees to it).
    ptr += first_row * stride + first_column
    return tl.load(ptr + (row * stride + column), mask, 0.0).to(T)


@triton.jit
def _store(ptr, size, tile, value):
    first_row, first_column, row, column, mask = tile
    ptr += first_row * size + first_column
    tl.store(ptr + (row * size + column), value, mask)


@triton.jit
def _forward_kernel(
    x_ptr,
    raw_ptr,
    shift_ptr,
    y_ptr,
    log_det_ptr,
    stride_x,
    stride_raw,
    stride_shift,
    n_rows,
    size,
    chunks,
    FACTOR: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = _tile(n_rows, size, chunks, ROWS, BLOCK)
    T: tl.constexpr = log_det_ptr.dtype.element_ty
    x = _load(x_ptr, stride_x, tile, T)
    raw = _load(raw_ptr, stride_raw, tile, T)
    shift = _load(shift_ptr, stride_shift, tile, T)
    log_s, _, multiplier = _scale_terms(raw, FACTOR, MIN_SCALE, SCALE, INVERSE)
    if INVERSE:
        log_s = -log_s
        y = (x - shift) * multiplier
    else:
        y = x * multiplier + shift
    _store(y_ptr, size, tile, y)
    first_row, _, row, _, mask = tile
    total = tl.sum(tl.where(mask, log_s, 0.0), 1, keep_dims=True)
    log_det_ptr += first_row * chunks + tl.program_id(0) % chunks
    tl.store(log_det_ptr + row * chunks, total, row < n_rows - first_row)


@triton.jit
def _backward_kernel(
    grad_y_ptr,
    grad_log_det_ptr,
    x_ptr,
    raw_ptr,
    shift_ptr,
    grad_x_ptr,
    grad_raw_ptr,
    grad_shift_ptr,
    stride_grad_y,
    stride_grad_log_det,
    stride_x,
    stride_raw,
    stride_shift,
    n_rows,
    size,
    chunks,
    FACTOR: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = _tile(n_rows, size, chunks, ROWS, BLOCK)
    T: tl.constexpr = grad_log_det_ptr.dtype.element_ty
    grad_y = _load(grad_y_ptr, stride_grad_y, tile, T)
    x = _load(x_ptr, stride_x, tile, T)
    raw = _load(raw_ptr, stride_raw, tile, T)
    first_row, _, row, _, _ = tile
    grad_log_det_ptr += first_row * stride_grad_log_det
    row_mask = row < n_rows - first_row
    grad_log_det = tl.load(grad_log_det_ptr + row * stride_grad_log_det, row_mask, 0.0)
    _, slope, multiplier = _scale_terms(raw, FACTOR, MIN_SCALE, SCALE, INVERSE)
    grad_x = grad_y * multiplier
    if INVERSE:
        shift = _load(shift_ptr, stride_shift, tile, T)
        _store(grad_shift_ptr, size, tile, -grad_x)
        grad_raw = -slope * (grad_x * (x - shift) + grad_log_det)
    else:
        grad_raw = slope * (grad_x * x + grad_log_det)
    _store(grad_x_ptr, size, tile, grad_x)
    _store(grad_raw_ptr, size, tile, grad_raw)


def _plan(n_rows: int, size: int, dtype: torch.dtype) -> tuple[int, int, dict[str, Any]]:
    """(programs, chunks of a row, options of the launch); sums depend on sizes and dtype alone."""
    wide = 4 if dtype == torch.float64 else 1
    if size > _WHOLE_ROW // wide:
        block, tile = _CHUNK // wide, _CHUNK // wide
    else:
        block = triton.next_power_of_2(size)
        tile = max(block, min(_TILE // wide, triton.next_power_of_2(n_rows) * block))
    chunks = triton.cdiv(size, block)
    programs = triton.cdiv(n_rows, tile // block) * chunks
    # Eight float32 values a thread and tensor, sixteen at most.
    warps = min(16, max(1, tile * wide // 256))
    return programs, chunks, {"ROWS": tile // block, "BLOCK": block, **options(warps)}


def _check(x: Tensor, **others: Tensor) -> None:
    if x.dim() == 0:
        raise RuntimeError("affine_coupling: x must have at least one dimension")
    for name, t in others.items():
        check(f"affine_coupling: {name}", t, x, x.shape, x.dtype)


def affine_coupling_fwd(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    scale: str,
    inverse: bool,
    scale_factor: float,
    min_scale: float,
) -> tuple[Tensor, Tensor]:
    """Raw operator fastgen::affine_coupling_fwd."""
    _check(x, raw_scale=raw_scale, shift=shift)
    y = x.new_empty(x.shape)
    dtype = accumulate_dtype(x.dtype)
    if x.numel() == 0:
        return y, x.new_zeros(x.shape[:1], dtype=dtype)
    n_rows, size = x.shape[0], x.numel() // x.shape[0]
    programs, chunks, launch = _plan(n_rows, size, x.dtype)
    log_det = x.new_empty((n_rows, chunks) if chunks > 1 else (n_rows,), dtype=dtype)
    (x, stride_x), (raw_scale, stride_raw), (shift, stride_shift) = map(rows, (x, raw_scale, shift))
    _forward_kernel[(programs,)](
        x,
        raw_scale,
        shift,
        y,
        log_det,
        stride_x,
        stride_raw,
        stride_shift,
        n_rows,
        size,
        chunks,
        FACTOR=scale_factor,
        MIN_SCALE=min_scale,
        SCALE=scale,
        INVERSE=inverse,
        **launch,
    )
    return y, log_det.sum(1) if chunks > 1 else log_det


def affine_coupling_bwd(
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
    """Raw operator fastgen::affine_coupling_bwd; forward has no third result, that is grad_y."""
    _check(x, grad_y=grad_y, raw_scale=raw_scale, shift=shift)
    check("affine_coupling: grad_log_det", grad_log_det, x, x.shape[:1], accumulate_dtype(x.dtype))
    grad_x, grad_raw = x.new_empty(x.shape), x.new_empty(x.shape)
    grad_shift = x.new_empty(x.shape if inverse else (0,))
    if x.numel() == 0:
        return grad_x, grad_raw, grad_shift
    n_rows, size = x.shape[0], x.numel() // x.shape[0]
    programs, chunks, launch = _plan(n_rows, size, x.dtype)
    (grad_y, stride_grad_y), (x, stride_x) = rows(grad_y), rows(x)
    # Forward's gradient does not read shift.
    (raw_scale, stride_raw), (shift, stride_shift) = map(rows, (raw_scale, shift if inverse else x))
    _backward_kernel[(programs,)](
        grad_y,
        grad_log_det,
        x,
        raw_scale,
        shift,
        grad_x,
        grad_raw,
        grad_shift,
        stride_grad_y,
        grad_log_det.stride(0),
        stride_x,
        stride_raw,
        stride_shift,
        n_rows,
        size,
        chunks,
        FACTOR=scale_factor,
        MIN_SCALE=min_scale,
        SCALE=scale,
        INVERSE=inverse,
        **launch,
    )
    return grad_x, grad_raw, grad_shift
