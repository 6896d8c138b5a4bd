"""Checks and views between a layer's tensors, (..., D) or (B, D, *spatial), and D last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.ops import _check

__all__ = ["check_input", "check_mask", "to_first", "to_last"]


def check_input(x: Any, dim: int, channel_first: bool) -> None:
    """Raises unless `x` is a floating tensor (..., dim), or (B, dim, ...) for `channel_first`."""
    _check.floating(x, "x")
    expected = f"(B, {dim}, ...)" if channel_first else f"(..., {dim})"
    _check.rank(x, "x", 2 if channel_first else 1, expected)
    if x.shape[1 if channel_first else -1] != dim:
        raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")


def check_mask(mask: Any, shape: torch.Size) -> None:
    """Raises unless `mask` is None or a bool tensor of `shape`, one entry for each vector."""
    if mask is not None:
        _check.has_dtype(mask, "mask", torch.bool)
        _check.shape(mask, "mask", shape, "one entry for each vector of x")


def to_last(x: Tensor, channel_first: bool) -> Tensor:
    """A view of `x` with the vector dimension last."""
    return x.movedim(1, -1) if channel_first else x


def to_first(x: Tensor, channel_first: bool) -> Tensor:
    """Undoes :func:`to_last`."""
    return x.movedim(-1, 1) if channel_first else x
