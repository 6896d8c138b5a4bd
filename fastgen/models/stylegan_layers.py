"""Layers of StyleGAN: learning rates made equal, blurred resampling, styles, spread of a batch.

Weights are drawn from N(0, 1) and scaled in every forward pass, so that Adam, whose steps do not
depend on the scale of gradients, moves all layers at one relative speed (Karras, Aila, Laine,
Lehtinen, "Progressive Growing of GANs", 2018, arXiv 1710.10196, section 4.1).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen import ops
from fastgen.ops import _check

Resample = Literal["none", "up", "down"]

#: He's gain for the leaky rectifier, as the paper's code has it.
RELU_GAIN = math.sqrt(2)
_SLOPE = 0.2
#: Below every spread that an image's features have: planes keep their contrast.
_STYLE_EPS = 1e-8


def leaky_relu(x: Tensor) -> Tensor:
    """The activation of both networks; overwrites x, which nothing else may need.

    Its gradient asks for the sign of the result, which the next layer keeps anyway, and not for x.
    """
    return F.leaky_relu(x, _SLOPE, inplace=True)


class EqualLinear(nn.Module):
    """x (..., I) -> (..., O) with weights gain / sqrt(I) N(0, 1).

    Args:
        in_features, out_features: I and O.
        gain: of the activation that follows.
        lr_multiplier: relative speed of learning; the initial function does not depend on it.
        bias: initial value of the bias.

    Raises:
        ValueError: `lr_multiplier` is not positive, or a size below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        gain: float = 1.0,
        lr_multiplier: float = 1.0,
        bias: float = 0.0,
    ) -> None:
        super().__init__()
        _check.positive(lr_multiplier, "lr_multiplier")
        _check.positive_int(in_features, "in_features")
        _check.positive_int(out_features, "out_features")
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias / lr_multiplier))
        self.weight_scale = gain / math.sqrt(in_features) * lr_multiplier
        self.bias_scale = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        return F.linear(x, self.weight * self.weight_scale, self.bias * self.bias_scale)


class EqualConv2d(nn.Module):
    """x (B, I, H, W) -> (B, O, H', W') with weights gain / sqrt(I k k) N(0, 1), zeros outside.

    With "up" the sides are doubled by repeating pixels before the convolution, with "down" halved
    by averages of 2x2 after it. Either is one strided convolution with a kernel one larger, of less
    than half the multiplications.

    Args:
        in_channels, out_channels: I and O.
        kernel_size: k, odd.
        gain: of the activation that follows.
        resample: "none", "up" or "down".
        bias: whether there is one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        gain: float = RELU_GAIN,
        resample: Resample = "none",
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check.positive_int(in_channels, "in_channels")
        _check.positive_int(out_channels, "out_channels")
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = gain / (kernel_size * math.sqrt(in_channels))
        self.padding = kernel_size // 2
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """x (B, I, H, W) -> (B, O, H', W')."""
        weight = self.weight * self.scale
        if self.resample == "none":
            return F.conv2d(x, weight, self.bias, padding=self.padding)
        weight = _spread(weight)
        if self.resample == "down":
            return F.conv2d(x, weight / 4, self.bias, stride=2, padding=self.padding)
        # the transpose correlates with the kernel turned round
        turned = weight.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, turned, self.bias, stride=2, padding=self.padding)


def _spread(weight: Tensor) -> Tensor:
    """The kernel followed by a sum of 2x2: (O, I, k, k) -> (O, I, k + 1, k + 1)."""
    padded = F.pad(weight, (1, 1, 1, 1))
    rows = padded[:, :, 1:] + padded[:, :, :-1]
    return rows[:, :, :, 1:] + rows[:, :, :, :-1]


class Blur(nn.Module):
    """Each plane of x (B, C, H, W) with [1, 2, 1] / 4 along both sides, zeros outside."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), and the result as x."""
        # no buffer: DistributedDataParallel writes buffers between two forward passes
        row = x.new_full((3,), 0.25)
        row[1] = 0.5
        kernel = torch.outer(row, row).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


class StyledLayer(nn.Module):
    """Noise, bias, activation, then AdaIN with a learned map of w (Karras et al. 2019, figure 1b).

    Args:
        channels: C.
        style_dim: D.
    """

    def __init__(self, channels: int, style_dim: int) -> None:
        super().__init__()
        self.noise_strength = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.style = EqualLinear(style_dim, 2 * channels)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x (B, C, H, W) and styles w (B, D) -> as x.

        Args:
            x: (B, C, H, W).
            w: (B, D).
            noise: (B, 1, H, W), one plane per image for all channels; None for no noise.
        """
        if noise is not None:
            x = x + noise.to(x.dtype) * _per_channel(self.noise_strength, x)
        x = leaky_relu(x + _per_channel(self.bias, x))
        scale, shift = self.style(w).chunk(2, 1)
        return ops.adain(x, 1 + scale, shift, eps=_STYLE_EPS)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype)[:, None, None]


class MinibatchStd(nn.Module):
    """Adds a plane that says how much a group of images varies (Karras et al. 2018, section 3).

    The standard deviation of every feature over the group, averaged over all features: one number
    a group. Image i is in group i // G, so that
    images of whole groups are the same in a part of the batch.

    Args:
        group_size: G; the whole batch where that is smaller.
    """

    def __init__(self, group_size: int = 4) -> None:
        super().__init__()
        _check.positive_int(group_size, "group_size")
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C + 1, H, W).

        Raises:
            ValueError: B is not a multiple of the group size.
        """
        size = min(self.group_size, len(x))
        if len(x) % size:
            raise ValueError(
                f"the batch must be a multiple of the group size {size}, got {len(x)} images"
            )
        # a batch at bfloat16 would vary by its rounding
        groups = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        groups = groups.unflatten(0, (-1, size))
        # 1e-8: the root has no gradient at 0
        spread = (groups.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
        plane = spread.repeat_interleave(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return torch.cat([x, plane.to(x.dtype)], 1)
