"""A checkpoint whose manifest is right and whose content is not: an error of one line, or nothing
that matters; never a traceback, a crash or a NaN."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen.training import checkpoint as ckpt
from fastgen.training.config import EngineConfig, OptimizerConfig, StageConfig
from fastgen.training.engine import Engine
from fastgen.training.errors import CheckpointError, RunError
from fastgen.training.options import config_to_dict
from fastgen.training.origin import Origin
from fastgen.training.processes import make_accelerator
from fastgen.training.rng import seed_all
from fastgen.training.run_folder import RunFolder
from fastgen.training.tasks import RECIPES
from fastgen.training.tasks.vae import ModelConfig, VAEConfig
from fastgen.training.tasks.vae import VAEStage as Stage

SECTIONS = ["averages", "model", "optimizers", "origin", "progress", "rng"]


def build(path: Path, steps: int) -> Engine:
    """A VAE of a few weights, between two lines of its log when it is saved."""
    config = VAEConfig(
        model=ModelConfig(latent_dim=2, width=4, layers=1),
        vae=StageConfig(steps=steps, batch_size=16, optimizer=OptimizerConfig(final_lr=1.0)),
        engine=EngineConfig(
            cpu=True, ema_decay=0.9, log_every=2, valid_every=100, sample_every=100,
            checkpoint_every=3,
        ),
    )  # fmt: skip
    plain = config_to_dict("vae", config)
    run = RunFolder.open(path) if path.exists() else RunFolder.create(path, plain)
    dataset = RECIPES["vae"].load("digits", None)
    seed_all(0)
    task = RECIPES["vae"].task(config, dataset)
    accelerator = make_accelerator(config.engine)
    return Engine(task, config.engine, run, accelerator, Origin.of(plain, dataset))


@pytest.fixture(autouse=True)
def _nothing_to_look_at(monkeypatch):
    monkeypatch.setattr(Stage, "validate", lambda self, modules: {})
    monkeypatch.setattr(Stage, "draw", lambda self, modules: {})


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A run with a checkpoint of step 3 of 6."""
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr(Stage, "validate", lambda self, modules: {})
    patch.setattr(Stage, "draw", lambda self, modules: {})
    engine = build(tmp_path_factory.mktemp("hostile") / "run", 6)
    engine.train()
    patch.undo()
    shutil.rmtree(engine.run.checkpoints / "step-00000006")
    return engine.run.path


class Hostile:
    """The checkpoint of a run of its own, to be changed and resumed again and again."""

    def __init__(self, run: Path):
        self.run = run
        self.path = run / "checkpoints" / "step-00000003"
        self.files = {path.name: path.read_bytes() for path in self.path.iterdir()}

    def restore(self) -> None:
        shutil.rmtree(self.path.parent)
        self.path.mkdir(parents=True)
        for name, content in self.files.items():
            (self.path / name).write_bytes(content)

    def tree(self, section: str):
        return json.loads(self.files[f"{section}.json"])

    def write_tree(self, section: str, tree) -> None:
        (self.path / f"{section}.json").write_text(json.dumps(tree))
        self.sign()

    def tensors(self, section: str) -> dict[str, torch.Tensor]:
        return load_file(self.path / f"{section}.safetensors")

    def write_tensors(self, section: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, self.path / f"{section}.safetensors")
        self.sign()

    def sign(self) -> None:
        manifest = json.loads(self.files["manifest.json"])
        names = [path.name for path in self.path.iterdir() if path.name != "manifest.json"]
        manifest["files"] = {name: ckpt._describe(self.path / name) for name in names}
        (self.path / "manifest.json").write_text(json.dumps(manifest))

    def resume(self) -> str | None:
        """The error's line; None if it trained to the end, with finite weights."""
        engine = build(self.run, 6)
        try:
            engine.train(resume=True)
        except RunError as error:
            assert "\n" not in str(error)
            return f"{type(error).__name__}: {error}"
        weights = [p for m in engine.task.modules.values() for p in m.parameters()]
        assert all(p.isfinite().all() for p in weights)
        return None


@pytest.fixture
def hostile(sound, tmp_path) -> Hostile:
    return Hostile(Path(shutil.copytree(sound, tmp_path / "run")))


