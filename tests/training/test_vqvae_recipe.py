"""The recipe learns: digits come back, the codebook is used, the prior beats uniform codes."""

import json
import math

import pytest
import torch

from fastgen.data import load_images
from fastgen.training.options import parse_train_options
from fastgen.training.runs import load_run, sample_run, start_run


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
