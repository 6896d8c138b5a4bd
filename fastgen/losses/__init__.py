"""What models are trained on: likelihoods of images, adversarial losses and penalties."""

from fastgen.losses.gan import (
    gradient_penalty,
    nonsaturating_discriminator_loss,
    nonsaturating_generator_loss,
    r1_penalty,
    squared_gradient_norms,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
)
from fastgen.losses.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
    check_unit_range,
    make_likelihood,
)

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "DiscretizedLogistic",
    "Gaussian",
    "Likelihood",
    "check_unit_range",
    "gradient_penalty",
    "make_likelihood",
    "nonsaturating_discriminator_loss",
    "nonsaturating_generator_loss",
    "r1_penalty",
    "squared_gradient_norms",
    "wasserstein_discriminator_loss",
    "wasserstein_generator_loss",
]
