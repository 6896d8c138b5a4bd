"""How long calls take: the wall clock on a CPU, events of the device on a GPU."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

#: Device seconds between two events, at least: with so much behind it, what launches runs ahead of
#: the device, and the start of the first call does not count.
BATCH = 5e-3
#: Inputs that take turns are together this many times as large as the cache.
CACHES = 3
MOST_SETS = 16


def timed(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds a call of `calls` calls, one behind the other without waiting."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def calls_of_batch(function: Callable[[], Any], device: torch.device) -> int:
    """How many calls to put between two readings of the clock."""
    if device.type != "cuda":
        return 1
    return max(1, min(1000, round(BATCH / min(timed(function, device) for _ in range(3)))))


def sets_of_inputs(bytes_: int, device: torch.device) -> int:
    """How many inputs of `bytes_` must take turns so that none is still in a GPU's L2 cache.

    One on a CPU, where a model finds its activations in the cache too.
    """
    if device.type != "cuda" or not bytes_:
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, math.ceil(CACHES * cache / bytes_))


def in_turn(functions: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """A function that calls the next one of `functions`, round and round."""
    if len(functions) == 1:
        return functions[0]
    following = itertools.cycle(functions)
    return lambda: next(following)()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError in what takes longer than `seconds`; None is no limit.

    Works through SIGALRM: in the main thread only, and late where foreign code does not return.
    """
    if seconds is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
