"""instance_norm and adain in Triton: forward, gradient and gradient of the gradient by the same two
kernels.

Each of the three sums a few products over every plane and then maps its elements linearly:

    ORDER  reads      sums                         writes
    0      x          mean and squares             y
    1      dy, x      dy, dy d                     grad_x
    2      u, dy, x   dy, dy d, u, u d, u dy       gradients by grad_y and x

with d = x - mean. Bytes an element moves, at least: 2, 3 and 5 values. That is reached where the
planes of a program stay in registers ("whole") or in the caches between its two sweeps ("swept");
where there are too few planes, and for large channels_last samples, they are cut and read twice
("cut", after _reduce_kernel). A tile is (planes, elements) in either layout. Sums are about an
origin near the mean, in float32 for half tensors and in float64 else, so that the gradients of
parameters, whose terms cancel, are right to the last bits too; those of tiles and cuts are merged
in a fixed order. (float64 adds at half the rate of float32 on data centre GPUs, and one addition an
element and sum hides behind its bytes.)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastgen.kernels._launch import accumulate_dtype, check, options
from torch import Tensor

#: Elements of a tile that stays in registers, at most; bytes of a tensor, for orders 0, 1, 2.
_WHOLE = 16384
_WHOLE_BYTES = (2**16, 2**16, 2**15)
#: Elements of a tile where there are several, for orders 0, 1, 2; halved for float64.
_CHUNK = (8192, 4096, 2048)
#: Elements of a tile of several small planes.
_SMALL = 512
#: Programs to keep the multiprocessors of a large GPU busy, and tiles that a program sweeps over.
_PROGRAMS = 1024
_SWEEP = 64
#: Partial sums of a kind that a program merges, at most.
_PARTIALS = 4096

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SIZES = ("planes", "slow", "units", "splits", "chunks")


@triton.jit
def _place(
    planes,
    slow,
    units,
    splits,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """This program's planes, and where they lie.

    The dimension that is adjacent in memory is units * ALIGN long, so that the compiler knows what
    rows are multiples of.

    Returns:
        Where they start, the length of that dimension, the planes (ROWS, 1), which of them exist,
        the cut, and the sizes of planes and channels.
    """
    fast = units * ALIGN
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    row = tl.arange(0, ROWS)[:, None]
    if LAST:
        tiles = tl.cdiv(planes, ROWS)
        first = (pid % tiles * ROWS).to(tl.int64)
        split = pid // tiles % splits
        sample = (pid // (tiles * splits)).to(tl.int64)
        base = sample * slow * fast + first
        plane = sample * planes + first + row
        exists = row < (fast - first).to(tl.int32)
        size, channels = slow.to(tl.int64), fast
    else:
        first = (pid // splits).to(tl.int64) * ROWS
        split = pid % splits
        base = first * fast
        plane = first + row
        exists = row < planes - first
        size, channels = fast.to(tl.int64), slow
    return base, fast, plane, exists, split, size, channels


@triton.jit
def _tile(place, start, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offset (scalar, and inside the tile) and mask of the elements from `start` on."""
    base, fast, _, row_mask, _, size, _ = place
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    # 64 bits once a tile; offsets inside it fit 32.
    start = tl.cast(start, tl.int64)
    rest = tl.minimum(size - start, BLOCK).to(tl.int32)
    if LAST:
        base += start * fast
        inner = row + column * fast
    else:
        base += start
        inner = row * fast + column
    return base, inner, row_mask & (column < rest)


@triton.jit
def _writes(place):
    """Which planes this program writes the values of: those of the first cut."""
    _, _, plane, row_mask, split, _, _ = place
    return row_mask & (tl.broadcast_to(split, plane.shape) == 0)


@triton.jit
def _load(u_ptr, dy_ptr, x_ptr, tile, ORDER: tl.constexpr, HAS_U: tl.constexpr):
    """u, dy and x as they are stored; x in place of what is not there."""
    base, inner, mask = tile
    x = tl.load(x_ptr + base + inner, mask, 0.0)
    dy, u = x, x
    if ORDER > 0:
        dy = tl.load(dy_ptr + base + inner, mask, 0.0)
    if HAS_U:
        u = tl.load(u_ptr + base + inner, mask, 0.0)
    return u, dy, x


