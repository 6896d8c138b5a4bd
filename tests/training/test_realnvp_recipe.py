"""The recipe learns: toy densities and digits are fitted, and the fused ops train as plain PyTorch
does."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import fastgen
from fastgen.cli import main
from fastgen.data import TOYS, load_images, load_toy
from fastgen.training.options import parse_train_options
from fastgen.training.runs import evaluate_run, load_run, sample_run, start_run

SHORT = ["--engine.cpu=true", "--flow.optimizer.warmup_steps=20"]
SMALL = [
    *SHORT,
    "--engine.ema_decay=0.95",
    "--model.layers=4",
    "--model.hidden=32",
    "--model.num_bins=8",
]
DIGITS = [*SHORT, "--data=digits", "--model.hidden=16", "--model.blocks=1"]


def train(folder, *options):
    torch.set_num_threads(1)
    return start_run("realnvp", parse_train_options("realnvp", list(options)).config, folder)


def lines(run, split):
    records = map(json.loads, run.metrics_path.read_text().splitlines())
    return [r for r in records if r["split"] == split]


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    steps = ["--flow.steps=300", "--flow.batch_size=256", "--engine.valid_every=300"]
    return train(tmp_path_factory.mktemp("moons") / "run", "--data=moons", *SMALL, *steps)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    steps = ["--flow.steps=80", "--flow.batch_size=64", "--engine.valid_every=40"]
    return train(tmp_path_factory.mktemp("digits") / "run", *DIGITS, *steps)


def test_moons_are_fitted(moons):
    """The flow starts as the Gaussian with the data's variances, whose entropy is known."""
    first, last = lines(moons, "valid")[0], lines(moons, "valid")[-1]
    scales = load_toy("moons").valid.points.std(0)
    gaussian = math.log(2 * math.pi * math.e) + scales.log().sum().item()
    assert first["excess"] == pytest.approx(gaussian - first["entropy"], abs=0.02)
    assert last["excess"] < 0.15
    assert last["nll"] == pytest.approx(last["entropy"] + last["excess"], abs=0.05)
    measures = evaluate_run(moons.path)
    assert set(measures) == {"valid", "test"}
    test = measures["test"]
    assert 0 < test["excess"] < 0.15 and test["entropy"] == TOYS["moons"].entropy
    assert 0 < test["excess_error"] < test["nll_error"] < 0.02


def test_density_picture(moons):
    """Truth, model and samples beside each other agree but for what is not yet fitted."""
    task = load_run(moons.path)
    with torch.no_grad():
        panels = task.stages[0].draw(task.modules)["density"]
    assert panels.shape == (3, 1, 200, 200)
    truth, model, samples = panels[:, 0]
    assert truth.max() == 1
    for panel in (model, samples):
        assert panel.sum().item() == pytest.approx(truth.sum().item(), rel=0.02)
    blurred = torch.nn.functional.avg_pool2d(panels, 10)[:, 0]
    assert (blurred[1] - blurred[2]).abs().mean() < 0.03 * blurred[1].max()
    top, bottom = truth[:100].sum(1), truth[100:].sum(1)
    # the moon that is open to below reaches up to y = 1.8, the other down to y = -1.2
    assert top.nonzero().min() < bottom.flip(0).nonzero().min()
    name = next(p for p in moons.samples.iterdir() if "density" in p.name)
    with Image.open(name) as picture:
        assert picture.size[0] > 400


def test_samples_lie_where_the_data_does(moons):
    task = load_run(moons.path)
    drawn = task.model.sample(4000, generator=torch.Generator().manual_seed(0)).detach()
    nll = -TOYS["moons"].log_prob(drawn)
    assert nll.median().item() < TOYS["moons"].entropy + 0.3


