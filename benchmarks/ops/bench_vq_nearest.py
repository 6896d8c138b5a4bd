"""vq_nearest: N rows of D elements against K codes, 2 N K D operations."""

import functools

import torch
from torch import Tensor

from benchmarks.harness import Case, Provider
from fastgen import ops


def expanded(x: Tensor, codebook: Tensor) -> Tensor:
    """What VQ codebases write: |e|^2 - 2 <x, e>, all scores in memory; not exact."""
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


@functools.cache
def _compiled():
    return torch.compile(expanded)


def compiled(x: Tensor, codebook: Tensor) -> Tensor:
    return _compiled()(x, codebook)


def faiss(x: Tensor, codebook: Tensor) -> Tensor:
    from faiss import METRIC_L2, knn, omp_set_num_threads

    omp_set_num_threads(torch.get_num_threads())
    return torch.from_numpy(knn(x.numpy(), codebook.numpy(), 1, METRIC_L2)[1][:, 0])


def _case(rows: int, codes: int, size: int) -> Case:
    return Case(
        op="vq_nearest",
        size=f"{rows}x{codes}x{size}",
        make=lambda: (torch.randn(rows, size), torch.randn(codes, size)),
        call=ops.vq_nearest,
        bytes=4 * size * (rows + codes) + 8 * rows,
        flops=2 * rows * codes * size,
        peers={
            "expanded": expanded,
            "expanded compiled": compiled,
            "faiss": Provider(faiss, package="faiss-cpu"),
        },
        compiled=size <= 64,
    )


CASES = [
    _case(65536, 512, 64),
    _case(65536, 1024, 256),
    _case(65536, 8192, 8),
    _case(16384, 16384, 32),
    _case(16, 512, 64),
]

# What a call costs.
CASES += [_case(16, 64, 16)]
