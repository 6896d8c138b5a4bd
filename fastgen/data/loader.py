"""Shuffled batches of sources, whose position is one number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastgen.data.source import Batch, Source
from fastgen.data.splits import DataError
from fastgen.random import fold_in, make_key

#: Changes one row, as with random crops and flips, by what the generator draws; keeps its names.
Augment = Callable[[Batch, torch.Generator], Batch]


class BatchLoader:
    """Endless shuffled batches; a batch, its augmentation included, is a function of its number.

    The order of an epoch is a function of (seed, epoch), so nothing else that draws random numbers
    can move it, and a loader set to a position goes on exactly as the first one did, whatever the
    number of workers. The last, incomplete batch of an epoch is dropped. The joint batch is cut
    into `parts`, and each of those into contiguous shares, one per process: part p of all processes
    together has the same rows however many they are.

    Args:
        sources: a source, or several of any lengths, with names of their own: a batch has
            `batch_size` rows of each, which have epochs of their own.
        batch_size: rows of the joint batch, a multiple of `parts` times `world_size`.
        seed: seed of the shuffling and of the augmentation.
        parts: how many a batch is to be cut into, to be worked on one after the other.
        rank, world_size: which share of each part is ours.
        device: where the batches go. There a uint8 tensor becomes v / 255, float32.
        workers: processes that fetch batches ahead; 0: they are fetched when asked for.
        augment: called with each row, on the CPU, and a generator that is the row's own.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        sources: Source | Sequence[Source],
        batch_size: int,
        *,
        seed: int = 0,
        parts: int = 1,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        workers: int = 0,
        augment: Augment | None = None,
    ):
        sources = [sources] if isinstance(sources, Source) else list(sources)
        fewest = min(len(source) for source in sources)
        if not 1 <= batch_size <= fewest:
            raise ValueError(
                f"batch_size must be in [1, {fewest}] (the number of samples), got {batch_size}"
            )
        if batch_size % (parts * world_size):
            times = f" times {parts} parts" if parts > 1 else ""
            raise ValueError(
                f"batch_size must be a multiple of the {world_size} processes{times}, "
                f"got {batch_size}"
            )
        rows = torch.arange(batch_size).view(parts, world_size, -1)[:, rank]
        self.first_rows: list[int] = rows[:, 0].tolist()
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.workers = workers
        self.position = 0
        self._fetch = _Fetch(sources, batch_size, rows.flatten(), seed, augment)
        self._ahead: Iterator[Any] | None = None

    def next_batch(self) -> Batch:
        """The next batch, each tensor (batch_size / world_size, ...), on `device`.

        Its equal parts begin at the rows `first_rows` of the joint batch.

        Raises:
            DataError: a row cannot be read.
        """
        if self.workers == 0:
            batch = self._fetch[self.position]
        else:
            if self._ahead is None:
                self._ahead = iter(self._start_workers())
            batch = next(self._ahead)
        self.position += 1
        return self._finished(batch)

    def batch_of(self, call: int) -> Batch:
        """What the `call`-th `next_batch`, from 0, gave or will give; the position stays."""
        return self._finished(self._fetch[call])

    def state_dict(self) -> dict[str, int]:
        """The position: how many batches came before."""
        return {"batches": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position that `state_dict` gave."""
        self.close()
        self.position = int(state["batches"])

    def close(self) -> None:
        """End the workers; the next batch starts others."""
        self._ahead = None

    def _start_workers(self) -> DataLoader:
        return DataLoader(
            self._fetch,
            sampler=_From(self.position),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
        )

    def _finished(self, batch: Batch | DataError) -> Batch:
        if isinstance(batch, DataError):
            raise batch
        moved = {n: value.to(self.device, non_blocking=True) for n, value in batch.items()}
        return {n: v.float().div_(255) if v.dtype == torch.uint8 else v for n, v in moved.items()}


class _From(Sampler):
    """All numbers from `start` on."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while True:
            yield number
            number += 1


class _Fetch(Dataset):
    """Our share of the batch with a number: what workers compute."""

    def __init__(
        self,
        sources: list[Source],
        batch_size: int,
        rows: Tensor,
        seed: int,
        augment: Augment | None,
    ):
        self.sources = sources
        self.batch_size = batch_size
        self.rows = rows
        self.seed = seed
        self.augment = augment
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def __getitem__(self, call: int) -> Batch | DataError:
        """An error is a value: a worker would wrap it in the text of its traceback."""
        try:
            batch: Batch = {}
            for number, source in enumerate(self.sources):
                found = source.take(self._numbers(number, call))
                twice = sorted(batch.keys() & found.keys())
                if twice:
                    raise DataError(f"two sources of one batch have {', '.join(twice)}")
                batch |= found
        except DataError as error:
            return error
        return batch if self.augment is None else self._augmented(batch, call, self.augment)

    def _numbers(self, number: int, call: int) -> Tensor:
        """The rows of a source that are ours in the batch `call`."""
        size = len(self.sources[number])
        epoch, index = divmod(call, size // self.batch_size)
        if self._orders.get(number, (-1, None))[0] != epoch:
            seed = (self.seed * 1_000_003 + epoch + number * 0x9E3779B97F4A7C15) % 2**63
            generator = torch.Generator().manual_seed(seed)
            self._orders[number] = epoch, torch.randperm(size, generator=generator)
        return self._orders[number][1][index * self.batch_size + self.rows]

    def _augmented(self, batch: Batch, call: int, augment: Augment) -> Batch:
        keys = fold_in(make_key(self.seed), call * self.batch_size + self.rows)
        changed = []
        for i, seed in enumerate(keys[:, 0].tolist()):
            generator = torch.Generator().manual_seed(seed)
            changed.append(augment({name: value[i] for name, value in batch.items()}, generator))
        return {name: torch.stack([row[name] for row in changed]) for name in changed[0]}


def _as_it_is(batch: Any) -> Any:
    return batch
