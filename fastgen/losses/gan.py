"""Losses of generative adversarial networks, and penalties on the discriminator's gradient.

Scores are those of a discriminator without a last activation, (B,) or (B, 1); every loss is a mean
over the batch. The penalties differentiate through the gradient: all that is between images and
scores must have second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def nonsaturating_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log D(x) - log(1 - D(G(z))), D the sigmoid of the score (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def nonsaturating_generator_loss(fake: Tensor) -> Tensor:
    """-log D(G(z)) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake).mean()


def wasserstein_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean score of fakes less that of real images (Arjovsky et al. 2017, eq. 2, negated)."""
    return fake.mean() - real.mean()


def wasserstein_generator_loss(fake: Tensor) -> Tensor:
    """The mean score of fakes, negated."""
    return -fake.mean()


def squared_gradient_norms(scores: Tensor, images: Tensor) -> Tensor:
    """|d score_i / d image_i|^2 of each image, (B,), itself differentiable.

    Args:
        scores: (B,) or (B, 1), computed from `images`; an image's score depends on no other image,
            or its gradient is that of the sum of all scores.
        images: (B, ...), with requires_grad.

    Raises:
        ValueError: `images` do not require gradients.
    """
    if not images.requires_grad:
        raise ValueError("images must require gradients before the scores are computed")
    # scores may be of a half type: their sum need not fit into it
    (gradients,) = torch.autograd.grad(scores.float().sum(), images, create_graph=True)
    return gradients.square().flatten(1).sum(1)


def r1_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """1/2 E |dD/dx|^2 at real images, to be weighted by gamma (Mescheder et al. 2018, eq. 9).

    Args and errors as :func:`squared_gradient_norms`.
    """
    return 0.5 * squared_gradient_norms(scores, images).mean()


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor | None = None
) -> Tensor:
    """E (|dD/dx| - 1)^2 on the lines between pairs of images (Gulrajani et al. 2017, eq. 3).

    The norm is that of each image's own gradient.

    Args:
        discriminator: images -> scores (B,) or (B, 1).
        real, fake: (B, ...).
        mix: (B,), where on the line from `real` (0) to `fake` (1); uniform by default.

    Raises:
        ValueError: `real` and `fake` are of different shapes.
    """
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must be alike, got {[*real.shape]} and {[*fake.shape]}")
    if mix is None:
        mix = torch.rand(len(real), device=real.device, dtype=real.dtype)
    weight = mix.view(-1, *[1] * (real.dim() - 1))
    images = torch.lerp(real.detach(), fake.detach(), weight).requires_grad_()
    squared = squared_gradient_norms(discriminator(images), images)
    # 1e-12: the root has no gradient at 0
    return ((squared + 1e-12).sqrt() - 1).square().mean()
