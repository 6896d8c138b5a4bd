"""Nearest codebook vector: the search of vector quantization (van den Oord et al. 2017, eq. 2).

    euclidean: index = argmin_k key_k,  key_k = sum_j (x_j - e_kj)^2
    cosine:    index = argmin_k key_k,  key_k = -d |d| / sum_j e_kj^2,  d = sum_j x_j e_kj

The search is exact: the answer is the argmin of the keys computed in float64 from the values the
inputs hold, summed in order over j, the lowest index on ties. It is therefore the same on every
backend, instruction set and thread count. Fast passes in bfloat16 (where the CPU has it), in half
precision on tensor cores and in float32 leave few codes that their rounding errors, which are
bounded, could hide; those are compared in float64.

Shapes: x (..., N, D) with codebook (K, D), or x (H, N, D) with codebook (H, K, D), one dtype of
float32, float64, float16, bfloat16; indices (..., N) int64; distance (..., N) float32, float64 for
float64 inputs. Memory beyond inputs and results is O(K * D), on GPUs with a buffer of bounded size
for rows, never N * K. Gradients: none, both results are constants (vq_quantize has them). Backends:
cuda, cpu, reference.

Values that are not finite: a code whose key is not finite (it holds NaN or infinity) is never
chosen while another code's key is finite. A row without any finite key (it holds NaN or infinity)
gets index 0 and the distance to code 0: NaN, or infinity where that is what the sum gives. Cosine:
a zero code counts as orthogonal to everything; a zero row has equal keys and gets the first code
with a finite key.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops import _check, _library
from fastgen.ops._autograd import accumulate_dtype, autocast_promote

__all__ = ["vq_nearest"]

METRICS = ("euclidean", "cosine")

#: Most keys the reference holds at once: on a CPU few enough for L2, which is 10 times faster.
CPU_CHUNK, GPU_CHUNK = 1 << 16, 1 << 24

_fwd = _library.define(
    "vq_nearest_fwd(Tensor x, Tensor codebook, str metric, bool return_distance) "
    "-> (Tensor, Tensor)",
    constant=True,
)


@_library.register_fake("vq_nearest_fwd")
def _(x: Tensor, codebook: Tensor, metric: str, return_distance: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[:-1]
    distance = x.new_empty(shape if return_distance else (0,), dtype=accumulate_dtype(x.dtype))
    return x.new_empty(shape, dtype=torch.int64), distance


_library.register_vmap_loop("vq_nearest_fwd")


def check_codebook(x: Tensor, codebook: Tensor) -> None:
    """Raises TypeError or ValueError unless x and codebook fit together, with or without heads."""
    _check.floating(x, "x")
    _check.matches(codebook, "codebook", x, "x")
    _check.rank(codebook, "codebook", 2, "(K, D) or (H, K, D)", most=3)
    if codebook.dim() == 3:
        _check.rank(x, "x", 3, "(H, N, D) for a codebook (H, K, D)", most=3)
        if x.shape[0] != codebook.shape[0]:
            raise ValueError(
                f"codebook: expected {x.shape[0]} heads, those of x, "
                f"got shape {tuple(codebook.shape)}"
            )
    else:
        _check.rank(x, "x", 2, "at least two dimensions, (..., N, D)")
    if codebook.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"codebook: expected vectors of {x.shape[-1]} elements, those of x, "
            f"got shape {tuple(codebook.shape)}"
        )
    if codebook.shape[-2] == 0:
        raise ValueError(f"codebook: expected at least one code, got shape {tuple(codebook.shape)}")


def _sum_in_order(terms: Tensor) -> Tensor:
    total = terms.new_zeros(terms.shape[:-1])
    for term in terms.unbind(-1):
        total = total + term
    return total


def _keys(x: Tensor, codes: Tensor, squares: Tensor, metric: str) -> Tensor:
    """x (H, n, D), codes (D, H, 1, K), squares (H, 1, K), float64 -> keys (H, n, K)."""
    keys = x.new_zeros(*x.shape[:-1], squares.shape[-1])
    for x_j, e_j in zip(x.unsqueeze(-2).unbind(-1), codes.unbind(0), strict=True):
        keys = keys + ((x_j - e_j).square() if metric == "euclidean" else x_j * e_j)
    if metric == "euclidean":
        return keys
    return torch.where(squares == 0, 0.0, -keys * keys.abs() / squares)


def vq_nearest_reference(
    x: Tensor, codebook: Tensor, metric: str, return_distance: bool
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; arguments as :func:`vq_nearest`, all positional.

    The distance is an empty tensor where it is not asked for.
    """
    x, codebook = x.detach(), codebook.detach()
    rows = x if codebook.dim() == 3 else x.flatten(0, -2).unsqueeze(0)
    heads = (codebook if codebook.dim() == 3 else codebook.unsqueeze(0)).to(torch.float64)
    codes = heads.movedim(-1, 0).unsqueeze(-2).contiguous()
    squares = _sum_in_order(heads.square()).unsqueeze(-2)
    # Inductor fuses the whole search into one loop over the keys; cut up, it would be unrolled.
    keys_at_once = CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK
    whole = torch.compiler.is_compiling()
    chunk = rows.shape[1] if whole else keys_at_once // max(squares.numel(), 1)
    indices, distances = [], []
    for part in rows.split(max(chunk, 1), dim=1):
        part = part.to(torch.float64)
        keys = _keys(part, codes, squares, metric)
        index = torch.where(keys.isfinite(), keys, float("inf")).argmin(-1)
        indices.append(index)
        if return_distance:
            key = keys.gather(-1, index.unsqueeze(-1)).squeeze(-1)
            if metric == "cosine":
                square = _sum_in_order(part.square())
                cosine = torch.where(square == 0, 0.0, -key.sign() * (key.abs() / square).sqrt())
                key = (2 - 2 * cosine).clamp(min=0)
            distances.append(key)
    shape, dtype = x.shape[:-1], accumulate_dtype(x.dtype)
    if not return_distance:
        return torch.cat(indices, 1).reshape(shape), x.new_empty((0,), dtype=dtype)
    return torch.cat(indices, 1).reshape(shape), torch.cat(distances, 1).reshape(shape).to(dtype)


