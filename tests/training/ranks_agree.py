"""`fastgen` that stops with an error after the first step that leaves its processes different, or
when it leaves a thread of the process group behind.

usage: torchrun ... ranks_agree.py train RECIPE [options]
"""

import sys
from pathlib import Path

import torch

from fastgen.cli import main
from fastgen.training.stage_run import StageRun

_step = StageRun.step


def step(self: StageRun) -> None:
    _step(self)
    for name, module in self.stage.modules.items():
        sums = torch.stack([p.detach().double().square().sum() for p in module.parameters()])
        first, *others = self.accelerator.gather(sums[None])
        assert others, "one process alone"
        for other in others:
            assert torch.equal(first, other), f"{name} differs after step {self.steps_done}"


if __name__ == "__main__":
    StageRun.step = step
    status = main(sys.argv[1:])
    threads = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert not any("gloo" in name for name in threads), threads
    sys.exit(status)
