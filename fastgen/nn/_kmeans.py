"""Statistics of rows: k-means, random rows, sums over ranks. Nothing here waits for the device.

The rows of all ranks are one batch, rank after rank. What is drawn at random is drawn by rank 0 and
told to the others: the result is that of one process with the joint batch, up to rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from fastgen import ops
from fastgen.nn._ranks import shared

__all__ = [
    "Draw",
    "agree",
    "all_reduce",
    "candidates",
    "finite_rows",
    "finite_sums",
    "kmeans",
    "picks",
    "row_statistics",
    "spare",
]


class Draw(NamedTuple):
    """Random numbers that all ranks have, and where the rows of this rank are in the joint batch.

    Attributes:
        total: (...) int64, valid rows of all ranks.
        before: (...) int64, valid rows of the ranks before this one.
        numbers: (..., K + 1) float64, uniform in [0, 1).
    """

    total: Tensor
    before: Tensor
    numbers: Tensor


def all_reduce(packed: Tensor, sync: bool) -> Tensor:
    """Sums `packed` over the ranks of the default process group, in place, where it is shared."""
    if shared(sync):
        dist.all_reduce(packed)
    return packed


def agree(valid: Tensor, num_codes: int, sync: bool) -> Draw:
    """Draws for `num_codes` codes, in one small collective; `valid` (...): valid rows of ours."""
    numbers = torch.rand(*valid.shape, num_codes + 1, dtype=torch.float64, device=valid.device)
    if not shared(sync):
        return Draw(valid, torch.zeros_like(valid), numbers)
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = torch.where(torch.arange(world, device=valid.device) == rank, valid[..., None], 0)
    packed = torch.cat([counts.to(numbers.dtype), numbers if rank == 0 else 0 * numbers], -1)
    all_reduce(packed, sync)
    counts, numbers = packed[..., :world].long(), packed[..., world:]
    return Draw(counts.sum(-1), counts[..., :rank].sum(-1), numbers)


def finite_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """(N,) bool: the rows of `rows` (N, D) in `mask` (N,) whose elements have a finite sum."""
    finite = finite_sums(rows)
    return finite if mask is None else finite & mask


def finite_sums(rows: Tensor) -> Tensor:
    """(N,) bool: whether the sum of each row (N, D) is finite; isfinite().all(1) is slow."""
    return rows.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).isfinite()


def row_statistics(
    rows: Tensor, indices: Tensor, valid: Tensor, num_codes: int
) -> tuple[Tensor, Tensor]:
    """counts (K,) and sums (K, D) of the valid rows of each code.

    Args:
        rows: (N, D). indices: (N,) int64. valid: (N,) bool.
    """
    indices = torch.where(valid, indices, num_codes)
    counts, sums = ops.vq_codebook_stats(rows, indices, num_codes + 1)
    return counts[:num_codes], sums[:num_codes]


def spare(counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The joint statistics, zeros for a code whose sum overflows."""
    finite = finite_sums(sums)
    return torch.where(finite, counts, 0), torch.where(finite[:, None], sums, 0)


def picks(draw: Draw) -> Tensor:
    """(K,) int64: numbers of random valid rows of the joint batch, distinct where it has as many.

    Stratified: from a random start the valid rows are cut into K equal runs, and one row is drawn
    from each, so that neither a sort nor a read-back of the number of valid rows is needed.
    """
    count, total = draw.numbers.shape[-1] - 1, draw.total
    part = torch.arange(count, device=total.device)
    first = part * total // count
    width = (part + 1) * total // count - first
    start = (draw.numbers[-1] * total).long()
    return (first + (draw.numbers[:-1] * width).long() + start) % total.clamp(min=1)


def candidates(rows: Tensor, valid: Tensor, draw: Draw) -> Tensor:
    """A random row for each code, and in a last column 1 where it is ours and finite: (K, D + 1).

    A row that another rank has is zeros here, so that a sum over ranks gives every rank the rows.
    """
    if rows.shape[0] == 0:
        return rows.new_zeros(draw.numbers.shape[-1] - 1, rows.shape[1] + 1)
    nth, reached = picks(draw) - draw.before, valid.cumsum(0)
    picked = rows.index_select(0, torch.searchsorted(reached, nth + 1).clamp(max=len(rows) - 1))
    ours = (nth >= 0) & (nth < reached[-1]) & finite_sums(picked)
    return torch.cat([torch.where(ours[:, None], picked, 0), ours[:, None].to(rows.dtype)], 1)


def kmeans(
    rows: Tensor,
    valid: Tensor,
    codebook: Tensor,
    iterations: int,
    *,
    spherical: bool,
    sync: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm from random distinct rows.

    Args:
        rows: (N, D), unit vectors for `spherical`.
        valid: (N,) bool.
        codebook: (K, D), the start of a code for which no rank has a row.
        iterations: rounds of assigning the rows and averaging; a code without rows stays.
        spherical: bring the means back to unit length.
        sync: the rows are those of all ranks.

    Returns:
        codes (K, D), the number of rows (K,) that the last round gave them, and the number () of
        valid rows.
    """
    draw = agree(valid.sum(), codebook.shape[0], sync)
    start = all_reduce(candidates(rows, valid, draw), sync)
    codes = torch.where(start[:, -1:] > 0, start[:, :-1], codebook)
    counts = codes.new_zeros(codes.shape[0])
    for _ in range(iterations):
        indices = ops.vq_nearest(rows, codes)
        counts, sums = row_statistics(rows, indices, valid, codes.shape[0])
        packed = all_reduce(torch.cat([counts[:, None], sums], 1), sync)
        counts, sums = spare(packed[:, 0], packed[:, 1:])
        means = sums / counts.clamp(min=1)[:, None]
        if spherical:
            means = normalize(means, dim=1)
        codes = torch.where(counts[:, None] > 0, means, codes)
    return codes, counts, draw.total