def _prepare(
    x: Tensor, codebook: Tensor, *, metric: str = "euclidean", return_distance: bool = False
) -> tuple:
    x, codebook = autocast_promote(x, codebook)
    check_codebook(x, codebook)
    _check.one_of(metric, "metric", METRICS)
    return x, codebook, metric, bool(return_distance)


_OP = backends.Op("vq_nearest", _prepare)
_OP.implement("cuda", _fwd, device="cuda", unavailable=_library.cuda_unavailable)
_OP.implement("cpu", _fwd, device="cpu", unavailable=_library.cpu_unavailable)
_OP.implement("reference", vq_nearest_reference)


@overload
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    return_distance: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    return_distance: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def vq_nearest(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    return_distance: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Finds for every row of x the index of the nearest code, exactly.

    Args:
        x: (..., N, D), or (H, N, D) where the codebook has heads.
        codebook: (K, D), or (H, K, D): one codebook a head. K is at least 1.
        metric: "euclidean", or "cosine": the code of the largest cosine similarity.
        return_distance: also return the distance to the chosen code.
        backend: force "cuda", "cpu" or "reference".

    Returns:
        indices: (..., N) int64, in [0, K).
        distance: only with `return_distance`: (..., N), float32 (float64 for float64 inputs). The
            squared Euclidean distance; for "cosine" that between the two directions, 2 - 2 cos (2
            where one of them is zero).

        Neither carries a gradient.

    Raises:
        TypeError: not tensors, not floating, or mixed dtypes outside autocast.
        ValueError: ranks, sizes or devices do not fit; empty codebook; unknown `metric` or
            `backend`.

    Autocast: mixed dtypes become the wider of them.
    """
    args = _prepare(x, codebook, metric=metric, return_distance=return_distance)
    indices, distance = _OP(args, backend)
    return (indices, distance) if return_distance else indices
