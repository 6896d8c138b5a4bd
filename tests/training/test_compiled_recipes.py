"""`engine.compile` trains each recipe as without it; StyleGAN's refuses it, in its own tests."""

import json

import pytest
import torch

from fastgen.training.options import parse_train_options
from fastgen.training.runs import start_run

LOSSES = ("loss", "nats_per_code", "cross_entropy", "nll")
RECIPES = {
    "vqvae": [
        "--autoencoder.steps=6",
        "--prior.steps=6",
        "--model.channels=8",
        "--prior_model.width=16",
        "--prior_model.layers=1",
        "--prior_model.dropout=0",
        "--model.revive_after=null",
    ],
    "vqvae residual": [
        "--autoencoder.steps=6",
        "--prior.steps=0",
        "--model.channels=8",
        "--model.quantizers=2",
        "--model.likelihood=discretized-logistic",
    ],
    "vae": ["--vae.steps=6", "--model.width=16"],
    "classifier": ["--classifier.steps=6", "--model.channels=4", "--model.dropout=0"],
    "realnvp": [
        "--data=moons",
        "--flow.steps=6",
        "--flow.batch_size=64",
        "--model.layers=2",
        "--model.hidden=8",
        "--model.reversible=false",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports inductor
def test_compiled_equals_eager(tmp_path, name):
    torch.set_num_threads(1)
    recipe, *_ = name.split()
    losses = []
    for compile in (False, True):
        options = ["--engine.cpu=true", "--engine.log_every=1", f"--engine.compile={compile}"]
        config = parse_train_options(recipe, options + RECIPES[name]).config
        run = start_run(recipe, config, tmp_path / str(compile))
        records = map(json.loads, run.metrics_path.read_text().splitlines())
        train = [r for r in records if r["split"] == "train"]
        losses.append([r[name] for r in train for name in LOSSES if name in r])
    assert len(losses[0]) == len(train) >= 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
