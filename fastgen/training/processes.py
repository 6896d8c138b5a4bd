"""Processes that train together: how they join, fail, stop and leave."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object, get_int_from_env

from fastgen.data import DataError
from fastgen.training.config import EngineConfig
from fastgen.training.errors import RunError

_WORLD_SIZE = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
_STEPS_BETWEEN_QUESTIONS = 10


def make_accelerator(config: EngineConfig) -> Accelerator:
    """The process group and device that the launcher and `config` ask for.

    Raises:
        ValueError: the launcher started several processes, but this one would train alone.
    """
    launched = _launched()
    if launched > 1:
        # Its functions keep the group there is when it is imported as their default, and with the
        # group gloo's threads, to the very end.
        importlib.import_module("torch.distributed.nn.functional")
    # without cpu=True and without a GPU, Accelerate forms no group
    cpu = config.cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision=config.mixed_precision)
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but this one would train in a group of "
            f"{accelerator.num_processes}; launch with torchrun, or unset {_WORLD_SIZE[0]}"
        )
    return accelerator


def _launched() -> int:
    """How many processes the launcher started."""
    count = get_int_from_env(_WORLD_SIZE, 0)
    if count == 0 and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys():
        raise ValueError(
            "accelerate launch starts one process on the CPU, however many it is told; launch with "
            "torchrun --nproc-per-node N or accelerate launch --multi_gpu, or unset MASTER_ADDR"
        )
    return max(count, 1)


@contextmanager
def agreeing(accelerator: Accelerator) -> Iterator[None]:
    """An error of one process becomes an error of all, so that none waits for one that is gone.

    Nothing inside may wait for other processes.

    Raises:
        RunError, DataError: of this process, or a RunError with the words of the first that failed.
    """
    mine: RunError | DataError | None = None
    try:
        yield
    except (RunError, DataError) as error:
        mine = error
    kind = None if mine is None else (type(mine) if isinstance(mine, RunError) else RunError)
    failed = [one for one in gather_object([(kind, str(mine))]) if one[0] is not None]
    if not failed:
        return
    if mine is None:
        kind, words = failed[0]
        mine = kind(words)
    mine.shared = accelerator.num_processes > 1  # type: ignore[union-attr]
    raise mine


def tells(error: Exception) -> bool:
    """Whether this process says what went wrong; the others leave it to the main one.

    Before there is a process group, every machine's first process does.
    """
    if dist.is_available() and dist.is_initialized():
        return not getattr(error, "shared", False) or dist.get_rank() == 0
    return get_int_from_env(["LOCAL_RANK"], 0) == 0


def leave_process_group() -> None:
    """End the process group, if there is one, with its threads.

    Gloo's threads hold tensors for a while after a collective; to release one they take Python's
    lock, and where Python is shutting down by then, that aborts the process. Nothing that is alive
    may refer to the group, as networks wrapped for it do.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


class StopRequest:
    """SIGTERM as a wish to stop after the current step, while it is entered.

    Args:
        accelerator: several processes ask each other every 10 steps, and stop after the same one.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._come = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._come = True

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`: the same answer in all processes."""
        if self._accelerator.num_processes == 1:
            return self._come
        if step % _STEPS_BETWEEN_QUESTIONS:
            return False
        come = torch.tensor([float(self._come)], device=self._accelerator.device)
        return self._accelerator.reduce(come, "sum").item() > 0
