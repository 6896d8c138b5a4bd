"""The sampling layer of a VAE with a Gaussian posterior (Kingma and Welling 2014)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.ops import _check

__all__ = ["GaussianReparam"]


class GaussianReparam(nn.Module):
    """Samples z ~ N(mu, exp(logvar)) by reparameterisation, and gives its KL to N(0, I).

    The two arguments of forward are the halves of an encoder's output; or the whole output is given
    and cut in two along `dim`, mean first, without a copy.

    In training, and in evaluation too by default, z is a sample: the ELBO needs one. With
    ``mean_in_eval=True`` z is the mean in evaluation, as reconstruction and representation want it;
    kl stays what it is.

    The layer has no parameters, no buffers and an empty state dict.

    Args:
        dim: dimension along which a single argument holds mean and log-variance; not the batch.
        mean_in_eval: return the mean as z in evaluation.

    Raises:
        TypeError, ValueError: `dim` is not an int, or the batch.

    Example:
        >>> z, kl = GaussianReparam()(encoder(x))
        >>> loss = nll(decoder(z), x).flatten(1).sum(1).add(kl).mean()
    """

    def __init__(self, dim: int = 1, *, mean_in_eval: bool = False) -> None:
        super().__init__()
        _check.integer(dim, "dim")
        if dim == 0:
            raise ValueError("dim: expected another dimension than the batch, got 0")
        self.dim = dim
        self.mean_in_eval = mean_in_eval

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        key: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples.

        Args:
            mu: (B, ...), means; or, without `logvar`, means and log-variances along `dim`.
            logvar: (B, ...), logarithms of the variances.
            key, noise, generator: the noise, or where it comes from, as for
                :func:`fastgen.ops.reparam_kl`.

        Returns:
            z: (B, ...), a half of the input where that is cut.
            kl: (B,) in nats, summed over all other dimensions.

        Raises:
            TypeError, ValueError: as :func:`fastgen.ops.reparam_kl`; or the size of `dim` is odd.
        """
        _check.floating(mu, "mu")
        if logvar is None:
            mu, logvar = self._halves(mu)
        if self.mean_in_eval and not self.training:
            _, kl = ops.reparam_kl(mu, logvar, torch.zeros_like(mu))
            return mu, kl
        return ops.reparam_kl(mu, logvar, noise, key=key, generator=generator)

    def _halves(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        if not -parameters.dim() < self.dim < parameters.dim():
            raise ValueError(
                f"mu: expected means and log-variances along dimension {self.dim}, got shape "
                f"{tuple(parameters.shape)}"
            )
        if parameters.shape[self.dim] % 2:
            raise ValueError(
                f"mu: expected an even size of dimension {self.dim}, means and log-variances, got "
                f"shape {tuple(parameters.shape)}"
            )
        mu, logvar = parameters.chunk(2, self.dim)
        return mu, logvar

    def extra_repr(self) -> str:
        return f"dim={self.dim}, mean_in_eval={self.mean_in_eval}"