@triton.jit
def _products(values, origin, mask, ORDER: tl.constexpr, HAS_U: tl.constexpr):
    """What is summed over a tile, in the dtype of the origin; that of u only where there is one."""
    S: tl.constexpr = origin.dtype
    u, dy, x = values
    d = x.to(S) - origin
    if ORDER == 0:
        p0 = tl.where(mask, d, 0.0)
        p1 = p0 * p0
    else:
        p0 = dy.to(S)
        p1 = p0 * d
    p2, p3, p4 = p0, p0, p0
    if HAS_U:
        p2 = u.to(S)
        p3 = p2 * d
        p4 = p2 * p0
    return p0, p1, p2, p3, p4


@triton.jit
def _total(s):
    return tl.sum(s, 1, keep_dims=True)


@triton.jit
def _totals(sums, HAS_U: tl.constexpr):
    """Sums over the tile, (ROWS, 1); the first in place of those that are not used."""
    s0, s1, s2, s3, s4 = sums
    t0, t1 = _total(s0), _total(s1)
    t2, t3, t4 = t0, t0, t0
    if HAS_U:
        t2, t3, t4 = _total(s2), _total(s3), _total(s4)
    return t0, t1, t2, t3, t4


@triton.jit
def _added(s, p, GROUP: tl.constexpr):
    """s and the sums of p over groups of columns, those that a thread holds."""
    grouped = tl.reshape(p, (p.shape[0], GROUP, p.shape[1] // GROUP))
    return s + tl.sum(grouped, 1)


@triton.jit
def _pair(mean, T: tl.constexpr):
    """A value as the sum of two of dtype T."""
    high = mean.to(T)
    if mean.dtype == T:
        return high, tl.zeros_like(high)
    return high, (mean - high.to(mean.dtype)).to(T)


@triton.jit
def _statistics(totals, origin, count):
    """Mean and sum of squared distances from it of `count` elements, from sums about an origin."""
    delta = totals[0] * (1.0 / count)
    # A sum of squares cannot be negative; NaN stays.
    squares = totals[1] - totals[0] * delta
    return origin + delta, tl.where(squares < 0.0, 0.0, squares)


@triton.jit
def _parameter(ptr, place, DIMS: tl.constexpr, OTHERWISE: tl.constexpr, S: tl.constexpr):
    """Values of a (C,) or (B, C) tensor for the planes."""
    _, _, plane, row_mask, _, _, channels = place
    if DIMS == 0:
        value = tl.full(plane.shape, OTHERWISE, S)
    else:
        if DIMS == 1:
            plane = plane % channels
        value = tl.load(ptr + plane, row_mask, 0.0).to(S)
    return value


@triton.jit
def _rsqrt(v, EPS: tl.constexpr, T: tl.constexpr):
    """1 / sqrt(v) of a v that is at least EPS."""
    if T.primitive_bitwidth == 64 or EPS < 1e-30:
        r = (1.0 / tl.sqrt(v.to(tl.float64))).to(v.dtype)
    elif v.dtype == tl.float32:
        r = tl.rsqrt(v)
    else:
        # Newton's step doubles the digits of float32; dividing in float64 takes many registers.
        # Variances too large for float32 are scaled by 2^-140.
        large = v > 1e30
        v = tl.where(large, 7.174648137343064e-43, 1.0) * v
        r = tl.rsqrt(v.to(tl.float32)).to(tl.float64)
        r += 0.5 * r * (1.0 - v * r * r)
        r = tl.where(large, 8.470329472543003e-22, 1.0) * r
    return r


@triton.jit
def _coefficients(
    totals,
    mean,
    var,
    scale_ptr,
    p_ptr,
    q_ptr,
    of_scale_ptr,
    of_shift_ptr,
    place,
    EPS: tl.constexpr,
    ORDER: tl.constexpr,
    HAS_U: tl.constexpr,
    SCALE: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
):
    """The linear map of each plane, (ROWS, 1); writes what there is one of for each plane.

    Notation of fastgen.ops.instance_norm: r = 1 / sqrt(var + eps), a = r scale; a bar is a mean,
    xhat = r d. With alpha = -a mean(dy xhat) and beta = p - a mean(u xhat), order 2 is

        of dy:  a (u - ubar) + beta xhat + q
        of x:   r (alpha (u - ubar) + beta (dy - dybar) - xhat (alpha mean(u xhat)
                + beta mean(dy xhat) + of_scale a / (r n)))

    and order 1 a (dy - dybar - d r mean(dy xhat)). No r is multiplied by another before it meets
    the values: squares of it are infinite where the results are not.
    """
    _, _, plane, _, _, size, _ = place
    n = tl.cast(size, S)
    inverse_n = 1.0 / n
    r = _rsqrt(var + EPS, EPS, T)
    a = r * _parameter(scale_ptr, place, SCALE, 1.0, S)
    zero = tl.zeros_like(a)
    dy_mean, u_mean, alpha, beta, along = zero, zero, zero, zero, zero
    if ORDER > 0:
        dy_mean = inverse_n * totals[0]
        dy_xhat = r * (inverse_n * totals[1])
    if ORDER == 1:
        tl.store(of_scale_ptr + plane, r * totals[1], _writes(place))
        tl.store(of_shift_ptr + plane, totals[0], _writes(place))
        along = -r * dy_xhat
    if ORDER == 2:
        beta = _parameter(p_ptr, place, P, 0.0, S)
        u_xhat, projected = zero, zero
        if HAS_U:
            u_mean = inverse_n * totals[2]
            u_xhat = r * (inverse_n * totals[3])
            # The mean of dy times the projection of u.
            projected = (inverse_n * totals[4] - dy_mean * u_mean) - dy_xhat * u_xhat
            alpha = -a * dy_xhat
            beta -= a * u_xhat
        tl.store(of_scale_ptr + plane, r * n * projected, _writes(place))
        along = -(alpha * u_xhat + beta * dy_xhat + a * projected)
    high, low = _pair(mean, T)
    constant = _parameter(q_ptr, place, Q, 0.0, S)
    return (high, low, dy_mean.to(T), u_mean.to(T), constant.to(T), a.to(T), r.to(T), alpha.to(T),
            beta.to(T), along.to(T))  # fmt: skip


@triton.jit
def _map(
    out_ptr,
    of_x_ptr,
    tile,
    values,
    line,
    ORDER: tl.constexpr,
    HAS_U: tl.constexpr,
    T: tl.constexpr,
):
    """Writes the results of a tile."""
    high, low, dy_mean, u_mean, constant, a, r, alpha, beta, along = line
    base, inner, mask = tile
    u, dy, x = values
    d = (x.to(T) - high) - low
    if ORDER == 0:
        out = d * a + constant
    elif ORDER == 1:
        out = (dy.to(T) - dy_mean + d * along) * a
    else:
        xhat = d * r
        out = xhat * beta + constant
        of_x = (dy.to(T) - dy_mean) * beta + xhat * along
        if HAS_U:
            u = u.to(T) - u_mean
            out += u * a
            of_x += u * alpha
        tl.store(of_x_ptr + base + inner, of_x * r, mask)
    tl.store(out_ptr + base + inner, out, mask)


@triton.jit
def _load_statistics(mean_ptr, var_ptr, place, S: tl.constexpr):
    _, _, plane, row_mask, _, _, _ = place
    mean = tl.load(mean_ptr + plane, row_mask, 0.0)
    return mean.to(S), tl.load(var_ptr + plane, row_mask, 1.0).to(S)


@triton.jit
def _store_statistics(mean_ptr, var_ptr, mean, var, place):
    tl.store(mean_ptr + place[2], mean, _writes(place))
    tl.store(var_ptr + place[2], var, _writes(place))


@triton.jit
def _near_mean(x, count, T: tl.constexpr, S: tl.constexpr):
    """About the mean of the `count` elements of a tile."""
    return (tl.sum(x.to(T), 1, keep_dims=True) / tl.cast(count, T)).to(S)


@triton.jit
def _tiles_of_cut(split, chunks, size, BLOCK: tl.constexpr):
    """The first of this program's tiles, and the first that is not."""
    first = split.to(tl.int64) * chunks
    return first, tl.minimum(first + chunks, tl.cdiv(size, BLOCK))


@triton.jit
def _sweep(
    u_ptr,
    dy_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    place,
    first,
    last,
    ORDER: tl.constexpr,
    HAS_U: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
):
    """Sums over the tiles first to last - 1, and their origin.

    The mean of the first of k tiles is at most sqrt(k) standard deviations from that of all, so
    sums of squares about it do not cancel.
    """
    _, _, _, _, _, size, _ = place
    if ORDER == 0:
        tile = _tile(place, first * BLOCK, LAST, ROWS, BLOCK)
        _, _, x = _load(u_ptr, dy_ptr, x_ptr, tile, ORDER, HAS_U)
        origin = _near_mean(x, tl.minimum(BLOCK, size - first * BLOCK), T, S)
    else:
        origin, _ = _load_statistics(mean_ptr, var_ptr, place, S)
    zero = tl.zeros((ROWS, BLOCK // GROUP), S)
    s0, s1, s2, s3, s4 = zero, zero, zero, zero, zero
    for i in range(first, last):
        tile = _tile(place, i * BLOCK, LAST, ROWS, BLOCK)
        values = _load(u_ptr, dy_ptr, x_ptr, tile, ORDER, HAS_U)
        p0, p1, p2, p3, p4 = _products(values, origin, tile[2], ORDER, HAS_U)
        s0, s1 = _added(s0, p0, GROUP), _added(s1, p1, GROUP)
        if HAS_U:
            s2, s3, s4 = _added(s2, p2, GROUP), _added(s3, p3, GROUP), _added(s4, p4, GROUP)
    return _totals((s0, s1, s2, s3, s4), HAS_U), origin


@triton.jit(do_not_specialize=_SIZES)
def _reduce_kernel(
    u_ptr,
    dy_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    partials_ptr,
    planes,
    slow,
    units,
    splits,
    chunks,
    ORDER: tl.constexpr,
    HAS_U: tl.constexpr,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
):
    """Sums of one of the cuts of planes, `chunks` tiles each, to partials (planes, sums, cuts)."""
    place = _place(planes, slow, units, splits, LAST, ALIGN, ROWS, False)
    _, _, plane, row_mask, split, size, _ = place
    first, last = _tiles_of_cut(split, chunks, size, BLOCK)
    totals, origin = _sweep(
        u_ptr, dy_ptr, x_ptr, mean_ptr, var_ptr, place, first, last, ORDER, HAS_U, LAST,
        ROWS, BLOCK, GROUP, T, S,
    )  # fmt: skip
    t0, t1, t2, t3, t4 = totals
    if ORDER == 0:
        count = tl.minimum(size, last * BLOCK) - first * BLOCK
        t0, t1 = _statistics(totals, origin, count.to(S))
    SUMS: tl.constexpr = 5 if HAS_U else 2
    partials_ptr += split + plane * (SUMS * splits)
    tl.store(partials_ptr, t0, row_mask)
    tl.store(partials_ptr + splits, t1, row_mask)
    if HAS_U:
        tl.store(partials_ptr + 2 * splits, t2, row_mask)
        tl.store(partials_ptr + 3 * splits, t3, row_mask)
        tl.store(partials_ptr + 4 * splits, t4, row_mask)


@triton.jit
def _partials(ptr, place, splits, HAS_U: tl.constexpr, SPLITS: tl.constexpr):
    """The partial sums of the cuts, (ROWS, SPLITS) each; the first in place of unused ones."""
    _, _, plane, row_mask, _, _, _ = place
    part = tl.arange(0, SPLITS)[None, :]
    mask = row_mask & (part < splits)
    SUMS: tl.constexpr = 5 if HAS_U else 2
    ptr += plane * (SUMS * splits) + part
    p0 = tl.load(ptr, mask, 0.0)
    p1 = tl.load(ptr + splits, mask, 0.0)
    p2, p3, p4 = p0, p0, p0
    if HAS_U:
        p2 = tl.load(ptr + 2 * splits, mask, 0.0)
        p3 = tl.load(ptr + 3 * splits, mask, 0.0)
        p4 = tl.load(ptr + 4 * splits, mask, 0.0)
    return p0, p1, p2, p3, p4


@triton.jit
def _merged_statistics(
    partials, size, chunks, BLOCK: tl.constexpr, SPLITS: tl.constexpr, S: tl.constexpr
):
    """Mean and sum of squared distances from it, of those of the cuts (Chan et al. 1979)."""
    cut = tl.cast(chunks, tl.int64) * BLOCK
    part = tl.arange(0, SPLITS)[None, :]
    count = tl.maximum(tl.minimum(cut, size - part * cut), 0).to(S)
    mean = _total(partials[0] * count) / tl.cast(size, S)
    distance = tl.where(count > 0.0, partials[0] - mean, 0.0)
    return mean, _total(partials[1] + count * distance * distance)


@triton.jit(do_not_specialize=_SIZES)
def _norm_kernel(
    u_ptr,
    dy_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    partials_ptr,
    out_ptr,
    of_x_ptr,
    scale_ptr,
    p_ptr,
    q_ptr,
    of_scale_ptr,
    of_shift_ptr,
    planes,
    slow,
    units,
    splits,
    chunks,
    EPS: tl.constexpr,
    PHASE: tl.constexpr,
    ORDER: tl.constexpr,
    HAS_U: tl.constexpr,
    SCALE: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
):
    """Planes that are one tile ("whole"), that one program sweeps over twice, the second time in
    the caches ("swept"), or whose cuts _reduce_kernel has summed ("cut")."""
    place = _place(planes, slow, units, splits, LAST, ALIGN, ROWS, PHASE == "cut")
    _, _, _, _, split, size, _ = place
    n = tl.cast(size, S)
    first, last = _tiles_of_cut(split, chunks, size, BLOCK)
    if PHASE == "whole":
        tile = _tile(place, 0, LAST, ROWS, BLOCK)
        values = _load(u_ptr, dy_ptr, x_ptr, tile, ORDER, HAS_U)
        if ORDER == 0:
            origin = _near_mean(values[2], size, T, S)
        else:
            origin, _ = _load_statistics(mean_ptr, var_ptr, place, S)
        totals = _totals(_products(values, origin, tile[2], ORDER, HAS_U), HAS_U)
    elif PHASE == "swept":
        totals, origin = _sweep(
            u_ptr, dy_ptr, x_ptr, mean_ptr, var_ptr, place, first, last, ORDER, HAS_U, LAST,
            ROWS, BLOCK, GROUP, T, S,
        )  # fmt: skip
    else:
        partials = _partials(partials_ptr, place, splits, HAS_U, SPLITS)
        totals = _totals(partials, HAS_U)
    if ORDER > 0:
        mean, var = _load_statistics(mean_ptr, var_ptr, place, S)
    else:
        if PHASE == "cut":
            mean, squares = _merged_statistics(partials, size, chunks, BLOCK, SPLITS, S)
        else:
            mean, squares = _statistics(totals, origin, n)
        var = squares * (1.0 / n)
        _store_statistics(mean_ptr, var_ptr, mean, var, place)
    line = _coefficients(
        totals, mean, var, scale_ptr, p_ptr, q_ptr, of_scale_ptr, of_shift_ptr, place, EPS, ORDER,
        HAS_U, SCALE, P, Q, T, S,
    )  # fmt: skip
    if PHASE == "whole":
        _map(out_ptr, of_x_ptr, tile, values, line, ORDER, HAS_U, T)
    else:
        # The last tile first: it is surely still in cache.
        for i in range(first, last):
            tile = _tile(place, (first + last - 1 - i) * BLOCK, LAST, ROWS, BLOCK)
            values = _load(u_ptr, dy_ptr, x_ptr, tile, ORDER, HAS_U)
            _map(out_ptr, of_x_ptr, tile, values, line, ORDER, HAS_U, T)


class _Plan(NamedTuple):
    """How planes become programs; a function of shape, layout and dtype alone, like the sums.

    Attributes:
        phase: of _norm_kernel.
        programs: of a launch.
        splits: the cuts of a plane.
        chunks: tiles a program sweeps over.
        launch: block sizes, and options of the launch.
    """

    phase: str
    programs: int
    splits: int
    chunks: int
    launch: dict[str, Any]


def _plan(order: int, planes: int, groups: int, size: int, last: bool, dtype: torch.dtype) -> _Plan:
    wide = 2 if dtype == torch.float64 else 1
    rows, whole = 1, triton.next_power_of_2(size)
    if last:
        # 128 adjacent bytes of channels.
        rows = min(triton.next_power_of_2(planes), 128 // dtype.itemsize)
    elif whole < _SMALL // wide:
        rows = min(triton.next_power_of_2(planes), _SMALL // wide // whole)
    tiles = triton.cdiv(planes, rows) * groups
    limit = min(_WHOLE, _WHOLE_BYTES[order] // dtype.itemsize)
    if rows * whole <= limit and (not last or size * planes < 2**31):
        return _Plan("whole", tiles, 1, 1, _launch(order, rows, whole, last, dtype))
    block = max(1, _CHUNK[order] // wide // rows)
    if last:
        block = min(block, 2**30 // planes)
    launch = _launch(order, rows, block, last, dtype)
    chunks = triton.cdiv(size, block)
    if not last and chunks <= _SWEEP and 4 * tiles >= _PROGRAMS:
        return _Plan("swept", tiles, 1, chunks, launch)
    wanted = max(triton.cdiv(_PROGRAMS, tiles), triton.cdiv(chunks, _SWEEP))
    wanted = min(wanted, _PARTIALS // rows)
    chunks_each = triton.cdiv(chunks, min(chunks, wanted))
    splits = triton.cdiv(chunks, chunks_each)
    return _Plan("cut", tiles * splits, splits, chunks_each, launch)


def _launch(order: int, rows: int, block: int, last: bool, dtype: torch.dtype) -> dict[str, Any]:
    wide = 2 if dtype == torch.float64 else 1
    # Sixteen float32 values a thread and tensor, or eight where five sums are of float64.
    warps = rows * block * wide // (256 if order == 2 and (last or dtype.itemsize >= 4) else 512)
    if rows > 1 and not last:
        # What a thread keeps for each of its planes takes more than their elements do: it has
        # parts of two planes, or of one.
        warps = rows * block // (32 if order == 2 else 64) // max(1, block // 32)
    warps = min(16, max(1, warps))
    adjacent = 16 // dtype.itemsize
    columns = 32 * warps * adjacent // min(rows, 32 * adjacent) if last else 32 * warps * adjacent
    return {"ROWS": rows, "BLOCK": block, "GROUP": max(1, block // columns), **options(warps)}


def _layout(x: Tensor) -> torch.memory_format:
    """channels_last where x is, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _run(
    order: int,
    x: Tensor,
    dy: Tensor | None,
    u: Tensor | None,
    outs: tuple[Tensor, ...],
    per_plane: tuple[Tensor, ...],
    parameters: tuple[Tensor | None, ...],
    eps: float,
) -> None:
    """Launches order `order`: fills outs and per_plane (mean, var, gradients of scale and shift).

    `parameters` are scale, p and q of the kernels, (C,) or (B, C), or None.
    """
    batch, channels = x.shape[:2]
    size = math.prod(x.shape[2:])
    layout = _layout(x)
    last = layout != torch.contiguous_format
    u, dy, x = (None if t is None else t.contiguous(memory_format=layout) for t in (u, dy, x))
    scale, p, q = (None if t is None else t.contiguous() for t in parameters)
    planes, groups = (channels, batch) if last else (batch * channels, 1)
    fast, slow = (channels, size) if last else (size, channels)
    align = math.gcd(fast, 16)
    plan = _plan(order, planes, groups, size, last, x.dtype)
    sums = (batch * channels, 2 if u is None else 5, plan.splits if plan.phase == "cut" else 0)
    partials = x.new_empty(sums, dtype=torch.float32 if x.dtype.itemsize < 4 else torch.float64)
    # Pointers that are not used are those of x.
    inputs = (x if u is None else u, x if dy is None else dy, x, *per_plane[:2], partials)
    others = (*outs, *(x,) * (2 - len(outs)))
    others += tuple(x if t is None else t for t in (scale, p, q))
    others += (*per_plane[2:], *(x,) * (4 - len(per_plane)))
    sizes = (planes, slow, fast // align, plan.splits, plan.chunks)
    kind = {
        "ORDER": order,
        "HAS_U": u is not None,
        "LAST": last,
        "ALIGN": align,
        "T": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "S": tl.float32 if x.dtype.itemsize < 4 else tl.float64,
    }
    if plan.phase == "cut":
        _reduce_kernel[(plan.programs,)](*inputs, *sizes, **kind, **plan.launch)
    _norm_kernel[(plan.programs,)](
        *inputs,
        *others,
        *sizes,
        EPS=eps,
        PHASE=plan.phase,
        SCALE=_dims(scale),
        P=_dims(p),
        Q=_dims(q),
        SPLITS=triton.next_power_of_2(plan.splits),
        **kind,
        **plan.launch,
    )


def _dims(parameter: Tensor | None) -> int:
    return 0 if parameter is None else parameter.dim()


def _check_parameter(name: str, t: Tensor | None, x: Tensor) -> None:
    if t is None:
        return
    dtype = x.dtype if t.dtype == x.dtype else accumulate_dtype(x.dtype)
    check(f"instance_norm: {name}", t, x, x.shape[1:2] if t.dim() == 1 else x.shape[:2], dtype)


def _check_input(x: Tensor) -> None:
    if x.dim() < 3:
        raise RuntimeError("instance_norm: expected x of at least three dimensions")
    if x.dtype not in _DTYPES:
        raise RuntimeError("instance_norm: expected float32, float64, float16 or bfloat16")


def _check(x: Tensor, mean: Tensor, var: Tensor, **same: Tensor | None) -> None:
    _check_input(x)
    for name, t in (("mean", mean), ("var", var)):
        check(f"instance_norm: {name}", t, x, x.shape[:2], torch.float64)
    for name, t in same.items():
        if t is not None:
            check(f"instance_norm: {name}", t, x, x.shape, x.dtype)


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


def instance_norm_fwd(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw operator fastgen::instance_norm_fwd."""
    _check_input(x)
    _check_parameter("scale", scale, x)
    _check_parameter("shift", shift, x)
    y = _dense_like(x)
    if x.numel() == 0:
        mean = x.new_zeros(x.shape[:2], dtype=torch.float64)
        return y, mean, mean.clone()
    mean, var = (x.new_empty(x.shape[:2], dtype=torch.float64) for _ in range(2))
    _run(0, x, None, None, (y,), (mean, var), (scale, None, shift), eps)
    return y, mean, var


def _per_plane(x: Tensor, scale: Tensor | None) -> Tensor:
    """Memory for the gradient of a parameter: in float64 where the batch is yet to be summed."""
    of_channels = scale is not None and scale.dim() == 1
    dtype = torch.float64 if of_channels else accumulate_dtype(x.dtype)
    return (x.new_empty if x.numel() else x.new_zeros)(x.shape[:2], dtype=dtype)


def _per_parameter(of_planes: Tensor, scale: Tensor | None) -> Tensor:
    """The gradient of a parameter, of the shape of scale."""
    if scale is None or scale.dim() == 2:
        return of_planes
    return of_planes.sum(0).to(accumulate_dtype(scale.dtype))


def instance_norm_bwd(
    grad_y: Tensor, x: Tensor, mean: Tensor, var: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw operator fastgen::instance_norm_bwd."""
    _check(x, mean, var, grad_y=grad_y)
    _check_parameter("scale", scale, x)
    grad_x, of_scale, of_shift = _dense_like(x), _per_plane(x, scale), _per_plane(x, scale)
    if x.numel() > 0:
        statistics = (mean.contiguous(), var.contiguous(), of_scale, of_shift)
        _run(1, x, grad_y, None, (grad_x,), statistics, (scale, None, None), eps)
    return grad_x, _per_parameter(of_scale, scale), _per_parameter(of_shift, scale)


def instance_norm_bwd_bwd(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None,
    u: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw operator fastgen::instance_norm_bwd_bwd."""
    _check(x, mean, var, grad_y=grad_y, u=u)
    for name, t in (("scale", scale), ("p", p), ("q", q)):
        _check_parameter(name, t, x)
    of_grad_y, of_x, of_scale = _dense_like(x), _dense_like(x), _per_plane(x, scale)
    if x.numel() > 0:
        statistics = (mean.contiguous(), var.contiguous(), of_scale)
        _run(2, x, grad_y, u, (of_grad_y, of_x), statistics, (scale, p, q), eps)
    return of_grad_y, of_x, _per_parameter(of_scale, scale)
