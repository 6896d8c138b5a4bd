"""The training engine, tasks, checkpoints and run folders; needs the extra `fastgen[train]`."""

from fastgen.training.config import EngineConfig
from fastgen.training.engine import Engine
from fastgen.training.errors import (
    CheckpointError,
    NonFiniteLossError,
    RunError,
    TrainingStopped,
)
from fastgen.training.processes import leave_process_group, make_accelerator
from fastgen.training.run_folder import RunFolder
from fastgen.training.runs import evaluate_run, load_run, resume_run, sample_run, start_run
from fastgen.training.tasks import RECIPES, Recipe, Task

__all__ = [
    "RECIPES",
    "CheckpointError",
    "Engine",
    "EngineConfig",
    "NonFiniteLossError",
    "Recipe",
    "RunError",
    "RunFolder",
    "Task",
    "TrainingStopped",
    "evaluate_run",
    "leave_process_group",
    "load_run",
    "make_accelerator",
    "resume_run",
    "sample_run",
    "start_run",
]
