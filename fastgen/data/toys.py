"""Densities in the plane whose log-density is known, to judge a density model by.

The samplers are those of Grathwohl et al. 2019, "FFJORD", section 4.1 (rings, moons, checkerboard,
8 Gaussians). Entropies are in nats:

| name              | density                                                      | entropy  |
|-------------------|--------------------------------------------------------------|----------|
| `eight-gaussians` | 8 Gaussians of scale 0.354 on a circle of radius 2.83        | 2.831880 |
| `moons`           | two half circles of radius 2, Gaussian noise of scale 0.2    | 2.393879 |
| `checkerboard`    | uniform on the 8 black 2 x 2 squares of a board on [-4, 4]^2 | log 32   |
| `rings`           | 4 circles of radius 0.75 to 3, Gaussian noise of scale 0.08  | 2.623183 |

That of the checkerboard is exact; the others are integrals of -p log p over a fine grid, whose
error is below the digits given (`tests/data/test_toys.py` integrates again).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastgen.data.images import DataError

#: Half the side of the square around 0 that holds all but 1e-8 of any of the densities.
TOY_EXTENT = 5.0

_CHUNK = 16_384
_SEED = 20260102
_SPLIT_SIZES = {"train": 500_000, "valid": 20_000, "test": 100_000}


@dataclass(frozen=True)
class ToyDensity:
    """A density in the plane.

    Attributes:
        name: as in the table above.
        entropy: differential entropy in nats: no model's expected negative log likelihood is less.
        draw: (number, generator) -> points (N, 2), float64.
        log_density: points (N, 2), float64 -> log p (N,).
    """

    name: str
    entropy: float
    draw: Callable[[int, torch.Generator], Tensor]
    log_density: Callable[[Tensor], Tensor]

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Points (num, 2), float32, from a generator on the CPU."""
        return self.draw(num, generator).float()

    def log_prob(self, points: Tensor) -> Tensor:
        """Points (N, 2) -> log p(x) in nats (N,), float64; -inf off the support.

        Raises:
            ValueError: another shape.
        """
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"points must be (N, 2), got {tuple(points.shape)}")
        return torch.cat([self.log_density(part) for part in points.double().split(_CHUNK)])


@dataclass
class PointSplit:
    """Points (N, D), float32."""

    points: Tensor

    def __len__(self) -> int:
        return len(self.points)


@dataclass
class PointDataset:
    """Points drawn from a toy density: training, validation and test splits."""

    name: str
    train: PointSplit
    valid: PointSplit
    test: PointSplit
    density: ToyDensity


def load_toy(name: str) -> PointDataset:
    """500,000 training, 20,000 validation and 100,000 test points, always the same.

    Raises:
        DataError: unknown name.
    """
    if name not in TOYS:
        raise DataError(f"toy density {name!r} is not known; known: {', '.join(TOYS)}")
    generator = torch.Generator().manual_seed(_SEED)
    splits = {
        split: PointSplit(TOYS[name].sample(size, generator))
        for split, size in _SPLIT_SIZES.items()
    }
    return PointDataset(name, **splits, density=TOYS[name])


def _normal(num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num, 2, generator=generator, dtype=torch.float64)


def _uniform(num: int, generator: torch.Generator) -> Tensor:
    return torch.rand(num, generator=generator, dtype=torch.float64)


def _choice(count: int, num: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (num,), generator=generator)


def _on_circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)


def _log_mixture(points: Tensor, centres: Tensor, log_weights: Tensor, scale: float) -> Tensor:
    """log of a mixture of round Gaussians: points (N, 2), centres (M, 2), log_weights (M,)."""
    squares = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
    log_norm = math.log(2 * math.pi * scale**2)
    return torch.logsumexp(log_weights - squares / (2 * scale**2), -1) - log_norm


