"""Statistics of rows: k-means, random rows, sums over ranks. Nothing here waits for the device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from fastgen import ops

__all__ = ["all_reduce", "candidates", "kmeans", "row_statistics", "sample_rows", "shared"]


def shared(sync: bool) -> bool:
    """Whether statistics are summed over ranks: `sync`, and there is more than one."""
    return sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce(packed: Tensor, sync: bool) -> Tensor:
    """Sums `packed` over the ranks of the default process group, in place, where it is shared."""
    if shared(sync):
        dist.all_reduce(packed)
    return packed


def row_statistics(
    rows: Tensor, indices: Tensor, mask: Tensor | None, num_codes: int
) -> tuple[Tensor, Tensor]:
    """counts (K,) and sums (K, D) of the rows of each code; zeros where the sum is not finite.

    Args:
        rows: (N, D). indices: (N,) int64. mask: (N,) bool, False where a row does not count.
    """
    if mask is None:
        counts, sums = ops.vq_codebook_stats(rows, indices, num_codes)
    else:
        indices = torch.where(mask, indices, num_codes)
        counts, sums = ops.vq_codebook_stats(rows, indices, num_codes + 1)
        counts, sums = counts[:num_codes], sums[:num_codes]
    finite = sums.isfinite().all(1)
    return torch.where(finite, counts, 0), torch.where(finite[:, None], sums, 0)


def sample_rows(rows: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """`count` random rows of `rows` (N > 0, D), distinct where that many are valid.

    Stratified: from a random start the valid rows are cut into `count` equal runs, and one row is
        drawn from each, so
    that neither a sort nor a read-back of the number of valid rows is needed.
    """
    total = torch.full((), rows.shape[0], device=rows.device) if mask is None else mask.sum()
    part = torch.arange(count, device=rows.device)
    first = part * total // count
    width = (part + 1) * total // count - first
    draws = torch.rand(count + 1, dtype=torch.float64, device=rows.device)
    start = (draws[-1] * total).long()
    picked = (first + (draws[:-1] * width).long() + start) % total.clamp(min=1)
    if mask is not None:
        nth = torch.searchsorted(mask.cumsum(0), picked + 1)
        picked = nth.clamp(max=rows.shape[0] - 1)
    return rows.index_select(0, picked)


def candidates(rows: Tensor, mask: Tensor | None, num_codes: int, sync: bool) -> Tensor:
    """A random row for each code, and in a last column 1 where it is there and finite: (K, D + 1).

    Ranks take turns: rank k mod world offers the row of code k and the others zeros, so that a sum
        over ranks gives
    every rank the same rows.
    """
    if rows.shape[0] == 0:
        return rows.new_zeros(num_codes, rows.shape[1] + 1)
    picked = sample_rows(rows, mask, num_codes)
    offered = picked.isfinite().all(1)
    if mask is not None:
        offered = offered & mask.any()
    if shared(sync):
        turn = torch.arange(num_codes, device=rows.device) % dist.get_world_size()
        offered = offered & (turn == dist.get_rank())
    offered = offered[:, None]
    return torch.cat([torch.where(offered, picked, 0), offered.to(rows.dtype)], 1)


def kmeans(
    rows: Tensor,
    mask: Tensor | None,
    codebook: Tensor,
    iterations: int,
    *,
    spherical: bool,
    sync: bool,
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random distinct rows.

    Args:
        rows: (N, D), unit vectors for `spherical`.
        mask: (N,) bool or None.
        codebook: (K, D), the start of a code for which no rank has a row.
        iterations: rounds of assigning the rows and averaging; a code without rows stays.
        spherical: bring the means back to unit length.
        sync: the rows are those of all ranks.

    Returns:
        codes (K, D) and the number of rows (K,) that the last round gave them.
    """
    start = all_reduce(candidates(rows, mask, codebook.shape[0], sync), sync)
    codes = torch.where(start[:, -1:] > 0, start[:, :-1], codebook)
    counts = codes.new_zeros(codes.shape[0])
    for _ in range(iterations):
        indices = ops.vq_nearest(rows, codes)
        counts, sums = row_statistics(rows, indices, mask, codes.shape[0])
        packed = all_reduce(torch.cat([counts[:, None], sums], 1), sync)
        counts, sums = packed[:, 0], packed[:, 1:]
        means = sums / counts.clamp(min=1)[:, None]
        if spherical:
            means = normalize(means, dim=1)
        codes = torch.where(counts[:, None] > 0, means, codes)
    return codes, counts
