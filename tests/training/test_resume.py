"""Killed at any moment and resumed, a run ends bit for bit where it would have ended anyway."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastgen.training.checkpoint import list_checkpoints, load_checkpoint
from fastgen.training.errors import RunError
from fastgen.training.options import config_to_dict
from fastgen.training.runs import resume_run, start_run

DRIVER = Path(__file__).with_name("crash_driver.py")


def same_bits(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return type(a) is type(b) and a == b


def metrics_without_timings(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "steps_per_second"} for line in lines
    ]


def die_and_compare(folder: Path, config, points: list[int], delays: list[float]) -> None:
    wanted = {"config": config_to_dict("vqvae", config), "points": points, "delays": delays}
    command = [sys.executable, str(DRIVER), str(folder), json.dumps(wanted)]
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "deaths.json").read_text())
    assert report["ends"] == {"whole": 0, "killed": 0}, done.stderr
    assert report["deaths"][: len(points)] == [-9] * len(points), done.stderr
    assert set(report["deaths"][len(points) :]) <= {0, -9}, done.stderr

    whole, killed = folder / "whole", folder / "killed"
    ours, theirs = (list_checkpoints(run / "checkpoints") for run in (killed, whole))
    assert [path.name for path in ours] == [path.name for path in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        a, b = load_checkpoint(mine), load_checkpoint(other)
        # the lengths of lines with timings in them differ
        del a["progress"]["metrics_bytes"], b["progress"]["metrics_bytes"]
        for section in b:
            assert same_bits(a[section], b[section]), f"{mine.name}/{section}"
    assert metrics_without_timings(killed) == metrics_without_timings(whole)
    assert not [*killed.rglob(".tmp-*"), *killed.rglob("damaged-*")]
    for png in (whole / "samples").iterdir():
        assert (killed / "samples" / png.name).read_bytes() == png.read_bytes()


def test_killed_while_it_writes_and_while_it_trains(tmp_path, config):
    die_and_compare(tmp_path, config, points=[3, 9, 16, 27, 38, 45], delays=[0.01, 0.1])


@pytest.mark.slow
def test_killed_at_every_other_call_that_writes(tmp_path, config):
    """One life passes about two checkpoints, so that the run must be long enough for all deaths."""
    config.autoencoder.steps = config.prior.steps = 120
    config.engine.checkpoint_every = 3
    delays = [0.02 * i for i in range(5)]
    die_and_compare(tmp_path, config, points=list(range(1, 60, 2)), delays=delays)


@pytest.fixture
def staged(config, tmp_path) -> Path:
    """A complete run of both stages with its checkpoints of steps 10 (between them) and 18."""
    config.engine.keep_checkpoints = 9
    run = start_run("vqvae", config, tmp_path / "staged").path
    for path in list_checkpoints(run / "checkpoints"):
        if path.name not in ("step-00000010", "step-00000018"):
            shutil.rmtree(path)
    return run


def set_steps(run: Path, **stages: int) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name, steps in stages.items():
        config[name]["steps"] = steps
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_the_last_stage_can_be_made_longer(staged):
    set_steps(staged, prior=12)
    resume_run(staged)
    progress = load_checkpoint(staged / "checkpoints/step-00000022")["progress"]
    assert (progress["stage"], progress["steps_done"]) == ("prior", 12)


@pytest.mark.parametrize("steps", [9, 11, 14, 18, 30])
def test_a_stage_that_is_over_cannot_change_its_length(staged, steps):
    before = (staged / "metrics.jsonl").read_bytes()
    set_steps(staged, autoencoder=steps)
    expected = f"the stages before 'prior' have {steps} steps now, but the run passed them after 10"
    with pytest.raises(RunError, match=expected):
        resume_run(staged)
    assert (staged / "metrics.jsonl").read_bytes() == before


def test_fewer_steps_than_were_done(staged):
    set_steps(staged, prior=7)
    with pytest.raises(RunError, match="'prior' has 7 steps now, but the run has done 8"):
        resume_run(staged)


def test_a_stage_that_is_complete_can_be_made_longer_before_the_next(staged):
    shutil.rmtree(staged / "checkpoints/step-00000018")
    set_steps(staged, autoencoder=14)
    resume_run(staged)
    steps = [line["step"] for line in metrics_without_timings(staged) if line["split"] == "train"]
    assert steps == [3, 6, 9, 10, 12, 14, 15, 18, 21, 22]
    model = load_checkpoint(staged / "checkpoints/step-00000022")["model"]
    averaged = load_checkpoint(staged / "checkpoints/step-00000014")["averages"]["autoencoder"]
    for name, value in model["autoencoder"].items():
        assert torch.equal(value, averaged[f"module.{name}"])


def test_a_stage_that_was_left_out_can_be_added(config, tmp_path):
    config.prior.steps = 0
    run = start_run("vqvae", config, tmp_path / "run").path
    set_steps(run, prior=8)
    resume_run(run)
    config.prior.steps = 8
    whole = start_run("vqvae", config, tmp_path / "whole").path
    one, two = (load_checkpoint(r / "checkpoints/step-00000018")["model"] for r in (run, whole))
    assert same_bits(one, two)


def test_bits_differ_when_they_differ(finished_run):
    sections = load_checkpoint(list_checkpoints(finished_run / "checkpoints")[-1])
    other = load_checkpoint(list_checkpoints(finished_run / "checkpoints")[-1])
    assert same_bits(sections, other)
    other["optimizers"]["prior"]["state"][0]["exp_avg"][0, 0] += 1e-6
    assert not same_bits(sections, other)
