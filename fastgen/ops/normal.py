"""Standard normal values from a key of counter-based noise.

The stream and the transform, Philox4x32-10 and Box-Muller, are defined in `fastgen.random`. The
same key gives the same values for every shape with the same number of elements, and on every thread
count and instruction set.

Shapes: key (2,) int64 [seed, offset]; the result has any shape, float32, float64, float16 or
bfloat16. Not differentiable. Under torch.vmap each sample gets the noise of its own key; samples
that share a key share the noise. Backends: cuda, cpu, reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import backends, random
from fastgen.ops import _check, _library

__all__ = ["normal"]

_normal = _library.define("normal(Tensor key, SymInt[] size, ScalarType dtype) -> Tensor")
_library.define("philox_words(Tensor key, SymInt count) -> Tensor")


@_library.register_fake("normal")
def _(key: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return key.new_empty(size, dtype=dtype)


@_library.register_fake("philox_words")
def _(key: Tensor, count: int) -> Tensor:
    return key.new_empty((count,))


_library.register_vmap_loop("normal")
_library.register_vmap_loop("philox_words")


def normal_reference(key: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The op in plain PyTorch; arguments as :func:`normal`, all positional."""
    return random.normal_reference(key, size, dtype)


def _prepare(key: Any, size: Any, *, dtype: torch.dtype = torch.float32) -> tuple:
    random.check_key(key)
    if not isinstance(size, (tuple, list)):
        raise TypeError(f"size: expected a sequence of ints, got {type(size).__name__}")
    if dtype not in _check.FLOATS:
        raise TypeError(f"dtype: expected float32, float64, float16 or bfloat16, got {dtype}")
    for n in size:
        if not random.is_whole(n):
            raise TypeError(f"size: expected a sequence of ints, got {tuple(size)}")
        if n < 0:
            raise ValueError(f"size: expected no negative entries, got {tuple(size)}")
    return key, tuple(size), dtype


_OP = backends.Op("normal", _prepare)
_OP.implement("cuda", _normal, device="cuda", unavailable=_library.cuda_unavailable)
_OP.implement("cpu", _normal, device="cpu", unavailable=_library.cpu_unavailable)
_OP.implement("reference", normal_reference)


def normal(
    key: Tensor,
    size: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Standard normal values of a key, on the key's device.

    Args:
        key: int64 (2,), from `fastgen.random`.
        size: shape of the result, a tuple or list.
        dtype: float32, float64, float16 or bfloat16.
        backend: force "cuda", "cpu" or "reference".

    Returns:
        `size`, `dtype`.

    Raises:
        TypeError: `key` is not an int64 tensor; `size` is not a tuple or list of ints; `dtype` is
            not one of those above.
        ValueError: `key` has another shape than (2,); negative `size`; unknown `backend`.
    """
    return _OP(_prepare(key, size, dtype=dtype), backend)
