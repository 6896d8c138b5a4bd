"""vq_nearest: N rows of D elements against K codes, 2 N K D operations."""

import functools

import torch
from torch import Tensor

from benchmarks.case import Case, Provider, dtype_note
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


def _one_batch(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    return x[None], codebook[None]


def _with_norms(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x[None], codebook[None], x[None].float().square().sum(-1)


def flash_kmeans(x: Tensor, codebook: Tensor, x_squared: Tensor) -> Tensor:
    """Its Triton kernel, float32 in TF32; the norms of x are a gift."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    return euclid_assign_triton(x, codebook, x_squared)


def flashlib_triton(x: Tensor, codebook: Tensor) -> Tensor:
    from flashlib.primitives.kmeans import euclid_assign_triton

    return euclid_assign_triton(x, codebook)


def flashlib_cutedsl(x: Tensor, codebook: Tensor) -> Tensor:
    """Its fastest on Hopper, for half and bfloat16, found by its own search of tiles."""
    import cutlass  # noqa: F401  without which it quietly takes its Triton kernel
    from flashlib.primitives.kmeans import cutedsl_assign_euclid

    return cutedsl_assign_euclid(x, codebook)


#: They return what TF32 or bfloat16 finds nearest: not always the nearest.
GPU_PEERS = {
    "flash-kmeans": Provider(flash_kmeans, _with_norms, package="flash-kmeans", device="cuda"),
    "flashlib triton": Provider(flashlib_triton, _one_batch, package="flashlib", device="cuda"),
}
CUTEDSL = {
    "flashlib cutedsl": Provider(flashlib_cutedsl, _one_batch, package="flashlib", device="cuda")
}


def _case(rows: int, codes: int, size: int, dtype: torch.dtype = torch.float32) -> Case:
    return Case(
        op="vq_nearest",
        size=" ".join([f"{rows}x{codes}x{size}", *dtype_note(dtype)]),
        make=lambda: tuple(torch.randn(n, size, dtype=dtype) for n in (rows, codes)),
        call=ops.vq_nearest,
        bytes=dtype.itemsize * size * (rows + codes) + 8 * rows,
        flops=2 * rows * codes * size,
        peers={
            "expanded": expanded,
            "expanded compiled": compiled,
            "faiss": Provider(faiss, package="faiss-cpu", device="cpu"),
            **GPU_PEERS,
            **(CUTEDSL if dtype.itemsize == 2 else {}),
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

GPU_CASES = [
    _case(65536, 8192, size, dtype)
    for size in (64, 128, 256)
    for dtype in (torch.float32, torch.bfloat16)
]
GPU_CASES += [_case(65536, 16384, 8), _case(65536, 1024, 256)]
