"""Shuffled batches of tensors in memory, whose position is two integers."""

from __future__ import annotations

import torch
from torch import Tensor


class BatchLoader:
    """Endless shuffled batches; a batch is a pure function of (seed, epoch, index).

    The order of an epoch comes from a private generator, so nothing else that draws random numbers
    can move it, and a loader set back to a position goes on exactly as the first one did. The last,
    incomplete batch of an epoch is dropped. The joint batch is cut into `parts`, and each of those
    into contiguous shares, one per process: part p of all processes together has the same rows
    however many they are.

    Args:
        tensors: named tensors with one common first dimension N; None values are left out.
        batch_size: rows of the joint batch, a multiple of `parts` times `world_size`.
        seed: seed of the shuffling.
        parts: how many a batch is to be cut into, to be worked on one after the other.
        rank, world_size: which share of each part is ours.
        device: where the batches go.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor | None],
        batch_size: int,
        *,
        seed: int = 0,
        parts: int = 1,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.tensors = {key: value for key, value in tensors.items() if value is not None}
        sizes = {key: len(value) for key, value in self.tensors.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"tensors must have one common first dimension, got {sizes}")
        self.size = next(iter(sizes.values()))
        if not 1 <= batch_size <= self.size:
            raise ValueError(
                f"batch_size must be in [1, {self.size}] (the number of samples), got {batch_size}"
            )
        if batch_size % (parts * world_size):
            times = f" times {parts} parts" if parts > 1 else ""
            raise ValueError(
                f"batch_size must be a multiple of the {world_size} processes{times}, "
                f"got {batch_size}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.epoch = 0
        self.index = 0
        rows = torch.arange(batch_size).view(parts, world_size, -1)[:, rank]
        self.first_rows: list[int] = rows[:, 0].tolist()
        self._rows = rows.flatten()
        self._order = self._shuffle(self.epoch)

    def _shuffle(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.size, generator=generator)

    def next_batch(self) -> dict[str, Tensor]:
        """The next batch, each tensor (batch_size / world_size, ...), on `device`.

        Its equal parts begin at the rows `first_rows` of the joint batch.
        """
        if (self.index + 1) * self.batch_size > self.size:
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._shuffle(self.epoch)
        self.index += 1
        return self._take(self._order, self.index - 1)

    def batch_of(self, call: int) -> dict[str, Tensor]:
        """What the `call`-th `next_batch`, from 0, gave or will give; the position stays."""
        epoch, index = divmod(call, self.size // self.batch_size)
        return self._take(self._shuffle(epoch), index)

    def _take(self, order: Tensor, index: int) -> dict[str, Tensor]:
        rows = order[index * self.batch_size + self._rows]
        return {
            key: value[rows].to(self.device, non_blocking=True)
            for key, value in self.tensors.items()
        }

    def state_dict(self) -> dict[str, int]:
        """The position: {"epoch", "index"}, the index being that of the next batch in the epoch."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position that `state_dict` gave."""
        self.epoch, self.index = int(state["epoch"]), int(state["index"])
        self._order = self._shuffle(self.epoch)
