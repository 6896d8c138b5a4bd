"""Dropout whose zeros belong to the rows of a batch, not to the process that has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from statistics import NormalDist

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.random import skip_blocks

__all__ = ["Dropout", "keyed_dropout"]

#: Blocks of the stream that a layer has to itself.
_BLOCKS_PER_LAYER = 2**40


class Dropout(nn.Dropout):
    """torch.nn.Dropout that takes its zeros from a key while :func:`keyed_dropout` gives it one.

    Under a key a row's zeros are a function of the key, the layer and the row's number, and the
    layer does the same again when it is run again: rows may be cut over processes as one likes, and
    activations made anew in backward. Without one it is torch.nn.Dropout.

    Args:
        p: probability of a zero; what stays is divided by 1 - p.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        self._key: Tensor | None = None
        self._first: Tensor | None = None
        self._count = 1
        self._floor = 0.0

    def forward(self, input: Tensor) -> Tensor:
        """As torch.nn.Dropout; the first dimension is that of the rows."""
        if self._key is None or self._first is None or not self.training or not 0 < self.p < 1:
            return super().forward(input)
        numbers = math.prod(input.shape[1:])
        blocks = (numbers + 3) // 4
        first = self._first * (len(input) // self._count)
        key = skip_blocks(self._key, first * blocks)
        noise = ops.normal(key, (len(input), 4 * blocks))[:, :numbers].view(input.shape)
        kept = noise >= self._floor
        return torch.where(kept, input / (1 - self.p), 0)


@contextmanager
def keyed_dropout(
    modules: Iterable[nn.Module], key: Tensor, first: int = 0, count: int = 1
) -> Iterator[None]:
    """Give every :class:`Dropout` in `modules` its part of a key's stream, until left.

    A module that runs twice meanwhile has the same zeros twice.

    Args:
        modules: in an order that is the same in all processes.
        key: int64 (2,), on the modules' device.
        first: number of the first row of the batches to come, among all that share the key.
        count: rows of those batches; a layer whose input has more of them, such as several samples
            a row, counts as many from each.

    Example:
        >>> with keyed_dropout([model], key, first=rank * len(batch), count=len(batch)):
        ...     model(batch).sum().backward()
    """
    found = (m for module in modules for m in module.modules() if isinstance(m, Dropout))
    layers = list(dict.fromkeys(found))
    start = torch.tensor(first).to(key.device, non_blocking=True) if layers else None
    try:
        for i, layer in enumerate(layers):
            layer._key = skip_blocks(key, i * _BLOCKS_PER_LAYER)
            layer._first, layer._count = start, count
            # here, and not in forward, which torch.compile must be able to follow
            layer._floor = NormalDist().inv_cdf(layer.p) if 0 < layer.p < 1 else 0.0
        yield
    finally:
        for layer in layers:
            layer._key = layer._first = None
