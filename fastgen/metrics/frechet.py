"""Frechet distance between two sets of features, as if both were Gaussian.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

(Heusel et al., "GANs trained by a two time-scale update rule", 2017, eq. 6: with Inception features
it is FID.) The last trace is the sum of the singular values of S1^(1/2) S2^(1/2), whose roots are
symmetric and exist for singular covariances too: there may be fewer samples than features. Nothing
is complex, and no square root of a product is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class FeatureMoments:
    """Count, mean (D,) and scatter sum (x - mean)(x - mean)^T (D, D) of features, in float64."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureMoments:
        """The moments of features (N, D).

        Raises:
            ValueError: another shape, or no rows.
        """
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features must be (N >= 1, D), got {tuple(features.shape)}")
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Those of both sets together (Chan, Golub and LeVeque 1979): parts of any size add up."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        outer = torch.outer(shift, shift) * (self.count * other.count / count)
        return FeatureMoments(count, mean, self.scatter + other.scatter + outer)

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (D, D).

        Raises:
            ValueError: a single sample has none.
        """
        if self.count < 2:
            raise ValueError("a covariance needs at least 2 samples, got 1")
        return self.scatter / (self.count - 1)


def frechet_distance(first: Tensor | FeatureMoments, second: Tensor | FeatureMoments) -> float:
    """d^2 between two sets of features (N, D), or their moments.

    Raises:
        ValueError: different D, or fewer than 2 samples.
    """
    a, b = (x if isinstance(x, FeatureMoments) else FeatureMoments.of(x) for x in (first, second))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features must have one dimension, got {len(a.mean)} and {len(b.mean)}")
    roots = _root(a.covariance), _root(b.covariance)
    overlap = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * overlap
    return max(distance.item(), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root; eigenvalues below rounding error are zero."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return (vectors * values.where(values > noise, 0).sqrt()) @ vectors.T
