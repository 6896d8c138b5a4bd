"""What a loss draws at random: the same for a row however many processes share the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.nn import keyed_dropout
from fastgen.random import draw_key, skip_blocks

#: Blocks of the key's stream that a draw has to itself; the dropout layers follow after the draws.
_BLOCKS_PER_DRAW = 2**40
_MOST_DRAWS = 2**20


class Draws:
    """Random numbers for a part of the joint batch, which holds its rows from `first` on.

    A draw is what all rows of the joint batch would be given by one, of which the part takes its
    own: `normal(3)` of the n-th draw is `ops.normal(key_n, (N, 3))[first : first + count]`. So it
    depends on the key, on how many draws came before it, and on the row; not on how many processes
    and accumulated parts the joint batch is cut into. Processes must draw in one order, and must
    not leave out a draw where another makes it.

    Args:
        count: rows of the part.
        key: int64 (2,), on the device of the rows; by default drawn from torch's own generator, for
            a loop that has no joint batch.
        first: number of the part's first row in the joint batch.
        device: of a key that is drawn.
    """

    def __init__(
        self,
        count: int,
        key: Tensor | None = None,
        first: int = 0,
        *,
        device: torch.device | str | None = None,
    ):
        self.key = draw_key(device=device) if key is None else key
        self.first = first
        self.count = count
        self._made = 0

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values (count, *shape), float32."""
        key, before = self._next(math.prod(shape))
        total = before + self.count * math.prod(shape)
        return ops.normal(key, (total,))[before:].view(self.count, *shape)

    def normal_source(self, *shape: int) -> dict[str, Tensor]:
        """`normal(*shape)` for what can make it itself: {"key": ...}, or {"noise": ...} where the
        part begins within a block of the stream."""
        key, before = self._next(math.prod(shape))
        if before == 0:
            return {"key": key}
        self._made -= 1
        return {"noise": self.normal(*shape)}

    def uniform(self, *shape: int) -> Tensor:
        """Values (count, *shape), uniform in [0, 1), float32."""
        # the normal distribution function of a normal value, which rounds to 1 from 5.4 on
        values = self.normal(*shape).mul_(math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
        return values.clamp_(max=1 - 2**-24)

    def bernoulli(self, probability: Tensor) -> Tensor:
        """1 with `probability` (count, ...), 0 otherwise; of its shape and dtype."""
        return (self.uniform(*probability.shape[1:]) < probability).to(probability.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers (count, *shape), uniform in [low, high), int64; high - low up to 2^20."""
        return low + (self.uniform(*shape) * (high - low)).long().clamp_(max=high - low - 1)

    def dropout(self, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """While entered, every `fastgen.nn.Dropout` of `modules` has zeros that are the row's."""
        key = skip_blocks(self.key, _MOST_DRAWS * _BLOCKS_PER_DRAW)
        return keyed_dropout(modules, key, self.first, self.count)

    def _next(self, numbers: int) -> tuple[Tensor, int]:
        """A key whose stream has our rows of `numbers` numbers each, after so many other values."""
        blocks, before = divmod(self.first * numbers, 4)
        key = skip_blocks(self.key, self._made * _BLOCKS_PER_DRAW + blocks)
        self._made += 1
        return key, before
