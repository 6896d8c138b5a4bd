"""vq_codebook_stats: reads x once, writes K sums."""

import functools

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.case import Case
from fastgen import ops


def by_one_hot(codes: int, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """What VQ codebases write."""
    chosen = one_hot(indices, codes).to(x.dtype)
    return chosen.sum(0), chosen.T @ x


def _call(codes: int, x: Tensor, indices: Tensor, backend: str | None = None):
    return ops.vq_codebook_stats(x, indices, codes, backend=backend)


def _case(rows: int, codes: int, size: int) -> Case:
    return Case(
        op="vq_codebook_stats",
        size=f"{rows}x{codes}x{size}",
        make=lambda: (torch.randn(rows, size), torch.randint(codes, (rows,))),
        call=functools.partial(_call, codes),
        grad=(0,),
        bytes=4 * size * (rows + codes) + 8 * rows,
        flops=rows * size,
        # The cotangent of the sums and the indices in, the gradient of x out.
        bytes_backward=4 * size * (rows + codes) + 8 * rows,
        peers={"one_hot": functools.partial(by_one_hot, codes)},
    )


CASES = [_case(65536, 1024, 64), _case(65536, 512, 64), _case(16, 512, 64)]
GPU_CASES = [_case(65536, 8192, 64), _case(1 << 20, 1024, 256)]
