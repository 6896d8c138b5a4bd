"""The recipe learns; fused ops and references train alike; bad options stop before training."""

import json
import math
from dataclasses import replace

import pytest
import torch

import fastgen
from fastgen.cli import main
from fastgen.data import ImageDataset, ImageSplit, load_images
from fastgen.models import VAE
from fastgen.training.draws import Draws
from fastgen.training.options import parse_train_options
from fastgen.training.runs import evaluate_run, load_run, sample_run, start_run
from fastgen.training.tasks.vae import VAEConfig, VAETask

SHORT = ["--vae.optimizer.warmup_steps=20", "--engine.cpu=true", "--evaluation.samples=100"]


def options(*extra):
    return parse_train_options("vae", [*SHORT, *extra]).config


def lines(run, split):
    records = map(json.loads, run.metrics_path.read_text().splitlines())
    return [r for r in records if r["split"] == split]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    config = options("--vae.steps=1500")
    return start_run("vae", config, tmp_path_factory.mktemp("vae") / "run")


def test_the_bound_falls(run):
    valid = lines(run, "valid")
    assert valid[0]["nll_bound"] > 42  # 64 log 2 = 44.4 for pixels at random
    assert valid[-1]["nll_bound"] < 26
    assert valid[-1]["kl"] > 2 and valid[-1]["active_latents"] >= 4
    assert valid[-1]["nll_bound"] == pytest.approx(
        valid[-1]["reconstruction"] + valid[-1]["kl"], rel=1e-5
    )


def test_evaluation(run):
    measures = evaluate_run(run.path)
    assert measures.keys() == {"test"}
    test = measures["test"]
    assert test["nll"] < test["nll_bound"] - 0.2
    assert 0 < test["nll_standard_error"] < 2 and test["samples"] == 100
    assert test["bits_per_dim"] == pytest.approx(test["nll"] / (64 * math.log(2)))
    assert json.loads((run.path / "eval.json").read_text()) == measures
    assert evaluate_run(run.path) == measures


def test_evaluation_of_some_images_takes_them_from_all_over(run, monkeypatch):
    from fastgen.training.tasks import vae

    task = load_run(run.path, overrides=["--evaluation.images=7"])
    images = task.dataset.test.images
    seen = []
    monkeypatch.setattr(vae, "log_probs", lambda model, x, samples: seen.append(x) or torch.ones(7))
    task.evaluate()
    rows = [0, 25, 51, 76, 102, 127, 153]
    assert len(images) == 179 and torch.equal(seen[0], images[rows])


def test_samples_are_closer_to_digits_than_noise(run):
    task = load_run(run.path)
    digits = task.dataset.train.images.flatten(1)
    samples = sample_run(run.path, 100)
    assert samples.shape == (100, 1, 8, 8)

    def distance(images):
        return torch.cdist(images.flatten(1), digits).min(1).values.mean()

    shuffled = samples.flatten(1)[:, torch.randperm(64)]
    assert distance(samples) < 0.6 * distance(shuffled)


def test_pictures(run):
    step = lines(run, "valid")[-1]["step"]
    for name in ("reconstructions", "samples", "interpolations", "traversals"):
        path = run.samples / f"step-{step:08d}-{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "objective",
    [
        [],
        ["--model.kl=mc"],
        ["--objective.samples=5"],
        ["--objective.beta=4", "--objective.beta_warmup_steps=20", "--objective.free_bits=0.05"],
        ["--model.network=conv", "--model.likelihood=gaussian"],
        ["--model.likelihood=discretized-logistic", "--model.levels=17", "--model.scale=pixel"],
    ],
)
def test_thirty_steps_are_the_same_with_the_references(tmp_path, objective):
    """The same seed gives the same keys: noise, data and weights are the same."""
    torch.set_num_threads(1)
    config = options("--vae.steps=30", "--engine.log_every=1", *objective)
    losses = []
    for backend in (None, "reference"):
        with fastgen.use_backend(backend):
            run = start_run("vae", config, tmp_path / str(backend))
        losses.append([record["loss"] for record in lines(run, "train")])
    assert len(losses[0]) == 30 and losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_beta_warms_up(tmp_path):
    config = options("--vae.steps=8", "--engine.log_every=1", "--objective.beta=2.0")
    config = replace(config, objective=replace(config.objective, beta_warmup_steps=4))
    records = lines(start_run("vae", config, tmp_path / "run"), "train")
    weights = [(r["loss"] - r["reconstruction"]) / r["kl"] for r in records]
    assert weights == pytest.approx([0, 0.5, 1, 1.5, 2, 2, 2, 2], abs=1e-3)


