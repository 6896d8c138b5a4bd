"""Precision, recall, density and coverage of samples, by balls around their nearest neighbours.

With NND_k(x) the distance of a point to its k-th nearest neighbour in its own set:

- precision: share of the fakes that lie in a ball (x, NND_k(x)) of some real x;
- recall: share of the reals that lie in a ball of some fake
  (Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models",
  2019, eq. 1 and 2);
- density: in how many balls of reals a fake lies, on average, over k; can exceed 1;
- coverage: share of the reals whose ball holds a fake
  (Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020, eq. 4, 5).

Distances are taken between `chunk` rows and all others at a time: memory is chunk * N, not N * N.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class PRDC(NamedTuple):
    """precision, recall, coverage in [0, 1]; density >= 0."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(
    real: Tensor, fake: Tensor, *, neighbours: int = 5, chunk: int = 1000
) -> PRDC:
    """Compare features of real and of generated images.

    Args:
        real: (N, D).
        fake: (M, D).
        neighbours: k.
        chunk: rows whose distances are held at once.

    Raises:
        ValueError: shapes that do not fit, or as few as k samples in a set.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D), got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    if not 1 <= neighbours < min(len(real), len(fake)):
        raise ValueError(
            f"neighbours must be in [1, {min(len(real), len(fake)) - 1}] for {len(real)} and "
            f"{len(fake)} samples, got {neighbours}"
        )
    # Distances do not depend on the origin; about the middle the squares lose the fewest digits.
    centre = real.double().mean(0)
    real, fake = real.double() - centre, fake.double() - centre
    real_radius = _radii(real, neighbours, chunk)
    fake_radius = _radii(fake, neighbours, chunk)
    inside = torch.zeros(len(fake), dtype=torch.int64)
    recalled, covered = 0, 0
    for rows, squares in _squares(real, fake, chunk):
        in_real_ball = squares <= real_radius[rows, None]
        inside += in_real_ball.sum(0).cpu()
        covered += int(in_real_ball.any(1).sum())
        recalled += int((squares <= fake_radius).any(1).sum())
    return PRDC(
        precision=(inside > 0).double().mean().item(),
        recall=recalled / len(real),
        density=inside.double().mean().item() / neighbours,
        coverage=covered / len(real),
    )


def _radii(points: Tensor, neighbours: int, chunk: int) -> Tensor:
    """Squared distance of each point to its k-th nearest other point: (N,)."""
    found = []
    for rows, squares in _squares(points, points, chunk):
        own = torch.arange(len(points), device=points.device)[rows]
        squares[torch.arange(len(own)), own] = torch.inf
        found.append(squares.kthvalue(neighbours, 1).values)
    return torch.cat(found)


def _squares(first: Tensor, second: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, squared distances (chunk, M)), all rows of `first` in turn."""
    norms = second.square().sum(1)
    for start in range(0, len(first), chunk):
        part = first[start : start + chunk]
        squares = part.square().sum(1, keepdim=True) + norms - 2 * (part @ second.T)
        yield slice(start, start + chunk), squares.clamp(min=0)