_GAUSSIANS_SCALE = 0.5 / 1.414
_GAUSSIANS_CENTRES = 4 / 1.414 * _on_circle(torch.arange(8, dtype=torch.float64) * math.pi / 4)


def _draw_eight_gaussians(num: int, generator: torch.Generator) -> Tensor:
    centres = _GAUSSIANS_CENTRES[_choice(8, num, generator)]
    return centres + _GAUSSIANS_SCALE * _normal(num, generator)


def _log_eight_gaussians(points: Tensor) -> Tensor:
    log_weights = torch.full((8,), -math.log(8), dtype=torch.float64)
    return _log_mixture(points, _GAUSSIANS_CENTRES, log_weights, _GAUSSIANS_SCALE)


_MOONS_SCALE = 0.2
_MOONS_SHIFT = torch.tensor([-1.0, -0.2], dtype=torch.float64)


def _moon(angle: Tensor, which: Tensor) -> Tensor:
    """The noiseless point at an angle in [0, pi] of the upper (0) or the lower (1) moon."""
    upper = _on_circle(angle)
    lower = torch.tensor([1.0, 0.5], dtype=torch.float64) - upper
    return 2 * torch.where(which[..., None] == 0, upper, lower) + _MOONS_SHIFT


def _draw_moons(num: int, generator: torch.Generator) -> Tensor:
    angle = math.pi * _uniform(num, generator)
    clean = _moon(angle, _choice(2, num, generator))
    return clean + _MOONS_SCALE * _normal(num, generator)


@cache
def _moons_quadrature() -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and log-weights on the two arcs; with 96 an arc the rest is < 1e-12."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(96))
    angle = math.pi * (nodes + 1) / 2
    which = torch.arange(2)[:, None].expand(2, len(nodes))
    centres = _moon(angle.expand(2, -1), which).flatten(0, 1)
    return centres, (weights / 4).log().repeat(2)


def _log_moons(points: Tensor) -> Tensor:
    return _log_mixture(points, *_moons_quadrature(), _MOONS_SCALE)


def _draw_checkerboard(num: int, generator: torch.Generator) -> Tensor:
    x = 4 * _uniform(num, generator) - 2
    y = _uniform(num, generator) - 2 * _choice(2, num, generator) + x.floor() % 2
    return 2 * torch.stack([x, y], -1)


def _log_checkerboard(points: Tensor) -> Tensor:
    column, row = (points / 2).floor().unbind(-1)
    black = ((column + row) % 2 == 0) & (points.abs() <= 4).all(-1)
    return torch.full_like(row, -math.log(32)).masked_fill(~black, -math.inf)


_RINGS_SCALE = 0.08
_RINGS_RADII = 3 * torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)


def _draw_rings(num: int, generator: torch.Generator) -> Tensor:
    radius = _RINGS_RADII[_choice(4, num, generator)]
    clean = radius[:, None] * _on_circle(2 * math.pi * _uniform(num, generator))
    return clean + _RINGS_SCALE * _normal(num, generator)


def _log_rings(points: Tensor) -> Tensor:
    """The Gaussian averaged over a circle of radius r, at distance d: a Bessel function of d r."""
    variance = _RINGS_SCALE**2
    distance = points.norm(dim=-1, keepdim=True)
    bessel = torch.special.i0e(distance * _RINGS_RADII / variance).log()
    log_each = bessel - (distance - _RINGS_RADII).square() / (2 * variance)
    return torch.logsumexp(log_each, -1) - math.log(4 * 2 * math.pi * variance)


TOYS: dict[str, ToyDensity] = {
    density.name: density
    for density in (
        ToyDensity("eight-gaussians", 2.831880, _draw_eight_gaussians, _log_eight_gaussians),
        ToyDensity("moons", 2.393879, _draw_moons, _log_moons),
        ToyDensity("checkerboard", math.log(32), _draw_checkerboard, _log_checkerboard),
        ToyDensity("rings", 2.623183, _draw_rings, _log_rings),
    )
}
