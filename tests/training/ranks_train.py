"""One of the processes that train a list of runs together.

usage: torchrun ... ranks_train.py FOLDER, which holds runs.json: name of a run -> its configuration

Each run is trained in FOLDER/name. One that fails, as it does after the first step that leaves the
processes with different weights, leaves FOLDER/name.error; the last assertion is that no thread of
the process group is left.
"""

import json
import sys
import traceback
from pathlib import Path

import accelerate
import torch

from fastgen.training.options import config_from_dict
from fastgen.training.processes import leave_process_group
from fastgen.training.runs import start_run
from fastgen.training.stage_run import StageRun

_step = StageRun.step


def step(self: StageRun) -> None:
    _step(self)
    for name, module in self.stage.modules.items():
        sums = [p.detach().double().square().sum() for p in module.state_dict().values()]
        first, *others = self.accelerator.gather(torch.stack(sums)[None])
        assert others, "one process alone"
        for other in others:
            assert torch.equal(first, other), f"{name} differs after step {self.steps_done}"


def main(folder: Path) -> None:
    StageRun.step = step
    for name, config in json.loads((folder / "runs.json").read_text()).items():
        try:
            start_run(*config_from_dict(config), folder / name)
        except Exception:
            (folder / f"{name}.error").write_text(traceback.format_exc())
        accelerate.state.AcceleratorState._reset_state()
    accelerate.state.PartialState._reset_state()
    leave_process_group()
    threads = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert not any("gloo" in name for name in threads), threads


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
