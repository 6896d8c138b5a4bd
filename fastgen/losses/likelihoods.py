"""Likelihoods p(x | z) of images in [0, 1], given what a decoder says about each pixel.

A decoder gives `parameters` (..., P * C, H, W), P numbers a pixel; `log_prob` is in nats, summed
over pixels, (...). Images broadcast against the leading dimensions: (B, C, H, W) goes with
parameters (K, B, P * C, H, W) of K samples.

The data's scaling is part of the likelihood. An 8-bit value v is stored as v / 255.

- `Bernoulli`: pixels are 0 or 1, a probability mass. Grey values must be binarised first; the cross
  entropy of grey values is the likelihood of nothing.
- `DiscretizedLogistic`: pixels are k / (levels - 1), a probability mass; nats / (log 2 * pixels)
  are bits per dimension, comparable with papers.
- `Gaussian`: a density over [0, 1]. It is not a mass: its nats can be negative, and are comparable
  only among models of the same scaling.

Parameters are taken to float32 at least, so the sums keep their digits under autocast.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SCALES = ("shared", "pixel")
_MIN_LOG_SCALE = -7.0


class Likelihood(nn.Module):
    """A distribution of images; P = `parameters_per_pixel`."""

    parameters_per_pixel = 1

    @abstractmethod
    def log_prob(self, parameters: Tensor, images: Tensor) -> Tensor:
        """log p(images | parameters) in nats: (..., P * C, H, W), (B, C, H, W) -> (...)."""

    @abstractmethod
    def mean(self, parameters: Tensor) -> Tensor:
        """What to show of x, E[x] unless said otherwise: (..., P * C, H, W) -> (..., C, H, W)."""

    @abstractmethod
    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw of x: (..., P * C, H, W) -> (..., C, H, W)."""

    @abstractmethod
    def check(self, images: Tensor, name: str = "images") -> None:
        """Raise ValueError where `images` have values that the likelihood gives no mass to."""


class Bernoulli(Likelihood):
    """Pixels in {0, 1}; the parameter is the logit (Kingma and Welling 2014, appendix C.1)."""

    def log_prob(self, parameters: Tensor, images: Tensor) -> Tensor:
        logits = _at_least_float32(parameters)
        return _sum_pixels(images * logits - F.softplus(logits))

    def mean(self, parameters: Tensor) -> Tensor:
        return torch.sigmoid(_at_least_float32(parameters))

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(parameters), generator=generator)

    def check(self, images: Tensor, name: str = "images") -> None:
        check_unit_range(images, name)
        if not ((images == 0) | (images == 1)).all():
            raise ValueError(
                f"{name} must be 0 or 1 for the Bernoulli likelihood: binarise them, or take "
                "another likelihood"
            )


