"""The training engine, tasks, checkpoints and run folders; needs the extra `fastgen[train]`."""

from fastgen.training.config import EngineConfig
from fastgen.training.engine import Engine, make_accelerator
from fastgen.training.errors import CheckpointError, NonFiniteLossError, RunError
from fastgen.training.run_folder import RunFolder
from fastgen.training.runs import evaluate_run, load_run, resume_run, sample_run, start_run
from fastgen.training.tasks import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "CheckpointError",
    "Engine",
    "EngineConfig",
    "NonFiniteLossError",
    "Recipe",
    "RunError",
    "RunFolder",
    "evaluate_run",
    "load_run",
    "make_accelerator",
    "resume_run",
    "sample_run",
    "start_run",
]
