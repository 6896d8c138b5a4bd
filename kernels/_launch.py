"""What the launchers share: the layout of their tensors and the options of a launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic is done in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(name: str, t: Tensor, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raises RuntimeError unless `t` has this shape and dtype and the device of `like`.

    Kernels would read past the end of a smaller tensor.
    """
    if t.device != like.device or t.dtype != dtype or t.shape != torch.Size(shape):
        raise RuntimeError(f"{name} has the wrong device, dtype or shape")


def rows(t: Tensor) -> tuple[Tensor, int]:
    """A non-empty (B, ...) tensor as B rows of adjacent values.

    Returns:
        The tensor, copied where its samples are not contiguous, and the stride of its rows. A chunk
        of channels of a contiguous tensor is used where it lies. Offsets between the rows of a tile
        of 1024 fit 32 bits.
    """
    size = t.numel() // t.shape[0]
    if t.is_contiguous():
        return t, size
    if t.select(0, 0).is_contiguous() and (t.stride(0) < 2**21 or size > 1024):
        return t, t.stride(0)
    return t.contiguous(), size


def records(t: Tensor) -> tuple[Tensor, int]:
    """A (..., k) tensor as records of k adjacent values, one fixed stride apart.

    Returns:
        The tensor, copied where there is no such stride, and the stride. Slices of a (..., n)
        tensor are used where they lie.
    """
    size = t.shape[-1]
    flat = t.reshape(t.numel() // max(size, 1), size)
    if size > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def options(num_warps: int) -> dict[str, int | bool]:
    """Options of a launch. Products and sums fuse, whatever Triton's default is."""
    return {"num_warps": num_warps, "enable_fp_fusion": True}
