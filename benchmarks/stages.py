"""Runs the stages of a long check within a total time, and keeps what each one leaves.

A stage is a set of processes that run at once, each with a log file. A stage that fails or takes
too long does not stop the later ones, and the summary is written anew after each, so that a run
that is cut short leaves what it has.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

#: Seconds between two looks at the processes of a stage, and that they get to end by themselves.
LOOK, GRACE = 0.2, 10.0
#: Lines of a log in the summary.
TAIL = 25

OK, FAILED, STOPPED, SKIPPED = "ok", "failed", "stopped", "not run"


@dataclass(frozen=True)
class Stage:
    """Processes to run at once.

    Attributes:
        name: of the stage, unique, fit for a file name.
        commands: by label, which names the log; for one process the label may be "".
        limit: seconds that the stage may take.
        reserve: seconds of the total that earlier stages must leave it.
        needs: names of the stages without which this one means nothing.
        environment: variables beside those of this process.
        missing: why it cannot run here; that is no failure.
    """

    name: str
    commands: Mapping[str, Sequence[str]]
    limit: float
    reserve: float = 0.0
    needs: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a stage: its state, why, how long it took, its logs by label."""

    name: str
    state: str
    note: str = ""
    seconds: float = 0.0
    logs: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_failure(self) -> bool:
        return self.state in (FAILED, STOPPED)


class Runner:
    """Runs stages one after the other.

    Args:
        folder: for the logs, `summary.json` and `summary.md`.
        deadline: seconds in all.
        title: heads the summary.
        publish: called with the folder after each stage and, every `every` seconds, during one.
    """

    def __init__(
        self,
        folder: Path,
        deadline: float,
        title: str = "",
        publish: Callable[[Path], None] = lambda folder: None,
        every: float = 15.0,
    ) -> None:
        self.folder, self.deadline, self.title = folder, deadline, title
        self.publish, self.every = publish, every
        self.start = time.monotonic()
        self.outcomes: list[Outcome] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.deadline - (time.monotonic() - self.start)

    def run(self, stages: Sequence[Stage]) -> int:
        """Runs every stage; returns 0, or 1 where one failed or did not get its turn."""
        for i, stage in enumerate(stages):
            reserved = sum(later.reserve for later in stages[i + 1 :] if not later.missing)
            limit = min(stage.limit, self.left - reserved)
            print(f"[{self.deadline - self.left:4.0f} s] {stage.name} ...", flush=True)
            self._keep(self._why_not(stage, limit) or self._run(stage, limit))
        return 1 if any(outcome.is_failure for outcome in self.outcomes) else 0

    def _why_not(self, stage: Stage, limit: float) -> Outcome | None:
        states = {outcome.name: outcome.state for outcome in self.outcomes}
        if stage.missing:
            return Outcome(stage.name, SKIPPED, stage.missing)
        for name in stage.needs:
            if states.get(name) != OK:
                return Outcome(stage.name, SKIPPED, f"{name} is needed: {states.get(name)}")
        if limit <= 0:
            return Outcome(stage.name, STOPPED, "no time was left")
        return None

    def _run(self, stage: Stage, limit: float) -> Outcome:
        begin = published = time.monotonic()
        logs, processes = {}, {}
        try:
            for label, command in stage.commands.items():
                path = self.folder / f"{'-'.join(filter(None, (stage.name, label)))}.log"
                logs[label] = str(path)
                processes[label] = self._start(command, path, stage.environment)
            while any(p.poll() is None for p in processes.values()):
                now = time.monotonic()
                if now - begin > limit:
                    break
                if now - published > self.every:
                    self.publish(self.folder)
                    published = now
                time.sleep(LOOK)
            late = [label for label, p in processes.items() if p.poll() is None]
        except OSError as error:
            return Outcome(stage.name, FAILED, str(error), time.monotonic() - begin, logs)
        finally:
            end_all(list(processes.values()))
        seconds = time.monotonic() - begin
        if late:
            note = " ".join(filter(None, (*late, f"stopped after {limit:.0f} s")))
            return Outcome(stage.name, STOPPED, note, seconds, logs)
        ends = {label: p.returncode for label, p in processes.items() if p.returncode != 0}
        note = ", ".join(f"{label} exit status {code}".strip() for label, code in ends.items())
        return Outcome(stage.name, FAILED if ends else OK, note, seconds, logs)

    def _start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen:
        with log.open("wb") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            return subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                start_new_session=True,
            )

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f"       {outcome.state} after {outcome.seconds:.0f} s. {outcome.note}", flush=True)
        write_whole(self.folder / "summary.json", json.dumps(self.summary(), indent=1))
        write_whole(self.folder / "summary.md", "\n".join(self.markdown()))
        self.publish(self.folder)

    def summary(self) -> dict:
        seconds = time.monotonic() - self.start
        stages = [asdict(outcome) for outcome in self.outcomes]
        return {"title": self.title, "seconds": round(seconds, 1), "stages": stages}

    def markdown(self) -> list[str]:
        """A line a stage, then the end of every log of those that failed."""
        lines = [f"# {self.title}", "", "| stage | state | s | |", "| --- | --- | --- | --- |"]
        lines += [f"| {o.name} | {o.state} | {o.seconds:.0f} | {o.note} |" for o in self.outcomes]
        for outcome in self.outcomes:
            for path in map(Path, outcome.logs.values()):
                if outcome.is_failure and path.exists():
                    tail = path.read_text(errors="replace").splitlines()[-TAIL:]
                    lines += ["", f"## {path.name}", "", "```", *tail, "```"]
        return [*lines, ""]


def end_all(processes: Sequence[subprocess.Popen]) -> None:
    """Ends the processes and what they have started.

    They are interrupted first, upon which pytest says what has failed so far.
    """
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
    give_up = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, give_up - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is whole at any moment."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    partial.replace(path)
