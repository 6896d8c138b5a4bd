"""The recipe learns: digits come back, the codebook is used, the prior beats uniform codes; its
likelihoods are those of the model; fused ops and references train alike; bad options stop before
training."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import fastgen
from fastgen.cli import main
from fastgen.data import ImageSplit, load_images
from fastgen.losses import DiscretizedLogistic
from fastgen.models import VQVAE, CodePrior
from fastgen.training.options import parse_train_options
from fastgen.training.runs import evaluate_run, load_run, sample_run, start_run
from fastgen.training.tasks.vqvae_measures import fit_pixels, likelihood_measures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    options = ["--autoencoder.steps=250", "--prior.steps=350", "--engine.cpu=true"]
    options += ["--autoencoder.optimizer.warmup_steps=20", "--prior.optimizer.warmup_steps=20"]
    options += ["--model.channels=32", "--autoencoder.batch_size=64", "--prior.batch_size=64"]
    torch.set_num_threads(1)
    config = parse_train_options("vqvae", options).config
    return start_run("vqvae", config, tmp_path_factory.mktemp("vqvae") / "run")


def lines(run, stage, split):
    records = map(json.loads, run.metrics_path.read_text().splitlines())
    return [r for r in records if (r["stage"], r["split"]) == (stage, split)]


def test_validation_error_falls(run):
    valid = lines(run, "autoencoder", "valid")
    assert valid[0]["relative_mse"] > 0.5
    assert valid[-1]["relative_mse"] < 0.12
    train = lines(run, "autoencoder", "train")
    assert train[-1]["loss"] < 0.3 * train[0]["loss"]


def test_more_than_half_of_the_codebook_is_used(run):
    last = lines(run, "autoencoder", "valid")[-1]
    assert last["usage"] > 0.5 and last["perplexity"] > 20


def test_prior_beats_uniform_codes(run):
    valid = lines(run, "prior", "valid")
    assert valid[0]["nats_per_code"] == pytest.approx(math.log(64), abs=1e-4)
    assert valid[-1]["nats_per_code"] < 0.8 * math.log(64)


def test_samples_are_closer_to_digits_than_uniform_codes_are(run):
    task = load_run(run.path)
    digits = load_images("digits").train.images.flatten(1)

    def distance(images):
        return torch.cdist(images.flatten(1), digits).min(1).values.mean()

    samples = sample_run(run.path, 200)
    assert samples.shape == (200, 1, 8, 8)
    uniform = torch.randint(64, (200, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert distance(samples) < 0.8 * distance(task.autoencoder.decode(uniform))


def test_a_label_draws_its_class(run):
    """A nearest-neighbour classifier over the real digits recognises samples; chance is 20."""
    train = load_images("digits").train
    right = 0
    for label in range(10):
        samples = sample_run(run.path, 20, seed=label, label=label)
        nearest = torch.cdist(samples.flatten(1), train.images.flatten(1)).argmin(1)
        right += (train.labels[nearest] == label).sum().item()
    assert right > 60


def test_the_prior_does_not_move_the_autoencoder(run):
    from fastgen.training.checkpoint import list_checkpoints, load_checkpoint

    first, last = (load_checkpoint(p)["model"] for p in list_checkpoints(run.checkpoints)[-2:])
    assert first["autoencoder"].keys() == last["autoencoder"].keys()
    for name, value in first["autoencoder"].items():
        assert torch.equal(value, last["autoencoder"][name])
    assert any(not torch.equal(v, last["prior"][k]) for k, v in first["prior"].items())


def test_the_likelihood_is_reported(run):
    """In bits a dimension, of prior and decoder together: below the 17 levels' log2, and made of
    the codes, whose nats are those of the prior and of the label, and of the pixels."""
    measures = evaluate_run(run.path)["test"]
    assert measures["bits_per_dim"] == pytest.approx(
        measures["code_bits_per_dim"] + measures["pixel_bits_per_dim"]
    )
    nats = 16 * measures["nats_per_code"] + math.log(10)
    assert measures["code_bits_per_dim"] == pytest.approx(nats / (64 * math.log(2)), rel=1e-5)
    assert measures["nll_bound"] == pytest.approx(64 * math.log(2) * measures["bits_per_dim"])
    assert measures["bits_per_dim"] < 0.9 * math.log2(17)


@pytest.mark.parametrize("quantizers", [1, 2])
@pytest.mark.parametrize("num_classes", [None, 2])
@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized-logistic"])
def test_the_bound_is_one(quantizers, num_classes, likelihood):
    """Against the sum over all codes and labels, image by image."""
    torch.manual_seed(0)
    model = VQVAE(
        (1, 2, 4),
        num_codes=3,
        code_dim=2,
        channels=4,
        downsamplings=1,
        quantizers=quantizers,
        likelihood=likelihood,
        levels=2,
    ).eval()
    prior = CodePrior(3, model.grid_shape, num_classes=num_classes, width=8, layers=1, heads=2)
    torch.nn.init.normal_(prior.eval().head.weight)
    images, labels = torch.randint(2, (20, 1, 2, 4)).float(), torch.arange(20) % 2
    measures = likelihood_measures(model, prior, ImageSplit(images, labels), None)
    codes = torch.tensor(list(itertools.product(range(3), repeat=2 * quantizers)))
    codes = codes.view(-1, *model.grid_shape)
    with torch.no_grad():
        given = [None] if num_classes is None else [labels[:1] * 0, labels[:1] * 0 + 1]
        log_prior = torch.stack(
            [prior.log_prob(codes, None if y is None else y.expand(len(codes))) for y in given]
        ).logsumexp(0) - math.log(len(given))
        torch.testing.assert_close(log_prior.exp().sum(), torch.tensor(1.0))
        exact = torch.stack(
            [
                (log_prior + model.log_prob(image.expand(len(codes), 1, 2, 4), codes)).logsumexp(0)
                for image in images
            ]
        )
        found = model.encode(images)
        own = model.log_prob(images, found)
        own += prior.log_prob(found, None if num_classes is None else labels) - math.log(len(given))
    assert measures["nll_bound"] == pytest.approx(-own.mean().item(), rel=1e-5)
    assert (own < exact).all()
    assert measures["bits_per_dim"] == pytest.approx(measures["nll_bound"] / (8 * math.log(2)))


def test_a_decoder_of_means_gets_the_likeliest_scales():
    torch.manual_seed(0)
    options = {"num_codes": 4, "code_dim": 2, "channels": 4, "downsamplings": 1}
    model = VQVAE((3, 4, 4), **options).eval()
    means = model.decode(torch.randint(4, (300, 2, 2))).detach()
    noise = torch.randn_like(means) * torch.tensor([0.02, 0.05, 0.1])[:, None, None]
    images = ((means + noise).clamp(0, 1) * 255).round() / 255
    pixels = fit_pixels(model, images, 256)
    with torch.no_grad():
        decoded = model.decode(model.encode(images)) - 0.5

        def nll(log_scale):
            other = DiscretizedLogistic(3)
            other.log_scale.copy_(log_scale)
            return -other.log_prob(decoded, images).mean().item()

        best = nll(pixels.log_scale)
        for channel, change in itertools.product(range(3), (-0.1, 0.1)):
            moved = pixels.log_scale.clone()
            moved[channel] += change
            assert nll(moved) > best
    assert fit_pixels(model, images * 0.999, 256) is None


RECIPES = {
    "ema": [],
    "gradient": ["--model.codebook=gradient"],
    "two quantizers": ["--model.quantizers=2"],
    "likelihood": ["--model.likelihood=discretized-logistic"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_thirty_steps_are_the_same_with_the_references(tmp_path, recipe):
    torch.set_num_threads(1)
    options = ["--autoencoder.steps=30", "--prior.steps=0", "--engine.cpu=true"]
    options += ["--engine.log_every=1", "--model.channels=16", *RECIPES[recipe]]
    config = parse_train_options("vqvae", options).config
    losses = []
    for backend in (None, "reference"):
        with fastgen.use_backend(backend):
            run = start_run("vqvae", config, tmp_path / str(backend))
        losses.append([record["loss"] for record in lines(run, "autoencoder", "train")])
    assert len(losses[0]) == 30 and losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.fixture
def colours(tmp_path):
    """Colour images of 32x32 in two classes: bright above or below, with some noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    bright = (np.arange(32) < 16)[None, :] == labels[:, None].astype(bool)
    images = 60 + 120 * bright[:, :, None, None] + rng.integers(0, 20, (80, 32, 32, 3))
    np.savez(tmp_path / "colours.npz", images=images.astype(np.uint8), labels=labels)
    return tmp_path / "colours.npz"


