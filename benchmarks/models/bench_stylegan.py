"""StyleGAN: a step of both networks together on grey images, with and without R1.

The losses of both networks are added, the discriminator's on fakes cut off from the generator; in
the recipe they are two phases. R1 is of second order, which torch.compile does not have.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.models.case import ModelCase, Training
from fastgen.losses import (
    nonsaturating_discriminator_loss,
    nonsaturating_generator_loss,
    r1_penalty,
)
from fastgen.models import StyleGANDiscriminator, StyleGANGenerator

LATENT_DIM = 64


def _make(side: int, batch: int, base: int, most: int, penalised: bool) -> Training:
    widths = {"channel_base": base, "channel_max": most}
    generator = StyleGANGenerator(side, latent_dim=LATENT_DIM, **widths)
    discriminator = StyleGANDiscriminator(side, **widths)
    key = torch.tensor([1, 2])

    def objective(z: Tensor, real: Tensor) -> Tensor:
        fake = generator(z, key=key)
        real = real.detach().requires_grad_(penalised)
        scores = discriminator(real)
        loss = nonsaturating_discriminator_loss(scores, discriminator(fake.detach()))
        if penalised:
            loss = loss + 10 * r1_penalty(scores, real)
        return loss + nonsaturating_generator_loss(discriminator(fake))

    images = torch.rand(batch, 1, side, side) * 2 - 1
    model = nn.ModuleList([generator, discriminator])
    return Training(model, (torch.randn(batch, LATENT_DIM), images), objective)


def _case(side: int, batch: int, base: int, most: int, penalised: bool) -> ModelCase:
    return ModelCase(
        op="stylegan",
        size=f"1x{side}x{side}, {base}/{most} maps, B={batch}{', R1' * penalised}",
        make=partial(_make, side, batch, base, most, penalised),
        compiled=not penalised,
    )


CASES = [
    _case(32, 32, 512, 64, False),
    _case(32, 32, 512, 64, True),
    _case(64, 8, 2048, 128, True),
]
