"""RealNVP: exact likelihoods by a chain of coupling layers, of vectors and of images.

Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017 (arXiv 1605.08803): an
invertible f maps data x to z ~ N(0, I), and log p(x) = log N(f(x)) + log|det df/dx| (eq. 3). f is
made of affine coupling layers (eq. 7, 8); for images with checkerboard and channel-wise masks in a
multi-scale architecture (section 3.6, figure 4). With coupling="spline" they are
rational-quadratic splines: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019
(arXiv 1906.04032), RQ-NSF (C).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fastgen.models.flow_layers import (
    Checkerboard,
    FlowBatchNorm,
    LogitDequantize,
    Permutation,
    ResidualConvNet,
    ResidualMLP,
    Squeeze,
    Standardize,
    Undo,
)
from fastgen.nn import AffineCoupling, Invertible, InvertibleChain, RQSplineCoupling
from fastgen.ops import _check

Coupling = Literal["affine", "spline"]


class Flow(nn.Module):
    """What flows of vectors and of images share: `encode` and `decode` are theirs.

    Attributes:
        latent_dim: D of z (B, D).
    """

    latent_dim: int

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, ...) -> z (B, D) and log|det dz/dx| (B,), in nats."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """The inverse of `encode`: z (B, D) -> x (B, ...)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`log_prob`, for wrappers that know the call alone."""
        return self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """x (B, ...) -> log p(x) in nats (B,), float32 (float64 for float64 x)."""
        z, log_det = self.encode(x)
        return log_det - normal_energy(z)

    def sample(
        self, num: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw (num, ...), z with standard deviation `temperature`.

        Raises:
            ValueError: `temperature` not positive, or `num` negative.
        """
        _check.positive(temperature, "temperature")
        if num < 0:
            raise ValueError(f"num must not be negative, got {num}")
        like = next(self.parameters())
        z = torch.randn(
            num, self.latent_dim, device=like.device, dtype=like.dtype, generator=generator
        )
        return self.decode(temperature * z)

    def interpolate(self, first: Tensor, second: Tensor, steps: int) -> Tensor:
        """Decode the arcs between the latents of two batches (B, ...): (steps, B, ...).

        An arc keeps the distance from 0 of what the prior draws; a straight line would not.
        """
        start, end = self.encode(first)[0], self.encode(second)[0]
        angles = [math.pi / 2 * i / max(steps - 1, 1) for i in range(steps)]
        return torch.stack([self.decode(math.cos(a) * start + math.sin(a) * end) for a in angles])


class RealNVP(Flow):
    """Flow of vectors x (B, D).

    Args:
        dim: D, at least 2.
        layers: coupling layers; each transforms the half that the one before it kept.
        hidden, blocks: width and residual blocks of a layer's conditioner.
        coupling: "affine" (log s = 2 tanh(.)) | "spline".
        num_bins, tail_bound: of the splines.
        batch_norm: a `FlowBatchNorm` after each coupling.
        permute: a fixed random permutation after every other coupling, where D > 2.
        reversible: rebuild activations in backward (`fastgen.nn.InvertibleChain`).
        anchor_every: layers between kept states then.

    Raises:
        ValueError: a size out of range, or an unknown `coupling`.
    """

    def __init__(
        self,
        dim: int,
        *,
        layers: int = 8,
        hidden: int = 128,
        blocks: int = 2,
        coupling: Coupling = "affine",
        num_bins: int = 8,
        tail_bound: float = 3.0,
        batch_norm: bool = False,
        permute: bool = True,
        reversible: bool = False,
        anchor_every: int = 16,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}")
        for value, name in ((layers, "layers"), (hidden, "hidden")):
            _check.positive_int(value, name)
        self.latent_dim = dim
        self.standardize = Standardize(dim)
        first, second = dim - dim // 2, dim // 2
        chain: list[Invertible] = []
        for i in range(layers):
            swap = i % 2 == 1
            kept, moved = (second, first) if swap else (first, second)
            outputs = numbers_each(coupling, num_bins) * moved
            conditioner = ResidualMLP(kept, outputs, hidden, blocks)
            chain.append(make_coupling(coupling, conditioner, swap, num_bins, tail_bound))
            if batch_norm:
                chain.append(FlowBatchNorm(dim))
            if permute and dim > 2 and swap and i + 1 < layers:
                chain.append(Permutation(torch.randperm(dim)))
        self.chain = InvertibleChain(chain, reversible=reversible, anchor_every=anchor_every)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 2 or x.shape[1] != self.latent_dim:
            raise ValueError(f"x must be (B, {self.latent_dim}), got {tuple(x.shape)}")
        x, scaling = self.standardize(x)
        z, log_det = self.chain(x)
        return z, log_det + scaling

    def decode(self, z: Tensor) -> Tensor:
        return self.standardize.inverse(self.chain.inverse(z)[0])[0]


