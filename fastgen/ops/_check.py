"""Argument checks shared by the public functions; every message names the argument, what was
expected, what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DENSE = torch.strided


def is_tensor(value: Any, name: str) -> None:
    """Raises TypeError unless `value` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.layout is not DENSE or value.is_nested:
        layout = str(value.layout).removeprefix("torch.").strip("_")
        kind = "a nested one" if value.is_nested else f"one of layout {layout}"
        raise TypeError(f"{name}: expected a dense Tensor, got {kind}")


def floating(value: Any, name: str) -> None:
    """Raises TypeError unless `value` is a float32, float64, float16 or bfloat16 tensor."""
    is_tensor(value, name)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected dtype float32, float64, float16 or bfloat16, got {_dtype(value)}"
        )


def has_dtype(value: Any, name: str, dtype: torch.dtype) -> None:
    """Raises TypeError unless `value` is a tensor of `dtype`."""
    is_tensor(value, name)
    if value.dtype != dtype:
        expected = str(dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {expected}, got {_dtype(value)}")


def matches(value: Any, name: str, like: Tensor, like_name: str) -> None:
    """Raises unless `value` is a tensor with the dtype and device of `like`."""
    is_tensor(value, name)
    if value.dtype != like.dtype:
        raise TypeError(
            f"{name}: expected the dtype of {like_name}, {_dtype(like)}, got {_dtype(value)}"
        )
    same_device(value, name, like, like_name)


def same_device(value: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Raises ValueError unless `value` is on the device of `like`."""
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected the device of {like_name}, {like.device}, got {value.device}"
        )


def shape(value: Tensor, name: str, expected: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless `value` has shape `expected`; `meaning` says what that is."""
    if value.shape != expected:
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} ({meaning}), got {tuple(value.shape)}"
        )


def like(value: Any, name: str, other: Tensor, other_name: str) -> None:
    """Raises unless `value` is a tensor with the dtype, device and shape of `other`."""
    matches(value, name, other, other_name)
    shape(value, name, other.shape, f"that of {other_name}")


def alike(first: Any, *others: Any) -> bool:
    """Whether all are dense floating tensors of one dtype, device and shape.

    That is how ops whose arguments are alike are called, mostly: one look, where naming what is
    wrong takes several.
    """
    if not isinstance(first, Tensor) or first.dtype not in FLOATS or first.layout is not DENSE:
        return False
    try:
        dtype, device, shape = first.dtype, first.device, first.shape
        for value in others:
            if (
                not isinstance(value, Tensor)
                or value.dtype != dtype
                or value.device != device
                or value.layout is not DENSE
                or value.shape != shape
            ):
                return False
    except RuntimeError:  # Nested tensors have no shape.
        return False
    return True


def rank(value: Tensor, name: str, least: int, meaning: str, most: int | None = None) -> None:
    """Raises ValueError unless `value` has between `least` and `most` dimensions."""
    if value.dim() < least or (most is not None and value.dim() > most):
        raise ValueError(f"{name}: expected {meaning}, got shape {tuple(value.shape)}")


def one_of(value: Any, name: str, allowed: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of the strings `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def positive(value: Any, name: str) -> None:
    """Raises unless `value` is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a positive number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def non_negative(value: Any, name: str) -> None:
    """Raises unless `value` is a finite number of at least zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number >= 0, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def integer(value: Any, name: str) -> None:
    """Raises TypeError unless `value` is an int."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def positive_int(value: Any, name: str) -> None:
    """Raises unless `value` is an int (or torch.SymInt) of at least one."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected a positive int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")


def between(value: Any, name: str, least: float, most: float) -> None:
    """Raises unless `value` is a number in [`least`, `most`]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected a number in [{least}, {most}], got {value}")


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
