"""VAE: a latent variable model trained on a bound of its likelihood.

p(x, z) = p(x | z) N(z; 0, I), with the posterior q(z | x) = N(mu(x), diag exp(logvar(x))) (Kingma
and Welling, "Auto-Encoding Variational Bayes", 2014, arXiv 1312.6114).

- `elbo`: E_q[log p(x | z)] - KL(q || p), the KL in closed form (appendix B) or as the Monte-Carlo
  estimate log q(z | x) - log p(z) at the sample (eq. 2). The KL may have a weight beta (Higgins et
  al., "beta-VAE", 2017), and each latent's share of it cost at least `free_bits` (Kingma et al.
  2016, arXiv 1606.04934, eq. 15).
- `iwae`: log 1/K sum_k p(x, z_k) / q(z_k | x), a tighter bound (Burda, Grosse and Salakhutdinov,
  "Importance Weighted Autoencoders", 2016, arXiv 1509.00519, eq. 8).

All terms are in nats, one value an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen.losses import make_likelihood
from fastgen.models import vae_nets
from fastgen.nn import GaussianReparam, _ranks
from fastgen.random import draw_key

NETWORKS = {"mlp": vae_nets.mlp, "conv": vae_nets.convolutional}
_KLS = ("analytic", "mc")


class Bound(NamedTuple):
    """bound (B,) to maximise, and of what it is made: log p(x | z) and log q(z | x) - log p(z)."""

    bound: Tensor
    log_likelihood: Tensor
    kl: Tensor


class VAE(nn.Module):
    """Images in [0, 1] to Gaussian latents (B, D) and back.

    Args:
        image_shape: (C, H, W).
        latent_dim: D.
        network: "mlp" or "conv".
        likelihood: "bernoulli", "gaussian" or "discretized-logistic" (`fastgen.losses`).
        scale: of the latter two: "shared", one a channel; "pixel", the decoder's.
        levels: values of a pixel, for the discretised logistic.
        kl: "analytic" or "mc".
        **network_options: width, layers and dropout of `fastgen.models.vae_nets`.

    Raises:
        ValueError: an unknown name, or sizes that do not fit.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        latent_dim: int = 50,
        network: str = "mlp",
        likelihood: str = "bernoulli",
        scale: str = "shared",
        levels: int = 256,
        kl: str = "analytic",
        **network_options: Any,
    ):
        super().__init__()
        _check_choice("network", network, NETWORKS)
        _check_choice("kl", kl, _KLS)
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        self.image_shape = image_shape
        self.latent_dim = latent_dim
        self.kl = kl
        self.likelihood = make_likelihood(likelihood, image_shape[0], scale=scale, levels=levels)
        out_channels = image_shape[0] * self.likelihood.parameters_per_pixel
        self.encoder, self.decoder = NETWORKS[network](
            image_shape, latent_dim, out_channels, **network_options
        )
        self.reparam = GaussianReparam()

    def forward(
        self,
        images: Tensor,
        *,
        samples: int = 1,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        key: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Bound:
        """`elbo`, or `iwae` with several samples."""
        if samples > 1:
            return self.iwae(images, samples, key=key, noise=noise)
        return self.elbo(images, beta=beta, free_bits=free_bits, key=key, noise=noise)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) -> mean and log-variance of q(z | x), (B, D) each."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images must be (B, *{self.image_shape}), got {tuple(images.shape)}")
        parameters = self.encoder(2 * images - 1)
        # under autocast too: the KL is a difference of near terms
        parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
        mu, logvar = parameters.chunk(2, 1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, D) -> the mean of p(x | z), (N, C, H, W)."""
        return self.likelihood.mean(self.decoder(z))

    def elbo(
        self,
        images: Tensor,
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        key: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Bound:
        """One sample's estimate of the evidence lower bound.

        Args:
            images: (B, C, H, W).
            beta: weight of the KL; below 1 the value bounds nothing.
            free_bits: nats that a latent's KL, averaged over the batch, costs at least; in training
                mode over that of all processes, which must all have as many images.
            key, noise: the noise (B, D), or what it is made from, as for `fastgen.ops.reparam_kl`;
                by default a key from torch's own generator.
        """
        mu, logvar = self.encode(images)
        if free_bits > 0:
            z, kl_per_latent = self._sample_per_latent(mu, logvar, key, noise)
            kl = kl_per_latent.sum(1)
            mean = kl_per_latent.mean(0)
            joint = _ranks.mean(mean) if self.training else mean
            cost = torch.where(joint >= free_bits, mean, free_bits).sum()
        else:
            z, kl = self.reparam(mu, logvar, key=key, noise=noise)
            cost = kl = kl if self.kl == "analytic" else _log_ratio(z, mu, logvar).sum(-1)
        log_likelihood = self.likelihood.log_prob(self.decoder(z), images)
        return Bound(log_likelihood - beta * cost, log_likelihood, kl)

    def _sample_per_latent(
        self, mu: Tensor, logvar: Tensor, key: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """z and each latent's KL, (B, D) both: to the op, every latent is a batch element."""
        noise = None if noise is None else noise.reshape(-1, 1)
        z, kl = self.reparam(mu.reshape(-1, 1), logvar.reshape(-1, 1), key=key, noise=noise)
        z, kl = z.view_as(mu), kl.view_as(mu)
        return z, kl if self.kl == "analytic" else _log_ratio(z, mu, logvar)

    def iwae(
        self,
        images: Tensor,
        samples: int,
        *,
        key: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Bound:
        """The importance-weighted bound of K = `samples` latents per image, decoded in one batch.

        `key` and `noise`, here (B, K, D), are as for `elbo`.
        """
        log_likelihood, kl = self._log_weights(*self.encode(images), images, samples, key, noise)
        bound = torch.logsumexp(log_likelihood - kl, 1) - math.log(samples)
        return Bound(bound, log_likelihood.mean(1), kl.mean(1))

    def _log_weights(
        self,
        mu: Tensor,
        logvar: Tensor,
        images: Tensor,
        samples: int,
        key: Tensor | None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """log p(x | z_k) and log q(z_k | x) - log p(z_k), (B, K) both."""
        mu, logvar = (t[:, None].expand(-1, samples, -1) for t in (mu, logvar))
        z, _ = self.reparam(mu, logvar, key=key, noise=noise)
        parameters = self.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        log_likelihood = self.likelihood.log_prob(parameters, images[:, None])
        return log_likelihood, _log_ratio(z, mu, logvar).sum(-1)

    @torch.no_grad()
    def log_prob(
        self,
        images: Tensor,
        samples: int = 1000,
        *,
        max_decoded: int = 2000,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`iwae` of many samples, log p(x) from below: (B, C, H, W) -> (B,), nats.

        Args:
            images: (B, C, H, W).
            samples: K.
            max_decoded: images decoded at once, which bounds the memory.
            generator: source of the noise; by default torch's own.
        """
        mu, logvar = self.encode(images)
        total = torch.full_like(mu[:, 0], -math.inf)
        for part in _parts(samples, max(max_decoded // len(images), 1)):
            key = draw_key(device=mu.device, generator=generator)
            log_likelihood, kl = self._log_weights(mu, logvar, images, part, key)
            total = torch.logaddexp(total, torch.logsumexp(log_likelihood - kl, 1))
        return total - math.log(samples)

    @torch.no_grad()
    def sample(
        self, num: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Means of p(x | z) at z ~ N(0, temperature^2 I): (num, C, H, W)."""
        device = next(self.parameters()).device
        z = torch.randn(num, self.latent_dim, device=device, generator=generator)
        return self.decode(temperature * z)

    @torch.no_grad()
    def interpolate(self, first: Tensor, second: Tensor, steps: int) -> Tensor:
        """Decode the straight lines between the latents of two image batches (B, C, H, W).

        Returns:
            (steps, B, C, H, W), from `first` to `second`.
        """
        start, end = self.encode(first)[0], self.encode(second)[0]
        return torch.stack([self.decode(start.lerp(end, w)) for w in torch.linspace(0, 1, steps)])

    @torch.no_grad()
    def traverse(self, image: Tensor, latents: Tensor, steps: int, span: float = 3.0) -> Tensor:
        """Decode one image's latents with one of them moved over [-span, span].

        Args:
            image: (C, H, W).
            latents: (L,), int64, which ones to move.
            steps: values of each.

        Returns:
            (L, steps, C, H, W).
        """
        z = self.encode(image[None])[0].repeat(len(latents), steps, 1)
        values = torch.linspace(-span, span, steps, device=z.device, dtype=z.dtype)
        z[torch.arange(len(latents)), :, latents] = values
        return self.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])


def _log_ratio(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z | x) - log p(z), one value a latent."""
    noise = (z - mu) * torch.exp(-0.5 * logvar)
    return 0.5 * (z.square() - noise.square() - logvar)


def _parts(total: int, most: int) -> list[int]:
    """`total` as a sum of numbers up to `most`."""
    return [min(most, total - done) for done in range(0, total, most)]


def _check_choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
