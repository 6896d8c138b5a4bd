"""Trains a tiny run to its end, and the same run killed again and again; see test_resume.py.

usage: crash_driver.py FOLDER JSON with {"config": ..., "points": [...], "delays": [...]}

FOLDER/whole is never killed. FOLDER/killed dies once for each point n, by SIGKILL just before the
n-th call of that life that makes files durable or visible, and once for each delay, that many
seconds after the first step; then it is left to finish. The parent never runs a torch op, so that
forking is safe; it imports torch once for all lives.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import sklearn.datasets  # noqa: F401

from fastgen.training import runs
from fastgen.training.options import config_from_dict
from fastgen.training.stage_run import StageRun

_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(point: int) -> None:
    count = 0

    def wrap(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == point:
                die()
            return call(*args, **kwargs)

        return wrapped

    for name in _CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def die_after(delay: float) -> None:
    step = StageRun.step

    def timed(self):
        if not timers:
            timers.append(threading.Timer(delay, die))
            timers[0].start()
        step(self)

    timers: list[threading.Timer] = []
    StageRun.step = timed


def train(folder: Path, config: dict) -> None:
    if (folder / "config.yaml").exists():
        runs.resume_run(folder)
    else:
        runs.start_run(*config_from_dict(config), folder)


def live(folder: Path, config: dict, *, point: int = 0, delay: float | None = None) -> int:
    """One life in a process of its own; what it died of."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        if point:
            die_at_call(point)
        if delay is not None:
            die_after(delay)
        train(folder, config)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    folder, wanted = Path(sys.argv[1]), json.loads(sys.argv[2])
    config = wanted["config"]
    ends = {"whole": live(folder / "whole", config)}
    deaths = [live(folder / "killed", config, point=point) for point in wanted["points"]]
    deaths += [live(folder / "killed", config, delay=delay) for delay in wanted["delays"]]
    ends["killed"] = live(folder / "killed", config)
    (folder / "deaths.json").write_text(json.dumps({"ends": ends, "deaths": deaths}))


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.1f} s")
