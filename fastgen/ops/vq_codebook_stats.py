"""Statistics of a codebook's use: how many rows chose each code, and their sum. What EMA codebooks
are updated from.

    counts_k = #{n : indices_n = k},  sums_k = sum of x_n over those n

(van den Oord et al. 2017, appendix A.1, eq. 6 and 7; also the update step of k-means.)

Shapes: x (..., D), dtype float32, float64, float16 or bfloat16; indices (...) int64; counts (K,)
and sums (K, D), both float32 (float64 for float64 x). Rows are added in row order with float64
running sums: the result does not depend on threads. Gradients: sums in x, to any order (a gather).
Backends: cuda, cpu, reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops import _check, _library
from fastgen.ops._autograd import Fused, accumulate_dtype, is_batched, run

__all__ = ["vq_codebook_stats"]

_fwd = _library.define(
    "vq_codebook_stats_fwd(Tensor x, Tensor indices, int codebook_size) -> (Tensor, Tensor)"
)


@_library.register_fake("vq_codebook_stats_fwd")
def _(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    return (
        x.new_empty((codebook_size,), dtype=dtype),
        x.new_empty((codebook_size, x.shape[-1]), dtype=dtype),
    )


_library.register_vmap_loop("vq_codebook_stats_fwd")


def _check_range(indices: Tensor, codebook_size: int) -> None:
    # Traced and vmapped tensors have no values to read; index_add checks those itself.
    if torch.compiler.is_compiling() or is_batched(indices):
        return
    if indices.numel() == 0:
        return
    least, most = (int(bound) for bound in indices.aminmax())
    if least < 0 or most >= codebook_size:
        wrong = least if least < 0 else most
        raise ValueError(f"indices: expected values in [0, {codebook_size}), got {wrong}")


def vq_codebook_stats_reference(
    x: Tensor, indices: Tensor, codebook_size: int
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; arguments as :func:`vq_codebook_stats`, all positional."""
    _check_range(indices, codebook_size)
    rows = x.reshape(indices.numel(), x.shape[-1]).to(accumulate_dtype(x.dtype))
    flat = indices.reshape(-1)
    counts = rows.new_zeros(codebook_size).index_add(
        0, flat, torch.ones_like(flat, dtype=rows.dtype)
    )
    sums = rows.new_zeros(codebook_size, rows.shape[-1]).index_add(0, flat, rows)
    return counts, sums


class _VQCodebookStats(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        x, indices, _ = inputs
        counts, _ = output
        ctx.mark_non_differentiable(counts)
        ctx.save_for_backward(indices)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, _: Any, grad_sums: Tensor) -> tuple:
        (indices,) = ctx.saved_tensors
        return grad_sums[indices].to(ctx.dtype), None, None


def _fused(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    return run(_VQCodebookStats, _fwd, (x, indices), codebook_size)


def _prepare(x: Tensor, indices: Tensor, codebook_size: int) -> tuple:
    _check.floating(x, "x")
    _check.rank(x, "x", 1, "at least one dimension, (..., D)")
    _check.has_dtype(indices, "indices", torch.int64)
    _check.same_device(indices, "indices", x, "x")
    _check.shape(indices, "indices", x.shape[:-1], "that of x without D")
    _check.positive_int(codebook_size, "codebook_size")
    return x, indices, codebook_size


_OP = backends.Op("vq_codebook_stats", _prepare)
_OP.implement("cuda", _fused, device="cuda", unavailable=_library.cuda_unavailable)
_OP.implement("cpu", _fused, device="cpu", unavailable=_library.cpu_unavailable)
_OP.implement("reference", vq_codebook_stats_reference)


def vq_codebook_stats(
    x: Tensor, indices: Tensor, codebook_size: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Counts the rows of each code and sums them.

    Args:
        x: (..., D), the rows.
        indices: (...) int64, the code of each row, in [0, codebook_size). For a codebook with heads
            (H, K, D) add h * K to the indices of head h, pass H * K, and reshape the results to (H,
            K) and (H, K, D).
        codebook_size: K, at least 1.
        backend: force "cuda", "cpu" or "reference".

    Returns:
        counts: (K,), float32 (float64 for float64 x), integral; no gradient.
        sums: (K, D), the dtype of counts; differentiable in x.

    Raises:
        TypeError: not tensors, x not floating, indices not int64, or codebook_size not an int.
        ValueError: shapes or devices differ; an index outside [0, codebook_size) (on a GPU, where
            nothing waits for the indices, the kernel ends with an error as torch's indexing does);
            codebook_size below 1; unknown `backend`.

    Autocast: no casts.
    """
    return _OP(_prepare(x, indices, codebook_size), backend)