class _LocationScale(Likelihood):
    """Mean about 1/2, and a scale: one a channel, learned, or one a pixel, from the decoder."""

    def __init__(self, channels: int, scale: str = "shared"):
        super().__init__()
        if scale not in _SCALES:
            raise ValueError(f"scale must be one of {', '.join(_SCALES)}, got {scale!r}")
        self.log_scale = nn.Parameter(torch.full((channels, 1, 1), -1.5))
        self.parameters_per_pixel = 2 if scale == "pixel" else 1

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log scale), of shapes that broadcast."""
        mean, relative = _at_least_float32(parameters), torch.zeros_like(self.log_scale)
        if self.parameters_per_pixel == 2:
            mean, relative = mean.chunk(2, -3)
        return mean + 0.5, (self.log_scale + relative).clamp(min=_MIN_LOG_SCALE)

    def mean(self, parameters: Tensor) -> Tensor:
        return self._split(parameters)[0]

    def check(self, images: Tensor, name: str = "images") -> None:
        check_unit_range(images, name)


class Gaussian(_LocationScale):
    """N(mean, exp(log scale)^2) for each pixel (Kingma and Welling 2014, appendix C.2).

    With a shared scale, learned, this is the sigma-VAE of Rybkin, Daniilidis and Levine 2021.

    Args:
        channels: C of the images.
        scale: "shared", one a channel; "pixel", the decoder's.
    """

    def log_prob(self, parameters: Tensor, images: Tensor) -> Tensor:
        mean, log_scale = self._split(parameters)
        standard = (images - mean) * torch.exp(-log_scale)
        return _sum_pixels(-0.5 * (standard.square() + math.log(2 * math.pi)) - log_scale)

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = self._split(parameters)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return mean + torch.exp(log_scale) * noise


class DiscretizedLogistic(_LocationScale):
    """Pixels k / (levels - 1); each takes the mass of a logistic on its bin.

    Kingma et al. 2016 ("Improving variational inference with inverse autoregressive flow", appendix
    C), with the two end bins reaching to infinity as in Salimans et al. 2017 (PixelCNN++, eq. 2):
    with bin ends a < b and the logistic function s, the mass s(b) - s(a) is evaluated as
    s(b) s(-a) (1 - exp(a - b)), which does not cancel.

    Args:
        channels: C of the images.
        scale: "shared", one a channel; "pixel", the decoder's.
        levels: how many values a pixel takes: 256 for 8-bit images.
    """

    def __init__(self, channels: int, scale: str = "shared", levels: int = 256):
        super().__init__(channels, scale)
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.levels = levels

    def mean(self, parameters: Tensor) -> Tensor:
        """The median, within [0, 1]: for values of the end bins, the location is far outside."""
        return super().mean(parameters).clamp(0, 1)

    def log_prob(self, parameters: Tensor, images: Tensor) -> Tensor:
        mean, log_scale = self._split(parameters)
        width = 1 / (self.levels - 1)
        inverse_scale = torch.exp(-log_scale)
        upper = (images - mean + width / 2) * inverse_scale
        lower = (images - mean - width / 2) * inverse_scale
        not_first, not_last = images > width / 2, images < 1 - width / 2
        log_mass = not_last * F.logsigmoid(upper) + not_first * F.logsigmoid(-lower)
        log_width = torch.log(-torch.expm1(-width * inverse_scale))
        return _sum_pixels(log_mass + (not_first & not_last) * log_width)

    def sample(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = self._split(parameters)
        uniform = torch.empty_like(mean).uniform_(1e-5, 1 - 1e-5, generator=generator)
        values = mean + torch.exp(log_scale) * torch.logit(uniform)
        return (values * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)

    def check(self, images: Tensor, name: str = "images") -> None:
        super().check(images, name)
        scaled = images * (self.levels - 1)
        if (scaled - scaled.round()).abs().amax() > 1e-3:
            raise ValueError(
                f"{name} must be multiples of 1/{self.levels - 1} for the discretised logistic "
                f"likelihood with {self.levels} levels: give the number of levels they have"
            )


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discretized-logistic": DiscretizedLogistic,
}


def make_likelihood(
    name: str, channels: int, *, scale: str = "shared", levels: int = 256
) -> Likelihood:
    """The likelihood of a name of `LIKELIHOODS`; scale and levels where it has them.

    Raises:
        ValueError: an unknown name, or options that it does not have.
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {name!r}")
    if name == "bernoulli":
        return Bernoulli()
    if name == "gaussian":
        return Gaussian(channels, scale)
    return DiscretizedLogistic(channels, scale, levels)


def _at_least_float32(parameters: Tensor) -> Tensor:
    return parameters.to(torch.promote_types(parameters.dtype, torch.float32))


def _sum_pixels(values: Tensor) -> Tensor:
    return values.flatten(-3).sum(-1)


def check_unit_range(images: Tensor, name: str) -> None:
    """Raise ValueError unless all values are finite and in [0, 1]."""
    if not images.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{name} must be in [0, 1], got [{images.min():.4g}, {images.max():.4g}]")