def test_importance_weighting_starts_after_the_elbo_steps(tmp_path, monkeypatch):
    seen = []
    forward = VAE.forward

    def counted(self, images, *, samples=1, **others):
        if self.training:
            seen.append(samples)
        return forward(self, images, samples=samples, **others)

    monkeypatch.setattr(VAE, "forward", counted)
    config = options("--vae.steps=5", "--objective.samples=4", "--objective.elbo_steps=3")
    config = replace(config, objective=replace(config.objective, beta_warmup_steps=3))
    start_run("vae", config, tmp_path / "run")
    assert seen == [1, 1, 1, 4, 4]


def test_the_learning_rate_has_its_course_before_and_with_the_importance_weights():
    config = options("--vae.steps=300", "--objective.samples=4", "--objective.elbo_steps=200")
    stage = VAETask(config, load_images("digits")).stages[0]
    rates = [stage.lr(step) for step in range(300)]
    expected = config.vae.optimizer
    assert rates[:200] == [expected.lr_at(step, 200) for step in range(200)]
    assert rates[200:] == [expected.lr_at(step, 100) for step in range(100)]
    assert max(rates[:200]) == max(rates[200:]) == expected.lr


def test_grey_pixels_are_drawn_anew_in_training_and_once_for_the_test():
    grey = ImageSplit(torch.full((40, 1, 4, 4), 0.5))
    dataset = ImageDataset("grey", grey, grey, grey)
    first, second = (VAETask(VAEConfig(), dataset) for _ in range(2))
    assert torch.equal(first.dataset.test.images, second.dataset.test.images)
    assert set(first.dataset.test.images.unique().tolist()) == {0.0, 1.0}
    seen = []

    def net(images, **_):
        seen.append(images)
        return [torch.zeros(len(images), requires_grad=True)] * 3

    stage = first.stages[0]
    for _ in range(2):
        stage.loss("vae", {"vae": net}, {"images": grey.images}, Draws(40))
    assert not torch.equal(*seen) and set(seen[0].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective.beta=-1"], "objective.beta must be a number in [0, 1000000], got -1"),
        (["--objective.free_bits=-0.1"], "objective.free_bits must be a number in [0, "),
        (["--objective.elbo_steps=-1"], "objective.elbo_steps must be an integer in [0, "),
        (["--objective.samples=0"], "objective.samples must be an integer in [1, "),
        (["--objective.samples=5", "--objective.beta=2"], "importance-weighted bound of 5"),
        (["--objective.samples=5", "--objective.beta_warmup_steps=9"], "end the warm-up within"),
        (["--model.likelihood=poisson"], "model.likelihood"),
        (["--model.likelihood=discretized-logistic"], "must be multiples of 1/255"),
        (["--objective.binarize=no"], "must be 0 or 1 for the Bernoulli likelihood"),
        (["--model.network=conv", "--model.layers=4"], "layers must halve"),
        (["--model.latent_dim=0"], "model.latent_dim must be an integer in [1, "),
        (["--evaluation.samples=0"], "evaluation.samples must be an integer in [1, "),
    ],
)
def test_bad_options_stop_before_training(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "vae", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nan_images_stop_before_training():
    images = torch.zeros(30, 1, 4, 4)
    images[3, 0, 1, 2] = float("nan")
    good = ImageSplit(torch.zeros(30, 1, 4, 4))
    with pytest.raises(ValueError, match="train images of x must be finite, got NaN"):
        VAETask(VAEConfig(), ImageDataset("x", ImageSplit(images), good, good))


def test_a_vae_has_no_labels(run):
    from fastgen.training.errors import RunError

    with pytest.raises(RunError, match="a VAE has no labels to draw"):
        sample_run(run.path, 2, label=1)
    with pytest.raises(RunError, match="temperature must be positive, got 0"):
        sample_run(run.path, 2, temperature=0)
