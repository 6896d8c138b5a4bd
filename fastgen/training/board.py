"""TensorBoard's event files, written at once: torch's writer does it in a thread of its own, where
an error of the disk comes late, as a traceback."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

_VERSION = "brain.Event:2"


class Board:
    """A new event file.

    Args:
        folder: where it goes; made where it is missing.
        first_step: TensorBoard forgets what earlier files have from this step on.

    Raises:
        OSError: the disk refuses; also from the methods.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(exist_ok=True)
        stem = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        count = sum(1 for path in folder.iterdir() if path.name.startswith(stem))
        self._file = open(folder / f"{stem}.{count}", "xb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        try:
            self._add(Event(file_version=_VERSION))
            self._add(Event(step=first_step, file_version=_VERSION))
            self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
            self.flush()
        except OSError:
            with suppress(OSError):
                self.close()
            raise

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """One value of a curve."""
        self._add_summary(summary.scalar(name, value), step)

    def add_images(self, name: str, images: Tensor, step: int) -> None:
        """Images (N, C, H, W) in [0, 1]."""
        self._add_summary(summary.image(name, images, dataformats="NCHW"), step)

    def flush(self) -> None:
        """Hand what was added to the system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _add_summary(self, values: Summary, step: int) -> None:
        self._add(Event(summary=values, step=step))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
