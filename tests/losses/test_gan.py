import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgen.losses import (
    gradient_penalty,
    nonsaturating_discriminator_loss,
    nonsaturating_generator_loss,
    r1_penalty,
    squared_gradient_norms,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
)


def test_losses_are_those_of_the_papers():
    real, fake = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    d_real, d_fake = torch.sigmoid(real), torch.sigmoid(fake)
    torch.testing.assert_close(
        nonsaturating_discriminator_loss(real, fake),
        -(d_real.log().mean() + (1 - d_fake).log().mean()),
    )
    torch.testing.assert_close(nonsaturating_generator_loss(fake), -d_fake.log().mean())
    assert wasserstein_discriminator_loss(real, fake) == fake.mean() - real.mean()
    assert wasserstein_generator_loss(fake) == -fake.mean()
    assert nonsaturating_generator_loss(torch.tensor([-1e4])).item() == pytest.approx(1e4)


def unit_slope(images):
    """Its gradient at every image has length 1."""
    return images.flatten(1).sum(1) / math.sqrt(images[0].numel())


@pytest.mark.parametrize("count", [1, 2, 64])
def test_penalties_are_of_each_image(count):
    images = torch.randn(count, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    scores = unit_slope(images)
    torch.testing.assert_close(
        squared_gradient_norms(scores, images), torch.ones(count, dtype=torch.float64)
    )
    assert r1_penalty(3 * scores, images).item() == pytest.approx(4.5)
    other = torch.randn_like(images)
    assert gradient_penalty(unit_slope, images, other).item() == pytest.approx(0, abs=1e-10)
    tripled = gradient_penalty(lambda x: 3 * unit_slope(x)[:, None], images, other)
    assert tripled.item() == pytest.approx(4)


def test_penalty_is_on_the_line_between_the_images():
    real, fake = torch.zeros(3, 4), torch.ones(3, 4)
    seen = []

    def discriminator(images):
        seen.append(images.detach())
        return images.square().sum(1)

    mix = torch.tensor([0.0, 0.25, 1.0])
    penalty = gradient_penalty(discriminator, real, fake, mix)
    torch.testing.assert_close(seen[0], mix[:, None].expand(3, 4))
    norms = 4 * mix  # |2 x| of four equal entries
    torch.testing.assert_close(penalty, (norms - 1).square().mean(), rtol=1e-4, atol=1e-5)
    gradient_penalty(discriminator, real, fake)
    assert ((seen[1] > 0) & (seen[1] < 1)).all() and len(seen[1].unique()) == 3


@pytest.mark.parametrize("kind", ["r1", "gp"])
def test_penalties_train(kind):
    """Gradients by the weights against central differences."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Softplus(), nn.Linear(5, 1)).double()
    real, fake = torch.randn(2, 4, 2, 2, 2, dtype=torch.float64)
    mix = torch.rand(4, dtype=torch.float64)

    def penalty(weight):
        weights = {"1.weight": weight}
        if kind == "gp":
            return gradient_penalty(
                lambda x: torch.func.functional_call(net, weights, (x,)), real, fake, mix
            )
        images = real.clone().requires_grad_()
        return r1_penalty(torch.func.functional_call(net, weights, (images,)), images)

    weight = net[1].weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(penalty, (weight,))


def test_no_gradient_at_a_flat_discriminator_is_no_nan():
    real, fake = torch.randn(2, 3, 4)
    weight = torch.zeros(4, requires_grad=True)
    gradient_penalty(lambda x: F.softplus(x @ weight), real, fake).backward()
    assert weight.grad.isfinite().all()


def test_bad_arguments():
    images = torch.randn(2, 4)
    with pytest.raises(ValueError, match="images must require gradients"):
        r1_penalty(images.sum(1), images)
    with pytest.raises(ValueError, match=r"must be alike, got \[2, 4\] and \[1, 4\]"):
        gradient_penalty(unit_slope, images, images[:1])
