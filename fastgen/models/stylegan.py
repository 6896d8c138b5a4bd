"""StyleGAN: a generator steered by styles, and the progressively growing discriminator against it.

Karras, Laine, Aila, "A Style-Based Generator Architecture for Generative Adversarial Networks",
2019 (arXiv 1812.04948), with its first architecture's growing (Karras et al. 2018, arXiv
1710.10196). Latents z become styles w by a perceptron; from a learned constant of 4x4, every layer
adds noise of a learned strength and has its planes' means and deviations replaced by those that w
asks for (AdaIN, eq. 1). A level is a resolution: level l has sides of 4 * 2^l. While level l is
faded in, an image is (1 - alpha) times that of level l - 1, enlarged, plus alpha times its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen import ops
from fastgen.models.stylegan_layers import (
    RELU_GAIN,
    Blur,
    EqualConv2d,
    EqualLinear,
    MinibatchStd,
    StyledLayer,
    leaky_relu,
)
from fastgen.nn import _ranks
from fastgen.ops import _check
from fastgen.random import draw_key, fold_in

_W_MEAN_DECAY = 0.995


def level_of(resolution: int) -> int:
    """The level with sides of `resolution`.

    Raises:
        ValueError: not a power of two, or below 4.
    """
    level = resolution.bit_length() - 3
    if level < 0 or resolution != 4 << level:
        raise ValueError(f"resolution must be a power of two, at least 4, got {resolution}")
    return level


def channels_at(level: int, channel_base: int, channel_max: int) -> int:
    """Feature maps of a level: `channel_base` / side, at most `channel_max`."""
    return max(min(channel_base // (4 << level), channel_max), 1)


class Mapping(nn.Module):
    """z (B, D) of any length -> w (B, D), by equal layers that learn slowly (section 2)."""

    def __init__(self, dim: int, layers: int, lr_multiplier: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EqualLinear(dim, dim, gain=RELU_GAIN, lr_multiplier=lr_multiplier)
            for _ in range(layers)
        )

    def forward(self, z: Tensor) -> Tensor:
        """z (B, D) -> w (B, D)."""
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.layers:
            w = leaky_relu(layer(w))
        return w


class SynthesisBlock(nn.Module):
    """The two layers of a level: x of the level below, or the constant, -> x of this one."""

    def __init__(self, in_channels: int, channels: int, style_dim: int, *, first: bool) -> None:
        super().__init__()
        self.enter: nn.Module = nn.Identity()
        if not first:
            up = EqualConv2d(in_channels, channels, 3, resample="up", bias=False)
            self.enter = nn.Sequential(up, Blur())
        self.conv = EqualConv2d(channels, channels, 3, bias=False)
        self.styled = nn.ModuleList(StyledLayer(channels, style_dim) for _ in range(2))

    def forward(self, x: Tensor, w: Tensor, noise: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """x, styles w (B, 2, D) and noise inputs of both layers -> (B, channels, side, side)."""
        x = self.styled[0](self.enter(x), w[:, 0], noise[0])
        return self.styled[1](self.conv(x), w[:, 1], noise[1])


class StyleGANGenerator(nn.Module):
    """Latents z (B, D) to images (B, channels, side, side), about -1 to 1.

    Args:
        resolution: side of the last level, a power of two.
        image_channels: of the images.
        latent_dim: D, of z and w.
        mapping_layers: depth of the mapping.
        mapping_lr: its learning rate, relative to all else.
        channel_base, channel_max: see `channels_at`.

    Attributes:
        w_mean: (D,), running mean of w, the centre of truncation.
        w_count: (), int64, the batches that it is of; the first ones are forgotten faster.
        growth: (2,), level and alpha to draw with by default; `grow` sets them.

    Raises:
        ValueError: a size out of range.
    """

    w_mean: Tensor
    w_count: Tensor
    growth: Tensor

    def __init__(
        self,
        resolution: int,
        image_channels: int = 1,
        *,
        latent_dim: int = 128,
        mapping_layers: int = 8,
        mapping_lr: float = 0.01,
        channel_base: int = 1024,
        channel_max: int = 96,
    ) -> None:
        super().__init__()
        self.top = level_of(resolution)
        self.latent_dim = latent_dim
        widths = [channels_at(i, channel_base, channel_max) for i in range(self.top + 1)]
        self.mapping = Mapping(latent_dim, mapping_layers, mapping_lr)
        # the paper starts from ones: planes without variance, of which AdaIN makes rounding errors
        self.constant = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        self.blocks = nn.ModuleList(
            SynthesisBlock(below, width, latent_dim, first=i == 0)
            for i, (below, width) in enumerate(zip([0, *widths], widths, strict=False))
        )
        self.to_image = nn.ModuleList(
            EqualConv2d(width, image_channels, 1, gain=1.0) for width in widths
        )
        self.register_buffer("w_mean", torch.zeros(latent_dim))
        self.register_buffer("w_count", torch.tensor(0))
        self.register_buffer("growth", torch.tensor([float(self.top), 1.0]))

    def grow(self, level: int, alpha: float) -> None:
        """Draw at `level`, faded in by `alpha`, until told otherwise.

        Raises:
            ValueError: there is no such level, or `alpha` is not in [0, 1].
        """
        _check.between(level, "level", 0, self.top)
        _check.between(alpha, "alpha", 0, 1)
        self.growth.copy_(torch.tensor([float(level), alpha]))

    def layers_at(self, level: int) -> int:
        """Styled layers up to a level."""
        return 2 * (level + 1)

    def noise_shapes(self, level: int) -> list[tuple[int, int, int]]:
        """(1, side, side) of an image's noise input in each layer up to a level."""
        return [(1, 4 << i, 4 << i) for i in range(level + 1) for _ in range(2)]

    def parameters_at(self, level: int, *, fading: bool = True) -> Iterator[nn.Parameter]:
        """What images of `level` depend on, where alpha blends (`fading`) or not."""
        yield self.constant
        for module in (self.mapping, *self.blocks[: level + 1]):
            yield from module.parameters()
        for module in self.to_image[max(level - fading, 0) : level + 1]:
            yield from module.parameters()

    def forward(
        self,
        z: Tensor,
        *,
        other: Tensor | None = None,
        crossover: Tensor | None = None,
        psi: float = 1.0,
        level: int | None = None,
        alpha: float | Tensor | None = None,
        key: Tensor | None = None,
        noise: bool | Sequence[Tensor] = True,
    ) -> Tensor:
        """Images of latents; in training mode `w_mean` follows, on the latents of all processes.

        Args:
            z: (B, D).
            other, crossover: as `mix`.
            psi: as `truncate`.
            level, alpha: by default those of `grow`; a tensor alpha is always blended with.
            key: of the noise inputs; drawn from torch's default generator by default.
            noise: the noise inputs, of `noise_shapes`; True makes them from `key`, False leaves
                them out.
        """
        _check.shape(z, "z", (len(z), self.latent_dim), "batch, latent_dim")
        level, alpha = self._growth(level, alpha)
        w = self.mapping(z)
        if self.training:
            self._follow(w)
        ws = w[:, None].expand(-1, self.layers_at(level), -1)
        if other is not None:
            assert crossover is not None, "other latents need a crossover"
            ws = self.mix(ws, self.mapping(other)[:, None], crossover)
        if psi != 1:
            ws = self.truncate(ws, psi)
        return self.synthesize(ws, level=level, alpha=alpha, key=key, noise=noise)

    def _growth(
        self, level: int | None, alpha: float | Tensor | None
    ) -> tuple[int, float | Tensor]:
        if level is not None:
            _check.between(level, "level", 0, self.top)
            return level, 1.0 if alpha is None else alpha
        stored_level, stored_alpha = self.growth.tolist()
        return int(stored_level), stored_alpha if alpha is None else alpha

    @torch.no_grad()
    def _follow(self, w: Tensor) -> None:
        mean = _ranks.mean(w.mean(0).to(self.w_mean.dtype))
        decay = ((1 + self.w_count) / (10 + self.w_count)).clamp(max=_W_MEAN_DECAY)
        self.w_mean.lerp_(mean, (1 - decay).to(mean.dtype))
        self.w_count.add_(1)

    @staticmethod
    def mix(ws: Tensor, others: Tensor, crossover: Tensor) -> Tensor:
        """Styles of two latents: layer i of image b has the other's from i = crossover[b] on.

        Args:
            ws, others: (B, L, D); dimensions of 1 are repeated.
            crossover: (B,), int64.
        """
        index = torch.arange(ws.shape[1], device=ws.device)
        return torch.where((index < crossover[:, None])[..., None], ws, others)

    def truncate(self, ws: Tensor, psi: float, layers: int | None = None) -> Tensor:
        """w_mean + psi (w - w_mean) in the first `layers` layers, by default all (appendix B)."""
        moved = self.w_mean + psi * (ws - self.w_mean)
        if layers is None:
            return moved
        kept = torch.arange(ws.shape[1], device=ws.device)[:, None] >= layers
        return torch.where(kept, ws, moved)

    def synthesize(
        self,
        ws: Tensor,
        *,
        level: int | None = None,
        alpha: float | Tensor | None = None,
        key: Tensor | None = None,
        noise: bool | Sequence[Tensor] = True,
    ) -> Tensor:
        """Images of styles ws (B, L, D), one for each layer up to the level; args as `forward`.

        Raises:
            ValueError: another number of layers or dimensions, or of noise inputs.
        """
        level, alpha = self._growth(level, alpha)
        layers = self.layers_at(level)
        _check.shape(ws, "ws", (len(ws), layers, self.latent_dim), "batch, layers, latent_dim")
        inputs = self._noise_inputs(noise, len(ws), level, key, ws.device)
        x = below = self.constant.to(ws.dtype).expand(len(ws), -1, -1, -1)
        for i, block in enumerate(self.blocks[: level + 1]):
            below = x
            x = block(x, ws[:, 2 * i : 2 * i + 2], (inputs[2 * i], inputs[2 * i + 1]))
        image = self.to_image[level](x)
        if level == 0 or not _is_blended(alpha):
            return image
        old = F.interpolate(self.to_image[level - 1](below), scale_factor=2.0)
        return _blend(old, image, alpha)

    def _noise_inputs(
        self,
        noise: bool | Sequence[Tensor],
        count: int,
        level: int,
        key: Tensor | None,
        device: torch.device,
    ) -> Sequence[Tensor | None]:
        """One for each layer up to the level, (B, 1, side, side)."""
        shapes = self.noise_shapes(level)
        if noise is False:
            return [None] * len(shapes)
        if noise is True:
            keys = fold_in(
                draw_key(device=device) if key is None else key,
                torch.arange(len(shapes), device=device),
            )
            return [ops.normal(k, (count, *shape)) for k, shape in zip(keys, shapes, strict=True)]
        if len(noise) != len(shapes):
            raise ValueError(f"noise must be {len(shapes)} tensors, got {len(noise)}")
        for given, shape in zip(noise, shapes, strict=True):
            _check.shape(given, "noise", (count, *shape), "batch, 1, side, side")
        return noise

    @torch.no_grad()
    def sample(
        self, num: int, *, psi: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw (num, channels, side, side) in [0, 1] at the level and alpha of `grow`.

        Raises:
            ValueError: `psi` is negative.
        """
        _check.non_negative(psi, "psi")
        device = self.constant.device
        z = torch.randn(num, self.latent_dim, device=device, generator=generator)
        key = draw_key(device=device, generator=generator)
        return to_unit(self(z, psi=psi, key=key))

    @torch.no_grad()
    def style_mixing(
        self, z: Tensor, others: Tensor, crossover: int, *, psi: float = 1.0
    ) -> Tensor:
        """Every z with the finer layers' styles, from `crossover` on, of every other.

        Without noise: what differs is of the styles alone (figure 3).

        Args:
            z, others: (N, D) and (M, D).
            crossover: first layer that takes the other's style.
            psi: of the truncation.

        Returns:
            (M, N, channels, side, side) in [0, 1].
        """
        coarse = z.repeat(len(others), 1)
        fine = others.repeat_interleave(len(z), 0)
        at = torch.full((len(coarse),), crossover, device=z.device)
        images = self(coarse, other=fine, crossover=at, psi=psi, noise=False)
        return to_unit(images).unflatten(0, (len(others), len(z)))


class DiscriminatorBlock(nn.Module):
    """x of a level -> x of the level below."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = EqualConv2d(channels, channels, 3)
        self.blur = Blur()
        self.down = EqualConv2d(channels, out_channels, 3, resample="down")

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, side, side) -> (B, out_channels, side / 2, side / 2)."""
        return leaky_relu(self.down(self.blur(leaky_relu(self.conv(x)))))


class StyleGANDiscriminator(nn.Module):
    """Images (B, channels, side, side) of any level -> scores (B,), without an activation.

    Args:
        resolution: side of the last level, a power of two.
        image_channels: of the images.
        channel_base, channel_max: see `channels_at`.
        group_size: of the minibatch standard deviation.

    Raises:
        ValueError: a size out of range.
    """

    def __init__(
        self,
        resolution: int,
        image_channels: int = 1,
        *,
        channel_base: int = 1024,
        channel_max: int = 96,
        group_size: int = 4,
    ) -> None:
        super().__init__()
        self.top = level_of(resolution)
        self.image_channels = image_channels
        widths = [channels_at(i, channel_base, channel_max) for i in range(self.top + 1)]
        self.from_image = nn.ModuleList(EqualConv2d(image_channels, n, 1) for n in widths)
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(width, below)
            for below, width in zip(widths[:-1], widths[1:], strict=True)
        )
        self.spread = MinibatchStd(group_size)
        self.conv = EqualConv2d(widths[0] + 1, widths[0], 3)
        self.hidden = EqualLinear(16 * widths[0], widths[0], gain=RELU_GAIN)
        self.score = EqualLinear(widths[0], 1)

    def parameters_at(self, level: int, *, fading: bool = True) -> Iterator[nn.Parameter]:
        """What images of `level` depend on, where alpha blends (`fading`) or not."""
        for module in (*self.blocks[:level], self.conv, self.hidden, self.score):
            yield from module.parameters()
        for module in self.from_image[max(level - fading, 0) : level + 1]:
            yield from module.parameters()

    def forward(self, images: Tensor, *, alpha: float | Tensor = 1.0) -> Tensor:
        """Images (B, channels, side, side), the side saying the level -> scores (B,).

        Args:
            images: about -1 to 1.
            alpha: how far the images' level is faded in; a tensor is always blended with.

        Raises:
            ValueError: images of another number of channels, or of a side that no level has.
        """
        level = level_of(images.shape[-1])
        _check.between(level, "level of the images", 0, self.top)
        side = images.shape[-1]
        shape = (len(images), self.image_channels, side, side)
        _check.shape(images, "images", shape, "batch, channels, side, side")
        x = self._enter(images, level)
        if level > 0:
            x = self.blocks[level - 1](x)
            if _is_blended(alpha):
                x = _blend(self._enter(F.avg_pool2d(images, 2), level - 1), x, alpha)
            for block in reversed(self.blocks[: level - 1]):
                x = block(x)
        x = leaky_relu(self.conv(self.spread(x)))
        return self.score(leaky_relu(self.hidden(x.flatten(1)))).squeeze(1)

    def _enter(self, images: Tensor, level: int) -> Tensor:
        return leaky_relu(self.from_image[level](images))


def to_unit(images: Tensor) -> Tensor:
    """Generated images, -1 to 1, as they are stored and drawn: in [0, 1]."""
    return (images.float() / 2 + 0.5).clamp(0, 1)


def fade_images(images: Tensor, alpha: float | Tensor) -> Tensor:
    """Real images (B, C, H, W) as sharp as generated ones: (1 - alpha) of them at half the side."""
    if not _is_blended(alpha):
        return images
    return _blend(F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0), images, alpha)


def _is_blended(alpha: float | Tensor) -> bool:
    return isinstance(alpha, Tensor) or alpha != 1


def _blend(old: Tensor, new: Tensor, alpha: float | Tensor) -> Tensor:
    weight = alpha.to(new.dtype) if isinstance(alpha, Tensor) else alpha
    return (1 - weight) * old + weight * new