class ImageRealNVP(Flow):
    """Multi-scale flow of images in [0, 1] (section 3.6).

    At each scale but the last: 3 checkerboard couplings, a squeeze, 3 channel-wise couplings, and
    half of the channels become latents; at the last scale 4 checkerboard couplings. Grey values are
    dequantised and taken through a logit, and log_prob is the bound on the log-probability of the
    grey values that `LogitDequantize` describes.

    Args:
        image_shape: (C, H, W); H and W divisible by 2**scales.
        levels: number of grey values.
        alpha: keeps the logit from 0 and 1.
        scales: levels of the architecture.
        hidden, blocks: width and residual blocks of a conditioner.
        coupling, num_bins, tail_bound, batch_norm, reversible, anchor_every: as `RealNVP`.

    Raises:
        ValueError: sides that the scales do not divide, a size out of range, unknown `coupling`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        levels: int = 256,
        alpha: float = 0.05,
        scales: int = 2,
        hidden: int = 32,
        blocks: int = 2,
        coupling: Coupling = "affine",
        num_bins: int = 8,
        tail_bound: float = 3.0,
        batch_norm: bool = True,
        reversible: bool = False,
        anchor_every: int = 16,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        for value, name in ((scales, "scales"), (hidden, "hidden")):
            _check.positive_int(value, name)
        if height % 2**scales or width % 2**scales:
            raise ValueError(
                f"scales must halve the sides of a {height}x{width} image evenly, got {scales}"
            )
        self.image_shape = (channels, height, width)
        self.latent_dim = channels * height * width
        self.dequantize = LogitDequantize(levels, alpha)

        def couplings(count: int, channels: int, board: bool) -> list[Invertible]:
            made: list[Invertible] = []
            for i in range(count):
                conditioner = ResidualConvNet(
                    channels // 2,
                    numbers_each(coupling, num_bins) * (channels // 2),
                    hidden,
                    blocks,
                    colour=i % 2 if board else None,
                )
                made.append(make_coupling(coupling, conditioner, i % 2 == 1, num_bins, tail_bound))
                made += [FlowBatchNorm(channels)] if batch_norm else []
            return made

        def on_board(count: int, channels: int) -> list[Invertible]:
            board = Checkerboard()
            return [board, *couplings(count, 2 * channels, True), Undo(board)]

        chains: list[InvertibleChain] = []
        self.latent_shapes: list[tuple[int, int, int]] = []
        for scale in range(scales):
            last = scale == scales - 1
            layers = on_board(4 if last else 3, channels)
            if not last:
                channels, height, width = 4 * channels, height // 2, width // 2
                layers += [Squeeze(), *couplings(3, channels, False)]
                channels //= 2
            chains.append(InvertibleChain(layers, reversible=reversible, anchor_every=anchor_every))
            self.latent_shapes.append((channels, height, width))
        self.scales = nn.ModuleList(chains)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), and noise in [0, 1) of that shape or torch's own -> z, log_det."""
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"images must be (B, *{self.image_shape}), got {tuple(x.shape)}")
        h, log_det = self.dequantize(x, torch.rand_like(x) if noise is None else noise)
        latents = []
        for scale, chain in enumerate(self.scales, 1):
            h, scale_log_det = chain(h)
            log_det = log_det + scale_log_det
            if scale < len(self.scales):
                latent, h = h.chunk(2, 1)
                latents.append(latent.flatten(1))
        return torch.cat([*latents, h.flatten(1)], 1), log_det

    def decode(self, z: Tensor) -> Tensor:
        """z (B, D) -> images (B, C, H, W) of `levels` grey values."""
        sizes = [math.prod(shape) for shape in self.latent_shapes]
        *latents, h = (
            part.unflatten(1, shape)
            for part, shape in zip(z.split(sizes, 1), self.latent_shapes, strict=True)
        )
        for chain in reversed(self.scales):
            assert isinstance(chain, InvertibleChain)
            h, _ = chain.inverse(h)
            if latents:
                h = torch.cat([latents.pop(), h], 1)
        return self.dequantize.inverse(h)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.log_prob(x, noise)

    def log_prob(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) -> a bound on the log-probability of their grey values (B,), nats."""
        z, log_det = self.encode(x, noise)
        return log_det - normal_energy(z)

    def bits_per_dim(self, log_prob: Tensor) -> Tensor:
        """Nats an image to bits a dimension."""
        return -log_prob / (self.latent_dim * math.log(2))


def normal_energy(z: Tensor) -> Tensor:
    """-log N(z; 0, I) of each row of z (B, D), in nats."""
    squares = z.to(torch.promote_types(z.dtype, torch.float32)).square().sum(1)
    return 0.5 * (squares + z.shape[1] * math.log(2 * math.pi))


def numbers_each(coupling: Coupling, num_bins: int) -> int:
    """Numbers that a conditioner gives for each transformed element.

    Raises:
        ValueError: unknown name, or `num_bins` out of range.
    """
    _check.one_of(coupling, "coupling", ("affine", "spline"))
    _check.positive_int(num_bins, "num_bins")
    return 2 if coupling == "affine" else 3 * num_bins - 1


def make_coupling(
    coupling: Coupling, conditioner: nn.Module, swap: bool, num_bins: int, tail_bound: float
) -> Invertible:
    """The coupling layer of that name, one that `numbers_each` knows."""
    if coupling == "affine":
        return AffineCoupling(conditioner, swap=swap, scale_factor=2.0)
    return RQSplineCoupling(conditioner, swap=swap, num_bins=num_bins, tail_bound=tail_bound)
