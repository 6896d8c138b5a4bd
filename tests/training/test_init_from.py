"""A run that starts from the weights of another."""

import shutil

import pytest
import torch

from fastgen.training.checkpoint import list_checkpoints, load_newest
from fastgen.training.engine import Engine
from fastgen.training.errors import CheckpointError, RunError
from fastgen.training.run_folder import RunFolder
from fastgen.training.runs import start_run


@pytest.fixture
def started(monkeypatch):
    """The tasks of the runs started, as they are before the first step."""
    tasks = []
    monkeypatch.setattr(Engine, "train", lambda self: tasks.append(self.task))
    return tasks


@pytest.mark.parametrize("complete", [True, False])
def test_averaged_weights_where_there_are_such(config, run_copy, tmp_path, started, complete):
    """A stage that is complete has them too: it may be made longer."""
    checkpoints = RunFolder.open(run_copy).checkpoints
    if not complete:
        shutil.rmtree(list_checkpoints(checkpoints)[-1])
    config.engine.init_from = str(run_copy)
    run = start_run("vqvae", config, tmp_path / "new")
    _, sections, _ = load_newest(checkpoints)
    (task,) = started
    assert sections["averages"].keys() == {"prior"}
    for name, module in task.modules.items():
        averages = sections["averages"].get(name)
        for key, value in module.state_dict().items():
            wanted = averages[f"module.{key}"] if averages else sections["model"][name][key]
            assert torch.equal(value, wanted)
    assert f"init_from: {run_copy}" in run.config_path.read_text()


def test_trains_on(config, finished_run, tmp_path):
    config.engine.init_from = str(finished_run)
    run = start_run("vqvae", config, tmp_path / "run")
    assert load_newest(RunFolder.open(run.path).checkpoints)


def test_another_model_is_refused_before_the_folder_is_made(config, finished_run, tmp_path):
    config.engine.init_from = str(finished_run)
    config.model.channels *= 2
    with pytest.raises(CheckpointError, match="does not fit the configured model"):
        start_run("vqvae", config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run(config, tmp_path):
    config.engine.init_from = str(tmp_path / "nothing")
    with pytest.raises(RunError, match="nothing"):
        start_run("vqvae", config, tmp_path / "run")
