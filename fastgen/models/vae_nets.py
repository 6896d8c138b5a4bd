"""Encoders and decoders of a VAE.

An encoder maps images (B, C, H, W) to means and log-variances (B, 2 D); a decoder maps latents
(N, D) to the parameters of a likelihood, (N, out_channels, H, W).
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from fastgen.nn import Dropout

ImageShape = tuple[int, int, int]


def mlp(
    image_shape: ImageShape,
    latent_dim: int,
    out_channels: int,
    *,
    width: int = 500,
    layers: int = 2,
    dropout: float = 0.0,
) -> tuple[nn.Module, nn.Module]:
    """Perceptrons: (encoder, decoder).

    Args:
        image_shape: (C, H, W).
        latent_dim: D.
        out_channels: channels of the decoder's output.
        width: of the hidden layers.
        layers: hidden layers in each.
        dropout: probability, in the encoder.
    """
    out_shape = (out_channels, *image_shape[1:])
    hidden = [width] * layers
    encoder = nn.Sequential(
        nn.Flatten(),
        *_hidden([math.prod(image_shape), *hidden], dropout),
        nn.Linear(width if layers else math.prod(image_shape), 2 * latent_dim),
    )
    decoder = nn.Sequential(
        *_hidden([latent_dim, *hidden], 0.0),
        nn.Linear(width if layers else latent_dim, math.prod(out_shape)),
        nn.Unflatten(1, out_shape),
    )
    return encoder, decoder


def convolutional(
    image_shape: ImageShape,
    latent_dim: int,
    out_channels: int,
    *,
    width: int = 256,
    layers: int = 2,
    dropout: float = 0.0,
) -> tuple[nn.Module, nn.Module]:
    """Convolutions that halve the sides, a hidden layer, and the mirror of both.

    Args:
        image_shape: (C, H, W); H and W divisible by 2**layers.
        latent_dim: D.
        out_channels: channels of the decoder's output.
        width: of the hidden layer; the first halving has width / 16 channels.
        layers: halvings; each doubles the channels.
        dropout: probability, before the encoder's hidden layer.

    Raises:
        ValueError: a side that the halvings do not divide, or a width below 16.
    """
    image_channels, height, rows = image_shape
    if layers < 1 or height % 2**layers or rows % 2**layers:
        raise ValueError(
            f"layers must halve the sides of a {height}x{rows} image evenly, got {layers}"
        )
    if width < 16:
        raise ValueError(f"width must be at least 16, got {width}")
    widths = [width // 16 << i for i in range(layers)]
    grid = (widths[-1], height >> layers, rows >> layers)
    down = [nn.Conv2d(a, b, 4, 2, 1) for a, b in pairwise([image_channels, *widths])]
    up = [nn.ConvTranspose2d(b, a, 4, 2, 1) for a, b in pairwise([out_channels, *widths])]
    encoder = nn.Sequential(
        *_with_relu(down),
        nn.Flatten(),
        *_hidden([math.prod(grid), width], dropout),
        nn.Linear(width, 2 * latent_dim),
    )
    decoder = nn.Sequential(
        *_hidden([latent_dim, width, math.prod(grid)], 0.0),
        nn.Unflatten(1, grid),
        *_with_relu(up[::-1])[:-1],
    )
    return encoder, decoder


def _hidden(sizes: list[int], dropout: float) -> list[nn.Module]:
    linears = [nn.Linear(before, after) for before, after in pairwise(sizes)]
    if not dropout:
        return _with_relu(linears)
    return [part for linear in linears for part in (linear, nn.ReLU(), Dropout(dropout))]


def _with_relu(layers: list) -> list[nn.Module]:
    return [part for layer in layers for part in (layer, nn.ReLU())]
