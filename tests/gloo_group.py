"""A gloo group of two processes, for scripts that the fixture `two_ranks` starts as its ranks."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist


@contextlib.contextmanager
def joined(rank: int, store: str) -> Iterator[None]:
    """In the group; afterwards none of its threads is left."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    yield
    dist.destroy_process_group()
    threads = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    # gloo's would sometimes abort when the interpreter ends
    assert not any("gloo" in name for name in threads), threads
