"""The folder of a run: config.yaml, metrics.jsonl, tensorboard/, samples/, checkpoints/."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml
from torch import Tensor

from fastgen.training.board import Board
from fastgen.training.checkpoint import remove, sync, write_atomic
from fastgen.training.errors import RunError, WriteError
from fastgen.training.images import png_bytes


class RunFolder:
    """Paths and files of one run. Make one with `create` or `open`, never directly."""

    def __init__(self, path: Path):
        self.path = path
        self.config_path = path / "config.yaml"
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """Make the folder with its config.yaml in one atomic step.

        Raises:
            RunError: it exists and is not empty, or cannot be written.
        """
        path = path.absolute()
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise RunError(
                    f"{path} exists; continue it with --resume {path}, or give another --run-dir"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".tmp-{path.name}")
            remove(temporary)
            temporary.mkdir()
            try:
                run = cls(temporary)
                run.checkpoints.mkdir()
                run.samples.mkdir()
                write_atomic(run.config_path, yaml.safe_dump(config, sort_keys=False).encode())
                os.rename(temporary, path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync(path.parent)
        except OSError as error:
            raise RunError(
                f"cannot write the run folder {path}: {error.strerror}; give another with --run-dir"
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A run that exists.

        Raises:
            RunError: there is no run.
        """
        run = cls(path.absolute())
        if not run.config_path.is_file():
            raise RunError(f"{run.path} is not a run folder: it has no config.yaml")
        return run

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            RunError: config.yaml is unreadable.
        """
        try:
            config = yaml.safe_load(self.config_path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{self.config_path} cannot be read: {reason}") from error
        if not isinstance(config, dict):
            raise RunError(f"{self.config_path} is damaged: it does not hold options")
        return config

    def lock(self) -> None:
        """Keep other processes from training this run; the lock ends with this process.

        Raises:
            RunError: another process has it.
            WriteError: the folder cannot be written.
        """
        path = self.path / ".lock"
        with writing(path):
            self._lock = open(path, "w")  # noqa: SIM115
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.unlock()
                raise RunError(
                    f"{self.path} is being trained by another process; wait or stop it"
                ) from None

    def unlock(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_samples(self, name: str, images: Tensor) -> Path:
        """Write images (N, C, H, W) in [0, 1] as one grid to samples/`name`.png.

        Raises:
            WriteError: the disk refuses.
        """
        path = self.samples / f"{name}.png"
        with writing(path):
            self.samples.mkdir(exist_ok=True)
            write_atomic(path, png_bytes(images))
        return path


class MetricsLog:
    """metrics.jsonl and TensorBoard.

    Args:
        run: the run folder.
        position: length in bytes of metrics.jsonl when the checkpoint was made; what lies beyond is
            dropped.
        step: the step of that checkpoint.

    Raises:
        WriteError: the disk refuses; also from the methods.
    """

    def __init__(self, run: RunFolder, position: int, step: int):
        self._path = run.metrics_path
        self._folder = run.path / "tensorboard"
        with writing(self._path):
            self._file = open(self._path, "ab")  # noqa: SIM115
            try:
                if self._file.tell() > position:
                    self._file.truncate(position)
                with writing(self._folder):
                    self._board = Board(self._folder, step + 1)
            except BaseException:
                self._file.close()
                raise

    def write(self, step: int, stage: str, split: str, values: dict[str, float]) -> None:
        """Append one line, and one TensorBoard scalar a value."""
        record = {"step": step, "stage": stage, "split": split, **values}
        with writing(self._path):
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        with writing(self._folder):
            for name, value in values.items():
                self._board.add_scalar(f"{stage}/{split}/{name}", value, step)
            self._board.flush()

    def draw(self, step: int, stage: str, name: str, images: Tensor) -> None:
        """A sample grid for TensorBoard: images (N, C, H, W) in [0, 1]."""
        with writing(self._folder):
            self._board.add_images(f"{stage}/{name}", images.clamp(0, 1), step)
            self._board.flush()

    def sync(self) -> int:
        """Bring what was written to the disk, and return the length of metrics.jsonl in bytes."""
        with writing(self._path):
            os.fsync(self._file.fileno())
            return self._file.tell()

    def close(self) -> None:
        """Close both. What was written is flushed; what could not be was an error then."""
        for file in (self._file, self._board):
            with suppress(OSError):
                file.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A refusal of the disk becomes a `WriteError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}; free space there, or mend what is in "
            "the way, and use --resume"
        ) from error
