"""Keys and the stream of counter-based noise: the contract that every backend keeps.

**Key.** An int64 tensor [seed, offset], on the device of the values to make; each entry stands for
the 64-bit word with its bits. The same key always gives the same noise. Nothing is stored or
advanced: whoever wants other noise takes another key.

**Words.** Element i of a tensor (its row-major index, whatever its strides) takes word i % 4 of

    Philox4x32-10(counter = (lo(c), hi(c), 0, 0), key = (lo(seed), hi(seed))),
    c = (offset + i // 4) mod 2^64,

where lo and hi are the lower and the upper 32 bits (Salmon, Moraes, Dror and Shaw 2011, "Parallel
random numbers: as easy as 1, 2, 3"). This is the stream of PyTorch's own stateless generator,
`torch.func._random`.

**Normal values.** Of four words (w0, w1, w2, w3) the pairs (w0, w1) and (w2, w3) each give two
values, by Box and Muller (1958) on centred uniforms, which are exact real numbers:

    u = (w0 + 1/2) / 2^32,  v = (w1 + 1/2) / 2^32,
    value 0 = sqrt(-2 ln u) cos(2 pi v),  value 1 = sqrt(-2 ln u) sin(2 pi v).

Every backend evaluates these reals: float32 within 4 units in the last place, float64 within 8;
half and bfloat16 round the float32 value, on a GPU one within 1e-5 (within 5e-4 where the radius
sqrt(-2 ln u) is below 0.02), from the hardware's own approximations. (Rounding u or v to float32
first would quantise radii near zero and angles near the axes, and make exact zeros.) All 2^64 pairs
give finite values, none of them zero in float32 and float64; the largest is sqrt(66 ln 2) = 6.76.
Over all words both values are symmetric about zero.

**Derived keys.** :func:`fold_in` uses counters with other third and fourth words than the noise
does, so it never overlaps with it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["derive_key", "draw_key", "fold_in", "make_key", "philox_words", "skip_blocks"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def make_key(seed: int, offset: int = 0, *, device: torch.device | str | None = None) -> Tensor:
    """A key from whole numbers.

    Args:
        seed: in [-2^63, 2^64).
        offset: where the stream starts, in blocks of four values; in [-2^63, 2^64).
        device: where the noise will be made.

    Returns:
        int64 (2,).

    Raises:
        TypeError: `seed` or `offset` is not an int.
        ValueError: one is out of range.
    """
    words = []
    for value, name in ((seed, "seed"), (offset, "offset")):
        _check_int(value, name, -(2**63), 2**64, "[-2^63, 2^64)")
        value = value if isinstance(value, (int, torch.SymInt)) else int(value)
        words.append(value - 2**64 if value >= 2**63 else value)
    return torch.tensor(words, dtype=torch.int64, device=device)


def derive_key(seed: int, *data: int, device: torch.device | str | None = None) -> Tensor:
    """`make_key(seed)` after :func:`fold_in` with each of `data` in turn.

    Worked out on the host, and copied to a GPU without waiting for it: a training step's key.

    Args:
        seed: in [-2^63, 2^64).
        data: numbers in [0, 2^63), such as of a phase and of a step.
        device: where the noise will be made.

    Returns:
        int64 (2,).

    Raises:
        TypeError: `seed` or one of `data` is not an int.
        ValueError: one is out of range.
    """
    seed, offset = make_key(seed).tolist()
    for value in data:
        if not is_whole(value):
            raise TypeError(f"data: expected ints, got {type(value).__name__}")
        if not 0 <= value < 2**63:
            raise ValueError(f"data: expected numbers in [0, 2^63), got {value}")
        seed, offset = _fold((seed, offset), int(value))
    words = [word - 2**64 if word >= 2**63 else word for word in (seed, offset)]
    key = torch.tensor(words, dtype=torch.int64)
    if device is None or torch.device(device).type != "cuda":
        return key.to(device)
    return key.pin_memory().to(device, non_blocking=True)


def draw_key(
    *, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """A fresh key from `generator`, or from the default generator of `device`.

    torch.manual_seed governs it. Made by torch.randint on the device, so it is part of compiled and
    CUDA graphs, and torch.vmap's `randomness` says whether the samples of a batch share it.

    Returns:
        int64 (2,).

    Raises:
        TypeError: `generator` is not a torch.Generator.
    """
    check_generator(generator)
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """The key of `data` among those derived from `key`: one for each rank, layer or step.

    Keys of different `data`, and of keys with the same seed and different offsets, always differ.

    Args:
        key: int64 (2,).
        data: a number in [0, 2^63), or an int64 tensor (...) of such on the device of `key`.
            Negative numbers in a tensor raise where that takes no waiting: on a CPU, outside
            torch.func and torch.compile. Elsewhere they get other keys, whose noise is independent
            of that of `key` too.

    Returns:
        int64 (2,), or (..., 2) for a tensor.

    Raises:
        TypeError, ValueError: `key` is not a key, or `data` is not such a number.

    Example:
        >>> mine = fold_in(key, torch.distributed.get_rank())
        >>> each = fold_in(key, torch.arange(8))  # (8, 2)
    """
    check_key(key)
    if isinstance(data, Tensor):
        _check_data(data, key)
    else:
        _check_int(data, "data", 0, 2**63, "[0, 2^63)")
        data = torch.tensor(data, device=key.device)
    # One dimension at least: vmap over no slices cannot add a number to a scalar.
    data = data.unsqueeze(-1)
    return torch.cat(_fold((key[:1], key[1:].expand(data.shape)), data), -1)


def _check_data(data: Tensor, key: Tensor) -> None:
    """Raises where `data` is no tensor for :func:`fold_in`."""
    if data.dtype != torch.int64:
        raise TypeError(f"data: expected an int or int64, got {data.dtype}")
    _check_dense(data, "data")
    if data.device != key.device:
        raise ValueError(f"data: expected the device of key, {key.device}, got {data.device}")
    # Of other types are those that have no values, such as FakeTensor.
    readable = data.is_cpu and type(data) is Tensor and not torch.compiler.is_compiling()
    if readable and not torch._C._are_functorch_transforms_active() and (data < 0).any():
        raise ValueError(f"data: expected numbers in [0, 2^63), got {int(data.min())}")


def skip_blocks(key: Tensor, count: int | Tensor) -> Tensor:
    """The key of the same stream from its block `count` on, that is from its value 4 `count` on.

    Args:
        key: int64 (2,).
        count: a number in [-2^63, 2^63), or an int64 tensor () on the key's device.

    Returns:
        int64 (2,).

    Raises:
        TypeError, ValueError: `key` is not a key, or `count` is not such a number.
    """
    check_key(key)
    if not isinstance(count, Tensor):
        _check_int(count, "count", -(2**63), 2**63, "[-2^63, 2^63)")
    elif count.dtype != torch.int64:
        raise TypeError(f"count: expected an int or int64, got {count.dtype}")
    elif count.dim() != 0:
        raise ValueError(f"count: expected shape (), got {tuple(count.shape)}")
    return torch.stack((key[0], key[1] + count))


def philox_words(key: Tensor, count: int) -> Tensor:
    """The first `count` words of the stream, in plain PyTorch.

    Args:
        key: int64 (2,).
        count: how many.

    Returns:
        int64 (count,), values in [0, 2^32).

    Raises:
        TypeError, ValueError: `key` is not a key, `count` not an int of at least zero.
    """
    check_key(key)
    _check_int(count, "count", 0, 2**63, "[0, 2^63)")
    counter = key[1:] + torch.arange((count + 3) // 4, device=key.device)
    zero = torch.zeros_like(counter)
    words = _philox((*_split(counter), zero, zero), _split(key[:1]))
    return torch.stack(words, -1).flatten()[:count]


def normal_reference(key: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Standard normal values in plain PyTorch, evaluated in float64."""
    count = math.prod(size)
    w = philox_words(key, (count + 1) // 2 * 2).unflatten(0, (-1, 2))
    radius = torch.sqrt(-2 * torch.log((w[:, 0].double() + 0.5) / 2**32))
    # Whole quarter turns are taken off in integers: cos and sin stay accurate near their zeros.
    quarter = (w[:, 1] + 2**29) >> 30
    rest = (w[:, 1] - (quarter << 30)).double() + 0.5
    cos, sin = torch.cos(rest * (math.pi / 2**31)), torch.sin(rest * (math.pi / 2**31))
    swap = quarter % 2 == 1
    even = torch.where(swap, sin, cos) * torch.where((quarter + 1) % 4 >= 2, -1.0, 1.0)
    odd = torch.where(swap, cos, sin) * torch.where(quarter % 4 >= 2, -1.0, 1.0)
    values = (radius[:, None] * torch.stack((even, odd), -1)).flatten()[:count].view(size)
    return values.to(dtype) if dtype == torch.float64 else values.float().to(dtype)


def check_key(key: object, name: str = "key", device: torch.device | None = None) -> None:
    """Raises unless `key` is an int64 tensor of shape (2,), on `device` where that is given."""
    if not isinstance(key, Tensor):
        raise TypeError(
            f"{name}: expected an int64 Tensor [seed, offset], got {type(key).__name__}"
        )
    if key.dtype != torch.int64:
        raise TypeError(
            f"{name}: expected dtype int64, got {str(key.dtype).removeprefix('torch.')}"
        )
    _check_dense(key, name)
    if key.shape != (2,):
        raise ValueError(f"{name}: expected shape (2,), [seed, offset], got {tuple(key.shape)}")
    if device is not None and key.device != device:
        raise ValueError(f"{name}: expected the device of the input, {device}, got {key.device}")


def check_generator(generator: object) -> None:
    """Raises TypeError unless `generator` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")


def is_whole(value: Any) -> bool:
    """Whether `value` is an int, of Python, NumPy or a compiler."""
    return isinstance(value, (int, torch.SymInt, numbers.Integral)) and not isinstance(value, bool)


def _check_int(value: Any, name: str, least: int, end: int, interval: str) -> None:
    if not is_whole(value):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not least <= value < end:
        raise ValueError(f"{name}: expected a number in {interval}, got {value}")


def _check_dense(value: Tensor, name: str) -> None:
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a dense Tensor, got layout {value.layout}")


def _fold(key: tuple[Any, Any], data: Any) -> tuple[Any, Any]:
    """`fold_in` for the words of a key and `data`, ints or int64 tensors."""
    # The noise has third and fourth counter words zero, which this never is.
    w = _philox((*_split(key[1]), *_split(data + (data >= 0))), _split(key[0]))
    return w[0] | (w[1] << 32), w[2] | (w[3] << 32)


def _split(value: Any) -> tuple[Any, Any]:
    return value & _MASK, (value >> 32) & _MASK


def _philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 on 32-bit words in ints, or in int64 tensors, whose products may wrap."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        low0, high0 = _split(c0 * _MULTIPLIERS[0])
        low1, high1 = _split(c2 * _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3
