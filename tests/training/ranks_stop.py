"""`fastgen` whose second process gets SIGTERM in its seventh step; each says what threads it has in
the end, and of which rank it is.

usage: torchrun ... ranks_stop.py train RECIPE [options]
"""

import os
import signal
import sys
from pathlib import Path

from fastgen.cli import main
from fastgen.training.stage_run import StageRun

_step = StageRun.step


def step(self: StageRun) -> None:
    if self.steps_done == 6 and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    _step(self)


if __name__ == "__main__":
    StageRun.step = step
    status = main(sys.argv[1:])
    names = {
        task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()
    }
    print(f"\nrank {os.environ['RANK']} status {status} threads {sorted(names)}", flush=True)
    sys.exit(status)