def places(tree, path=()):
    """Paths to every node of an encoded tree but its root, as indices into JSON."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, child in children:
        yield (*path, key)
        if isinstance(child, (dict, list)):
            yield from places(child, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


VALUES = [
    None, True, -1, 0, 7, 10**30, 1.5, -0.5, math.nan, math.inf, "x", "", [], [1], {}, {"dict": []},
    {"dict": [["x", 1]]}, {"tuple": []}, {"tensor": "nowhere"}, {"dict": 3}, {"dict": [[{}, 1]]},
]  # fmt: skip
GONE = object()


def replaced(tree, path, value):
    parent = at(tree, path[:-1])
    if value is GONE:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value


def tensor_mutations(tensor: torch.Tensor):
    yield "longer", torch.cat([tensor.flatten()] * 2 + [torch.zeros(3, dtype=tensor.dtype)])
    yield "empty", tensor.flatten()[:0].clone()
    yield "scalar", tensor.flatten()[:1].sum()
    yield "more axes", tensor.clone()[None]
    yield "another dtype", tensor.to(torch.int16 if tensor.is_floating_point() else torch.float64)
    if tensor.is_floating_point():
        yield "nan", torch.full_like(tensor, math.nan)
        yield "inf", torch.full_like(tensor, math.inf)
    else:
        yield "huge", torch.full_like(tensor, torch.iinfo(tensor.dtype).max)
        yield "lowest", torch.full_like(tensor, torch.iinfo(tensor.dtype).min)
        yield "zeros", torch.zeros_like(tensor)


def attack(hostile: Hostile, section: str, every: int) -> list[str]:
    """What of each `every`-th mutation ended in another way than it may."""
    bad, count = [], 0

    def attempt(name: str) -> None:
        try:
            hostile.resume()
        except Exception as error:
            bad.append(f"{name}: {type(error).__name__}: {error}")

    for path in places(hostile.tree(section)):
        for value in [*VALUES, GONE]:
            count += 1
            if count % every:
                continue
            hostile.restore()
            tree = hostile.tree(section)
            replaced(tree, path, value)
            hostile.write_tree(section, tree)
            attempt(f"{section}.json {path} = {'gone' if value is GONE else value!r}")
    hostile.restore()
    for name, tensor in hostile.tensors(section).items():
        for what, changed in [*tensor_mutations(tensor), ("gone", None)]:
            count += 1
            if count % max(every // 8, 1):
                continue
            hostile.restore()
            tensors = hostile.tensors(section)
            del tensors[name]
            more = {} if changed is None else {name: changed}
            hostile.write_tensors(section, tensors | more)
            attempt(f"{section}.safetensors {name} {what}")
    return bad


@pytest.mark.parametrize("section", SECTIONS)
def test_a_few(hostile, section):
    bad = attack(hostile, section, every=97)
    assert not bad, "\n".join(bad)


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_more(hostile, section):
    bad = attack(hostile, section, every=8)
    assert not bad, "\n".join(bad)


def test_unchanged(hostile):
    assert hostile.resume() is None


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_missing_section(hostile, section, suffix):
    (hostile.path / f"{section}.{suffix}").unlink()
    hostile.sign()
    line = hostile.resume()
    if (section, suffix) == ("origin", "json"):
        assert line is None
    else:
        assert line.startswith("CheckpointError: ") and section in line


def change(section, name, make):
    return lambda h: h.write_tensors(section, (t := h.tensors(section)) | {name: make(t[name])})


def number(name, value):
    def make(hostile):
        tree = hostile.tree("progress")
        pair = next(pair for pair in tree["dict"] if pair[0] == name)
        pair[1] = value
        hostile.write_tree("progress", tree)

    return make


WRONG = {
    # fused AdamW reads beyond the end of it
    "moments of another shape": (
        change("optimizers", "vae.state.0.exp_avg_sq", lambda t: t[:1].clone()),
        r"optimizers.vae.state.0.exp_avg_sq must be float32 \(4, 64\), got float32 \(1, 64\)",
    ),
    "a step that is NaN": (
        change("optimizers", "vae.state.0.step", lambda t: t * math.nan),
        "optimizers.vae.state.0.step of the checkpoint is not finite",
    ),
    "moments that are NaN": (
        change("optimizers", "vae.state.1.exp_avg", lambda t: t * math.nan),
        "optimizers.vae.state.1.exp_avg of the checkpoint is not finite",
    ),
    "averages of another dtype": (
        change("averages", "vae.n_averaged", lambda t: t.float()),
        r"averages.vae.n_averaged must be int64 \(\), got float32 \(\)",
    ),
    "averages that are NaN": (
        change("averages", "vae.module.decoder.0.weight", lambda t: t * math.nan),
        "averages.vae.module.decoder.0.weight of the checkpoint holds NaN or infinity",
    ),
    "weights that are NaN": (
        change("model", "vae.decoder.0.weight", lambda t: t * math.nan),
        "model.vae.decoder.0.weight of the checkpoint holds NaN or infinity",
    ),
    "NumPy's position": (
        change("rng", "numpy", lambda t: torch.where(torch.arange(626) == 624, 2**40, t)),
        "section 'rng' of the checkpoint is damaged: position 1099511627776 of NumPy's generator",
    ),
    "states of other sizes": (
        change("rng", "torch", lambda t: t[:, :-1].clone()),
        r"rng.torch must be uint8 \(1, 5056\), got uint8 \(1, 5055\)",
    ),
    "sums of another shape": (
        change("progress", "sums.kl", lambda t: t.expand(2).clone()),
        r"progress.sums.kl must be float32 \(\), got float32 \(2,\)",
    ),
    "steps that are no number": (number("steps_done", math.nan), "steps_done must be int, got nan"),
    "steps that were not done": (number("steps_done", 4), "before 'vae' have 0 steps now, .* -1"),
    "a negative length": (number("metrics_bytes", -1), "metrics_bytes must not be negative"),
    "a stage that is not there": (number("stage", "gan"), "progress.stage is 'gan'; known: vae"),
    "a loader elsewhere": (
        number("loader", {"dict": [["batches", 1]]}),
        r"progress.loader is \{'batches': 1\}, which is not where 3 steps end",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(hostile, what):
    make, message = WRONG[what]
    hostile.restore()
    make(hostile)
    with pytest.raises((CheckpointError, RunError), match=message):
        build(hostile.run, 6).train(resume=True)