@pytest.mark.parametrize("likelihood", ["mse", "discretized-logistic"])
def test_colour_images_with_several_quantizers(tmp_path, colours, likelihood):
    """Train, draw and measure: stages of codes in the prior too, and labels that condition it."""
    torch.set_num_threads(1)
    options = [f"--data={colours}", "--model.downsamplings=3", "--model.quantizers=2"]
    options += [f"--model.likelihood={likelihood}", "--model.channels=16", "--model.num_codes=8"]
    for stage in ("autoencoder", "prior"):
        options += [f"--{stage}.{o}" for o in ("steps=150", "batch_size=16", "optimizer.lr=5e-3")]
    options += ["--model.decay=0.9", "--model.revive_after=10", "--prior_model.width=16"]
    options += ["--engine.cpu=true", "--engine.log_every=10"]
    config = parse_train_options("vqvae", options).config
    run = start_run("vqvae", config, tmp_path / "run")
    train, valid = (lines(run, "autoencoder", split) for split in ("train", "valid"))
    assert train[-1]["loss"] < train[0]["loss"]
    assert {"usage", "perplexity", "usage_1", "perplexity_2"} <= valid[-1].keys() & train[0].keys()
    assert valid[-1]["perplexity"] == pytest.approx(
        (valid[-1]["perplexity_1"] + valid[-1]["perplexity_2"]) / 2
    )
    codes = lines(run, "prior", "valid")
    assert codes[-1]["nats_per_code"] < 0.9 * codes[0]["nats_per_code"]
    above, below = (sample_run(run.path, 8, label=label).mean((0, 1, 3)) for label in (1, 0))
    assert above.shape == (32,)
    assert above[:14].mean() > above[18:].mean() + 0.1
    assert below[:14].mean() < below[18:].mean() - 0.1
    measures = evaluate_run(run.path)["test"]
    assert 0 < measures["code_bits_per_dim"] < 0.1 < measures["pixel_bits_per_dim"] < 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.commitment_weight=-0.25"], "commitment_weight"),
        (["--model.quantizers=0"], "model.quantizers must be an integer in [1, 256]"),
        (["--model.likelihood=poisson"], "model.likelihood"),
        (["--model.likelihood=bernoulli"], "must be 0 or 1 for the Bernoulli likelihood"),
        (
            ["--model.likelihood=discretized-logistic", "--model.levels=256"],
            "must be multiples of 1/255",
        ),
        (["--model.decay=1.5"], "decay"),
        (["--model.revive_after=0"], "revive_after"),
    ],
)
def test_bad_options_stop_before_training(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "vqvae", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
