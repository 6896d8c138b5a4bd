"""VQ-VAE: an autoencoder with a discrete latent grid.

van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017 (arXiv
1711.00937): the latent grid is the nearest code per position (eq. 1, 2), gradients pass straight
through (section 3.2), and the loss is -log p(x | z_q) + ||sg(z_e) - e||^2 + beta ||z_e - sg(e)||^2
(eq. 3), the codebook term replaced by moving averages where `codebook="ema"` (appendix A.1). The
residual encoder and decoder are those of section 4.1. Several quantizers code each position in
stages (Zeghidour et al., "SoundStream", 2021, algorithm 1).
The prior over the codes is a model of its own, `fastgen.models.CodePrior`; with it,
log p(x) >= log p(x | z_q) + log p(z_q) (section 3.1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.losses import Likelihood, make_likelihood
from fastgen.nn import ResidualVQ, VectorQuantizer


class VQVAEOutput(NamedTuple):
    """reconstruction (B, C, H, W), the mean of p(x | z_q); codes (B, *grid_shape), int64; vq_loss,
    a scalar; log_likelihood (B,), log p(x | z_q) in nats, None where the model has no likelihood.
    """

    reconstruction: Tensor
    codes: Tensor
    vq_loss: Tensor
    log_likelihood: Tensor | None


class ResidualBlock(nn.Module):
    """ReLU, 3x3 conv, ReLU, 1x1 conv, added to the input: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class VQVAE(nn.Module):
    """Images in [0, 1] to a grid of codes and back.

    Args:
        image_shape: (C, H, W); H and W divisible by 2**downsamplings.
        num_codes: codebook size K.
        code_dim: width D of a code.
        channels: width of the convolutions.
        residual_blocks: residual blocks in the encoder, and as many in the decoder.
        downsamplings: halvings of the side: the latent grid is (H, W) / 2**downsamplings.
        quantizers: codes a position: of one codebook, or of several on what the ones before left.
        likelihood: p(x | z_q), "bernoulli", "gaussian" or "discretized-logistic"
            (`fastgen.losses`); "mse": the decoder gives a mean, to be trained by squared errors.
        scale, levels: of the likelihood, as for `fastgen.losses.make_likelihood`.
        **quantizer: further options of `fastgen.nn.VectorQuantizer`.

    Attributes:
        grid_shape: of an image's codes, (h, w), or (h, w, quantizers) for several.

    Raises:
        ValueError: an image side that the halvings do not divide, a size below 1, or an unknown
            likelihood.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        num_codes: int = 512,
        code_dim: int = 64,
        channels: int = 128,
        residual_blocks: int = 2,
        downsamplings: int = 2,
        quantizers: int = 1,
        likelihood: str = "mse",
        scale: str = "pixel",
        levels: int = 256,
        **quantizer: Any,
    ):
        super().__init__()
        image_channels, height, width = image_shape
        if downsamplings < 0 or height % 2**downsamplings or width % 2**downsamplings:
            raise ValueError(
                f"downsamplings must halve the sides of a {height}x{width} image evenly, "
                f"got {downsamplings}"
            )
        if channels < 2:
            raise ValueError(f"channels must be at least 2, got {channels}")
        self.image_shape = (image_channels, height, width)
        self.grid_shape: tuple[int, ...] = (height >> downsamplings, width >> downsamplings)
        self.num_codes = num_codes
        self.likelihood: Likelihood | None = None
        out_channels = image_channels
        if likelihood != "mse":
            self.likelihood = make_likelihood(
                likelihood, image_channels, scale=scale, levels=levels
            )
            out_channels *= self.likelihood.parameters_per_pixel

        halvings = [
            nn.Conv2d(channels, channels, 4, stride=2, padding=1) for _ in range(downsamplings)
        ]
        self.encoder = nn.Sequential(
            nn.Conv2d(image_channels, channels, 3, padding=1),
            *(layer for conv in halvings for layer in (nn.ReLU(), conv)),
            *(ResidualBlock(channels, channels // 2) for _ in range(residual_blocks)),
            nn.ReLU(),
            nn.Conv2d(channels, code_dim, 1),
        )
        self.quantizer: VectorQuantizer | ResidualVQ
        if quantizers == 1:
            self.quantizer = VectorQuantizer(num_codes, code_dim, channel_first=True, **quantizer)
        else:
            self.quantizer = ResidualVQ(
                quantizers, num_codes, code_dim, channel_first=True, **quantizer
            )
            self.grid_shape = (*self.grid_shape, quantizers)
        doublings = [
            nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
            for _ in range(downsamplings)
        ]
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, channels, 3, padding=1),
            *(ResidualBlock(channels, channels // 2) for _ in range(residual_blocks)),
            *(layer for conv in doublings for layer in (nn.ReLU(), conv)),
            nn.ReLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Encode, quantize, decode images (B, C, H, W); in training mode an EMA codebook moves."""
        quantized, codes, vq_loss = self.quantizer(self._embed(images))
        parameters = self.decoder(quantized)
        log_likelihood = None
        if self.likelihood is not None:
            log_likelihood = self.likelihood.log_prob(parameters, images)
        return VQVAEOutput(self._mean(parameters), codes, vq_loss, log_likelihood)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> codes (B, *grid_shape), int64; the codebook stays as it is."""
        return self.quantizer.encode(self._embed(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, *grid_shape) -> the mean of p(x | z_q): (B, C, H, W), not clamped to [0, 1]."""
        return self._mean(self.decoder(self.quantizer.decode(codes)))

    def log_prob(self, images: Tensor, codes: Tensor) -> Tensor:
        """log p(x | z_q) of images (B, C, H, W) given codes (B, *grid_shape): (B,), nats.

        Raises:
            ValueError: the model has no likelihood.
        """
        if self.likelihood is None:
            raise ValueError("likelihood must not be 'mse' for log_prob: a mean has none")
        return self.likelihood.log_prob(self.decoder(self.quantizer.decode(codes)), images)

    def _embed(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images must be (B, *{self.image_shape}), got {tuple(images.shape)}")
        return self.encoder(2 * images - 1)

    def _mean(self, parameters: Tensor) -> Tensor:
        if self.likelihood is None:
            return (parameters + 1) / 2
        return self.likelihood.mean(parameters)

    @torch.no_grad()
    def interpolate(self, first: Tensor, second: Tensor, steps: int) -> Tensor:
        """Decode the straight lines between two image batches (B, C, H, W), each point quantized.

        Returns:
            (steps, B, C, H, W), from `first` to `second`.
        """
        start, end = self._embed(first), self._embed(second)
        lines = [torch.lerp(start, end, i / max(steps - 1, 1)) for i in range(steps)]
        return torch.stack([self.decode(self.quantizer.encode(line)) for line in lines])
