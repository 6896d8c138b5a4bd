"""The engine over a small task of its own, with two phases a step."""

import json
import re
import shutil
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastgen.data import TensorSource
from fastgen.training import checkpoint as ckpt
from fastgen.training import processes
from fastgen.training.config import EngineConfig, OptimizerConfig, StageConfig
from fastgen.training.engine import Engine, load_weights
from fastgen.training.errors import (
    CheckpointError,
    NonFiniteLossError,
    RunError,
    TrainingStopped,
)
from fastgen.training.processes import make_accelerator
from fastgen.training.rng import get_rng_state, seed_all, set_rng_state
from fastgen.training.run_folder import RunFolder
from fastgen.training.stage_run import StageRun
from fastgen.training.tasks.base import PhaseLoss, Stage, Task


class RegressionStage(Stage):
    """Two linear maps fitted to one target, each in a phase of its own."""

    name = "regression"

    def __init__(self, config, modules):
        self.config = config
        self.modules = modules
        self.poison_at = None
        self.calls = 0
        self.seen = []

    def train_source(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
        return TensorSource(x=x, y=x @ torch.tensor([1.0, -2.0, 3.0, 0.5]))

    def optimizers(self):
        return {
            name: self.config.optimizer.build([module]) for name, module in self.modules.items()
        }

    def loss(self, phase, nets, batch, draws):
        self.calls += 1
        self.seen.append((phase, len(batch["x"])))
        loss = (nets[phase](batch["x"])[:, 0] - batch["y"]).square().mean()
        if self.calls == self.poison_at:
            loss = loss * float("nan")
        return PhaseLoss(loss, {f"{phase}_loss": loss})

    def summarise(self, logs):
        return {name: value.item() for name, value in logs.items()}

    def validate(self, modules):
        return {"weight": modules["first"].weight[0, 0].item()}

    def draw(self, modules):
        return {"weights": modules["first"].weight.detach().view(1, 1, 2, 2)}


class RegressionTask(Task):
    def __init__(self, steps=20, **stage):
        torch.manual_seed(0)
        self.modules = {"first": nn.Linear(4, 1), "second": nn.Linear(4, 1)}
        optimizer = OptimizerConfig(lr=0.1, warmup_steps=0)
        config = StageConfig(steps=steps, batch_size=16, optimizer=optimizer)
        self.stages = [RegressionStage(replace(config, **stage), self.modules)]

    def sample(self, num, *, labels, temperature, generator):
        raise NotImplementedError

    def evaluate(self):
        raise NotImplementedError


def build(folder, task=None, **options) -> Engine:
    options = {"cpu": True, "log_every": 5, "valid_every": 10, "checkpoint_every": 10} | options
    config = EngineConfig(**options)
    run = folder if isinstance(folder, RunFolder) else RunFolder.create(folder / "run", {"a": 1})
    return Engine(task or RegressionTask(), config, run, make_accelerator(config))


def metrics(engine, split):
    lines = map(json.loads, engine.run.metrics_path.read_text().splitlines())
    return [line for line in lines if line["split"] == split]


def test_both_phases_learn_and_are_logged(tmp_path):
    engine = build(tmp_path, RegressionTask(steps=60))
    engine.train()
    lines = metrics(engine, "train")
    assert [line["step"] for line in lines] == list(range(5, 65, 5))
    for name in ("first_loss", "second_loss"):
        assert lines[-1][name] < 0.05 * lines[0][name]
    assert [line["step"] for line in metrics(engine, "valid")] == [0, 10, 20, 30, 40, 50, 60]
    saved = [path.name for path in ckpt.list_checkpoints(engine.run.checkpoints)]
    assert saved == ["step-00000050", "step-00000060"]
    assert (engine.run.samples / "step-00000060-weights.png").read_bytes()[:4] == b"\x89PNG"
    assert list((engine.run.path / "tensorboard").iterdir())


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_printed(tmp_path, monkeypatch, capsys, terminal):
    """The run's path first; losses and speed too, unless a bar on a terminal shows them."""
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
    engine = build(tmp_path, RegressionTask(steps=10))
    engine.train()
    out, err = capsys.readouterr()
    first, *lines = out.splitlines()
    assert first == f"run: {engine.run.path}"
    assert sum("  valid: weight " in line for line in lines) == 2
    trained = [line for line in lines if "  train: " in line]
    if terminal:
        assert not trained and "first_loss=" in err
        return
    expected = r"step +(5|10)  regression  train: first_loss \S+  second_loss \S+  \S+ steps/s"
    assert len(trained) == 2 and all(re.fullmatch(expected, line) for line in trained)
    assert not err


def test_the_interval_is_averaged(tmp_path):
    engine = build(tmp_path, RegressionTask(steps=10), log_every=1)
    engine.train()
    single = [line["first_loss"] for line in metrics(engine, "train")]
    engine = build(tmp_path / "other", RegressionTask(steps=10), log_every=5)
    engine.train()
    averaged = [line["first_loss"] for line in metrics(engine, "train")]
    assert averaged == pytest.approx([sum(single[:5]) / 5, sum(single[5:]) / 5])


def test_accumulation_gives_the_same_gradient(tmp_path):
    whole, parts = build(tmp_path / "a"), build(tmp_path / "b", accumulate=4)
    whole.train()
    parts.train()
    assert set(whole.task.stages[0].seen) == {("first", 16), ("second", 16)}
    assert set(parts.task.stages[0].seen) == {("first", 4), ("second", 4)}
    for a, b in zip(whole.task.modules.values(), parts.task.modules.values(), strict=True):
        torch.testing.assert_close(a.weight, b.weight)
    a, b = (metrics(engine, "train")[0]["first_loss"] for engine in (whole, parts))
    assert a == pytest.approx(b)


def test_clipping_bounds_the_update(tmp_path):
    plain, clipped = build(tmp_path / "a"), build(tmp_path / "b", max_grad_norm=1e-12)
    before = clipped.task.modules["first"].weight.clone()
    plain.train()
    clipped.train()
    assert (plain.task.modules["first"].weight - before).abs().max() > 0.5
    # AdamW's eps of 1e-8 dwarfs the clipped gradient
    assert (clipped.task.modules["first"].weight - before).abs().max() < 1e-2


def test_averaged_weights_are_the_result(tmp_path, monkeypatch):
    engine = build(tmp_path, ema_decay=0.9)
    history = []
    step = StageRun.step

    def recorded(run):
        step(run)
        history.append(run.stage.modules["first"].weight.detach().clone())

    monkeypatch.setattr(StageRun, "step", recorded)
    engine.train()
    expected = history[0]
    for n, weight in enumerate(history[1:], 1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(engine.task.modules["first"].weight.detach(), expected)
    assert metrics(engine, "valid")[-1]["weight"] == pytest.approx(expected[0, 0].item())
    middle = ckpt.load_checkpoint(engine.run.checkpoints / "step-00000010")
    fresh = RegressionTask()
    load_weights(fresh, middle)
    assert torch.equal(fresh.modules["first"].weight, history[9])
    load_weights(fresh, middle, averaged=True)
    assert not torch.equal(fresh.modules["first"].weight, history[9])


def test_averages_of_a_short_run_are_near_its_weights(tmp_path):
    """A decay of 0.999 from the start would leave them where they began."""
    plain, averaged = build(tmp_path / "a"), build(tmp_path / "b", ema_decay=0.999)
    start = plain.task.modules["first"].weight.detach().clone()
    plain.train()
    averaged.train()
    end, kept = (engine.task.modules["first"].weight.detach() for engine in (plain, averaged))
    assert (kept - end).norm() < 0.3 * (end - start).norm()


@pytest.mark.parametrize("poison_at", [1, 31, 36])
def test_a_nan_loss_stops_the_run(tmp_path, poison_at):
    task = RegressionTask()
    task.stages[0].poison_at = poison_at
    engine = build(tmp_path, task)
    step = (poison_at + 1) // 2
    term = "first" if poison_at % 2 else "second"
    where = "step-00000010" if step > 10 else "there is no checkpoint yet"
    with pytest.raises(NonFiniteLossError, match=rf"at step {step} in {term}_loss.*{where}"):
        engine.train()
    assert_saved_weights_are_finite(engine)


def assert_saved_weights_are_finite(engine):
    for path in ckpt.list_checkpoints(engine.run.checkpoints):
        weights = ckpt.load_checkpoint(path)["model"]
        assert all(value.isfinite().all() for state in weights.values() for value in state.values())


def test_nan_in_a_batch_is_found_in_the_batch(tmp_path):
    task = RegressionTask()
    source = task.stages[0].train_source()
    source.tensors["x"][11, 2] = float("nan")
    task.stages[0].train_source = lambda: source
    engine = build(tmp_path, task)
    # an epoch is four batches of 16: the row comes in one of them
    with pytest.raises(NonFiniteLossError, match=r"at step [1-4] in x of the batch.*mend the data"):
        engine.train()


def test_a_nan_gradient_of_a_finite_loss_is_not_saved(tmp_path):
    """The last step before a checkpoint leaves weights that only the next step would show."""
    task = RegressionTask()
    stage = task.stages[0]
    plain = stage.loss

    def loss(phase, nets, batch, draws):
        found = plain(phase, nets, batch, draws)
        if stage.calls != 40:
            return found
        weight = task.modules["second"].weight
        return found._replace(loss=found.loss + (weight - weight.detach()).square().sum().sqrt())

    stage.loss = loss
    engine = build(tmp_path, task)
    expected = r"at step 20 in second.weight.*last good checkpoint is .*step-00000010"
    with pytest.raises(NonFiniteLossError, match=expected):
        engine.train()
    assert_saved_weights_are_finite(engine)


def test_sigterm_saves_stops_and_can_be_gone_on_from(tmp_path, monkeypatch):
    whole = build(tmp_path / "whole", ema_decay=0.9)
    whole.train()
    stopped = build(tmp_path / "stopped", ema_decay=0.9)
    step, before = StageRun.step, signal.getsignal(signal.SIGTERM)

    def terminated(run):
        step(run)
        if run.steps_done == 13:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StageRun, "step", terminated)
    with pytest.raises(TrainingStopped, match="after step 13, which is saved; .*--resume"):
        stopped.train()
    assert signal.getsignal(signal.SIGTERM) == before
    saved = [path.name for path in ckpt.list_checkpoints(stopped.run.checkpoints)]
    assert saved == ["step-00000010", "step-00000013"]
    monkeypatch.setattr(StageRun, "step", step)
    resumed = build(stopped.run, ema_decay=0.9)
    resumed.train(resume=True)
    for a, b in zip(whole.task.modules.values(), resumed.task.modules.values(), strict=True):
        assert torch.equal(a.weight, b.weight)
    timing = "steps_per_second"
    ours, theirs = (
        [{k: v for k, v in line.items() if k != timing} for line in metrics(engine, "train")]
        for engine in (resumed, whole)
    )
    assert ours == theirs


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = SimpleNamespace(num_processes=1)
    monkeypatch.setattr(processes, "Accelerator", lambda **options: alone)
    with pytest.raises(ValueError, match="2 processes were launched, .* a group of 1; launch with"):
        make_accelerator(EngineConfig(cpu=True))


def test_accelerate_launch_on_the_cpu_is_refused(monkeypatch):
    """It sets an address for several processes, and starts one."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    make_accelerator(EngineConfig(cpu=True))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="starts one process on the CPU.*torchrun"):
        make_accelerator(EngineConfig(cpu=True))


def test_without_a_gpu_processes_meet_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    given = {}

    def accelerator(**options):
        given.update(options)
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(processes, "Accelerator", accelerator)
    make_accelerator(EngineConfig(cpu=False))
    assert given["cpu"] is True


def test_a_complete_run_is_left_as_it_is(tmp_path):
    engine = build(tmp_path)
    engine.train()
    before = engine.run.metrics_path.read_bytes()
    again = build(engine.run)
    again.train(resume=True)
    assert again.task.stages[0].calls == 0
    assert engine.run.metrics_path.read_bytes() == before


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_complete_run_that_gets_more_steps_goes_on_as_if_it_had_not_ended(tmp_path, ema_decay):
    """Bit for bit, where the learning rate does not depend on the length."""
    flat = OptimizerConfig(lr=0.1, warmup_steps=5, final_lr=1.0)
    whole = build(tmp_path / "a", RegressionTask(30, optimizer=flat), ema_decay=ema_decay)
    whole.train()
    short = build(tmp_path / "b", RegressionTask(13, optimizer=flat), ema_decay=ema_decay)
    short.train()
    longer = build(short.run, RegressionTask(30, optimizer=flat), ema_decay=ema_decay)
    longer.train(resume=True)
    one, two = (
        ckpt.load_checkpoint(engine.run.checkpoints / "step-00000030") for engine in (whole, longer)
    )
    states = [{n: o["state"] for n, o in sections["optimizers"].items()} for sections in (one, two)]
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)
    for section in ("model", "averages", "rng"):
        torch.testing.assert_close(one[section], two[section], rtol=0, atol=0, equal_nan=True)
    for a, b in zip(whole.task.modules.values(), longer.task.modules.values(), strict=True):
        assert torch.equal(a.weight, b.weight)


def test_a_longer_run_has_the_schedule_of_its_new_length(tmp_path, monkeypatch):
    build(tmp_path, RegressionTask(10)).train()
    rates, step = [], StageRun.step

    def noted(run):
        step(run)
        rates.append(run.optimizers["first"].param_groups[0]["lr"])

    monkeypatch.setattr(StageRun, "step", noted)
    run = RunFolder.open(tmp_path / "run")
    build(run, RegressionTask(20)).train(resume=True)
    config = OptimizerConfig(lr=0.1, warmup_steps=0)
    assert rates == [config.lr_at(step, 20) for step in range(10, 20)]


def test_fewer_steps_than_were_done_are_refused(tmp_path):
    build(tmp_path, RegressionTask(10)).train()
    run = RunFolder.open(tmp_path / "run")
    expected = "stage 'regression' has 9 steps now, but the run has done 10; give it as many or"
    with pytest.raises(RunError, match=expected):
        build(run, RegressionTask(9)).train(resume=True)


def test_a_complete_run_has_its_averages_as_weights_when_it_is_gone_on_with(tmp_path):
    engine = build(tmp_path, ema_decay=0.9)
    engine.train()
    again = build(engine.run, ema_decay=0.9)
    again.train(resume=True)
    for a, b in zip(engine.task.modules.values(), again.task.modules.values(), strict=True):
        assert torch.equal(a.weight, b.weight)


def test_folders_that_the_user_deleted_are_made_again(tmp_path, monkeypatch):
    whole = build(tmp_path / "a")
    whole.train()
    engine = build(tmp_path / "b", sample_every=15)
    step = StageRun.step

    def deleting(run):
        step(run)
        if run.steps_done == 12:
            shutil.rmtree(engine.run.samples)
            shutil.rmtree(engine.run.checkpoints)

    monkeypatch.setattr(StageRun, "step", deleting)
    engine.train()
    assert [path.name for path in engine.run.samples.iterdir()] == [
        f"step-000000{step}-weights.png" for step in (15, 20)
    ]
    assert [path.name for path in engine.run.checkpoints.iterdir()] == ["step-00000020"]
    monkeypatch.setattr(StageRun, "step", step)
    for name in ("samples", "checkpoints", "tensorboard"):
        shutil.rmtree(engine.run.path / name)
    again = build(engine.run)
    again.train(resume=True)
    for a, b in zip(whole.task.modules.values(), again.task.modules.values(), strict=True):
        assert torch.equal(a.weight, b.weight)
    assert len(list(engine.run.checkpoints.iterdir())) == 2


def test_a_checkpoint_damaged_twice(tmp_path):
    engine = build(tmp_path)
    engine.train()
    for _ in range(3):
        newest = engine.run.checkpoints / "step-00000020"
        (newest / "model.safetensors").write_bytes(b"")
        build(engine.run).train(resume=True)
    aside = sorted(path.name for path in engine.run.checkpoints.glob("damaged-*"))
    assert aside == [f"damaged-step-00000020{suffix}" for suffix in ("", "-2", "-3")]
    ckpt.load_checkpoint(newest)


def test_strays_in_the_folders_of_a_run(tmp_path):
    """Files where folders are expected, folders where files are, and links."""
    engine = build(tmp_path, checkpoint_every=5)
    checkpoints = engine.run.checkpoints
    (checkpoints / ".tmp-step-00000005").write_text("a file")
    (checkpoints / ".tmp-step-00000099").write_text("a file")
    (checkpoints / ".tmp-other").symlink_to(tmp_path / "nowhere")
    (checkpoints / "step-00000001").write_text("a file")
    (checkpoints / "step-00000002").symlink_to(tmp_path / "nowhere")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    (checkpoints / "step-00000003").symlink_to(tmp_path / "kept")
    engine.train()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000015", "step-00000020"]
    assert (tmp_path / "kept" / "file").read_text() == "mine"
    (checkpoints / "step-00000030").write_text("a file")
    (checkpoints / "step-00000031").mkdir()
    build(engine.run, RegressionTask(25), checkpoint_every=5).train(resume=True)
    names = sorted(path.name for path in checkpoints.iterdir())
    aside = ["damaged-step-00000030", "damaged-step-00000031"]
    assert names == [*aside, "step-00000020", "step-00000025"]


def test_a_damaged_newest_checkpoint_is_set_aside_with_a_warning(tmp_path, capsys):
    engine = build(tmp_path)
    engine.train()
    newest = engine.run.checkpoints / "step-00000020"
    whole = ckpt.load_checkpoint(newest)["model"]
    content = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(content[:-4])
    build(engine.run).train(resume=True)
    out = capsys.readouterr().out
    assert "warning" in out and "model.safetensors is damaged" in out and "step-00000010" in out
    assert (engine.run.checkpoints / "damaged-step-00000020" / "model.json").exists()
    again = ckpt.load_checkpoint(newest)["model"]
    assert all(torch.equal(whole[m][k], again[m][k]) for m in whole for k in whole[m])


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    engine = build(tmp_path)
    engine.train()
    for path in ckpt.list_checkpoints(engine.run.checkpoints):
        (path / "rng.safetensors").write_bytes(b"")
    before = sorted(path.name for path in engine.run.checkpoints.iterdir())
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        build(engine.run).train(resume=True)
    assert sorted(path.name for path in engine.run.checkpoints.iterdir()) == before


def test_another_model_is_refused(tmp_path):
    engine = build(tmp_path)
    engine.train()
    other = RegressionTask()
    other.modules["first"] = nn.Linear(5, 1)
    with pytest.raises(CheckpointError, match="does not fit the configured model"):
        build(engine.run, other).train(resume=True)


def test_two_processes_cannot_train_one_run(tmp_path):
    engine = build(tmp_path)
    engine.run.lock()
    with pytest.raises(RunError, match="being trained by another process"):
        build(RunFolder.open(engine.run.path)).train(resume=True)
    engine.run.unlock()
    build(RunFolder.open(engine.run.path)).train(resume=True)


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_mixed_precision(tmp_path, precision, dtype):
    task = RegressionTask()
    task.modules["first"] = nn.Sequential(task.modules["first"])
    stage = task.stages[0]
    stage.validate, stage.draw = lambda modules: {}, lambda modules: {}
    linear, seen = task.modules["first"][0], set()
    linear.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    build(tmp_path, task, mixed_precision=precision).train()
    assert seen == {dtype} and linear.weight.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports inductor
def test_compiled_equals_eager(tmp_path):
    eager, compiled = build(tmp_path / "a"), build(tmp_path / "b", compile=True)
    eager.train()
    compiled.train()
    for a, b in zip(eager.task.modules.values(), compiled.task.modules.values(), strict=True):
        torch.testing.assert_close(a.weight, b.weight)


def test_learning_rate_warms_up_and_decays():
    config = OptimizerConfig(lr=2.0, warmup_steps=4, final_lr=0.1)
    rates = [config.lr_at(step, 104) for step in range(104)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and max(rates) == 2.0
    assert rates[54] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert config.lr_at(104, 104) == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_weight_decay_spares_vectors():
    optimizer = OptimizerConfig(weight_decay=0.3).build([nn.Linear(2, 2)])
    decays = {
        p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert decays == {2: 0.3, 1: 0.0}


@pytest.mark.parametrize("draws", [0, 1, 2])
def test_all_generators_come_back(draws):
    import random

    import numpy as np

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(), torch.randn(3).tolist()

    seed_all(3)
    for _ in range(draws):
        draw()
    state = get_rng_state(torch.device("cpu"))
    first = draw()
    set_rng_state(state, torch.device("cpu"))
    assert draw() == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every": 0}, r"log_every must be an integer in \[1, 1000000000\], got 0"),
        ({"keep_checkpoints": 0}, r"keep_checkpoints must be an integer in \[1, .*\], got 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be a number in \(0, 1\), or null, got 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)