def test_sample_and_eval_of_points(moons, tmp_path, capsys):
    out = tmp_path / "points.png"
    assert main(["sample", str(moons.path), "--num", "5000", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        pixels = torch.from_numpy(np.array(picture))
    assert pixels.max() == 255 and 100 < (pixels > 0).sum() < 20_000
    assert main(["eval", str(moons.path)]) == 0
    assert "excess_error" in capsys.readouterr().out
    assert main(["sample", str(moons.path), "--label", "1", "--out", str(out)]) == 2
    assert "this flow has no classes" in capsys.readouterr().err


def test_digits_are_learned(digits):
    first, last = lines(digits, "valid")[0], lines(digits, "valid")[-1]
    assert last["bits_per_dim"] < first["bits_per_dim"] - 0.7
    nats = last["bits_per_dim"] * 64 * math.log(2)
    assert last["nll"] == pytest.approx(nats, rel=1e-4)
    assert last["bits_per_dim"] < math.log2(17)
    samples = sample_run(digits.path, 4)
    assert samples.shape == (4, 1, 8, 8)
    torch.testing.assert_close(samples * 16, (samples * 16).round())
    train = lines(digits, "train")
    assert set(train[-1]) >= {"nll", "bits_per_dim", "steps_per_second"}


def test_evaluation_leaves_the_generators_alone(digits):
    task = load_run(digits.path)
    before = torch.get_rng_state()
    first = task.evaluate()
    task.stages[0].draw(task.modules)
    assert torch.equal(torch.get_rng_state(), before)
    assert task.evaluate() == first


@pytest.mark.parametrize("coupling", ("affine", "spline"))
@pytest.mark.parametrize("data", ("moons", "digits"))
def test_fused_ops_train_as_the_references_do(tmp_path, data, coupling):
    """30 steps from one seed: the same batches and the same noise.

    They agree to 1e-6 here; at a learning rate of 1e-3 what rounds differently can grow to 5e-4.
    """
    options = [*(DIGITS if data == "digits" else SMALL), f"--data={data}"]
    options += [f"--model.coupling={coupling}", "--flow.steps=30", "--flow.batch_size=64"]
    options += ["--engine.log_every=1", "--engine.valid_every=30", "--flow.optimizer.lr=3e-4"]
    losses = {}
    for backend in ("cpu", "reference"):
        with fastgen.use_backend({"affine_coupling": backend, "rq_spline": backend}):
            run = train(tmp_path / backend, *options)
        losses[backend] = [line["nll"] for line in lines(run, "train")]
    assert len(losses["cpu"]) == 30
    assert sum(losses["cpu"][-10:]) < sum(losses["cpu"][:10])
    assert losses["cpu"] == pytest.approx(losses["reference"], rel=1e-4)


@pytest.mark.parametrize("data", ("rings", "digits"))
def test_reversible_mode_trains_the_same(tmp_path, data):
    options = [*(DIGITS if data == "digits" else SMALL), f"--data={data}"]
    options += ["--flow.steps=10", "--flow.batch_size=64", "--engine.log_every=1"]
    losses = [
        [
            line["nll"]
            for line in lines(
                train(tmp_path / mode, *options, f"--model.reversible={mode}"), "train"
            )
        ]
        for mode in ("true", "false")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (["--data=spirals"], "data set 'spirals' is not known"),
        (["--data=digits", "--model.levels=256"], "number of grey values in the data, got 256"),
        (["--data=digits", "--model.scales=4"], "scales must halve the sides of a 8x8 image"),
        (["--model.layers=0"], "model.layers must be an integer in [1, 256], got 0"),
        (["--model.coupling=cubic"], "model.coupling"),
        (["--flow.batch_size=600000"], r"flow.batch_size must be in [1, 500000]"),
    ),
)
def test_bad_requests(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "realnvp", *options]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_presets_know_the_grey_values():
    for data in ("digits", "mnist", "binarized-mnist", "cifar10"):
        config = parse_train_options("realnvp", [f"--data={data}"]).config
        assert config.model.coupling == "affine" and config.model.batch_norm
        assert config.engine.ema_decay is None
        assert config.model.levels == {"digits": 17, "binarized-mnist": 2}.get(data, 256)
    steps = load_images("digits").train.images * 16
    assert torch.equal(steps, steps.round())
