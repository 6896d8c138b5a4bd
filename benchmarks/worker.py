"""One side of `benchmarks.run --base`: times what it is asked to, in turn with another process.

Started as a script, with the fastgen to load first on PYTHONPATH. Requests and answers are lines of
JSON on standard input and output.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# As a script this file's folder comes first, and is a package, not a place for modules.
sys.path.pop(0)

import torch  # noqa: E402

import fastgen  # noqa: E402
from benchmarks.case import Setting  # noqa: E402
from benchmarks.clock import timed  # noqa: E402
from benchmarks.harness import make_step  # noqa: E402

CPU = torch.device("cpu")
#: Untimed seconds at the start of a turn: the other process's threads have just been running.
WARM_UP = 0.005


class Worker:
    """Holds the step that is being compared."""

    def __init__(self) -> None:
        self.step: Callable[[], Any] | None = None

    def open(self, op: str, size: str, mode: str, threads: int, isa: str) -> dict:
        """Prepares one case; {"missing": why} where this fastgen lacks the op."""
        self.step = None
        try:
            cases = importlib.import_module(f"benchmarks.ops.bench_{op}").CASES
        except (AttributeError, ImportError) as error:
            return {"missing": str(error)}
        Setting(threads, isa).apply()
        torch.manual_seed(0)
        case = next(case for case in cases if case.size == size)
        self.step = make_step(case.call, case.make(), case.grad, mode)
        self.step()
        return {"seconds": timed(self.step, CPU)}

    def time(self, calls: int) -> dict:
        """Median seconds of `calls` calls, after a warm-up."""
        assert self.step is not None, "open comes first"
        warm = 0.0
        while warm < WARM_UP:
            warm += timed(self.step, CPU)
        return {"seconds": median(timed(self.step, CPU) for _ in range(calls))}


def main() -> None:
    expected = Path(os.environ["FASTGEN_WORKER_TREE"])
    if not Path(fastgen.__file__).is_relative_to(expected):
        sys.exit(f"expected the fastgen of {expected}, got {fastgen.__file__}")
    # Whatever else prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    print(json.dumps({"ready": fastgen.__version__}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(worker, request.pop("do"))(**request)), file=answers)


if __name__ == "__main__":
    main()
