"""VAE: the training step on binary 28x28 images, on the ELBO and a bound of many samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.case import ModelCase, Training
from fastgen.models import VAE

SHAPE = (1, 28, 28)


def _make(batch: int, samples: int, options: dict[str, Any]) -> Training:
    model = VAE(SHAPE, latent_dim=50, **options)

    def objective(images: Tensor) -> Tensor:
        return -model(images, samples=samples).bound.mean()

    return Training(model, (torch.bernoulli(torch.full((batch, *SHAPE), 0.13)),), objective)


def _case(network: str, batch: int, samples: int, **options: Any) -> ModelCase:
    bound = "ELBO" if samples == 1 else f"IWAE-{samples}"
    return ModelCase(
        op="vae",
        size=f"1x28x28, {network}, {bound}, B={batch}",
        make=partial(_make, batch, samples, {"network": network, **options}),
    )


CASES = [
    _case("mlp", 100, 1, width=500),
    _case("conv", 100, 1, width=256),
    _case("mlp", 20, 50, width=500),
]
