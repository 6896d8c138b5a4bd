"""Likelihoods as they are reported."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def bits_per_dim(nats: float, shape: Sequence[int]) -> float:
    """Nats a sample of `shape` -> bits a dimension.

    Comparable with papers only for a probability mass of the stored values, or a density scaled to
    the size of their bins: a density p of images in [0, 1] with 256 levels has to be taken as
    p / 256^D first, D log 256 nats more.
    """
    return nats / (math.log(2) * math.prod(shape))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of (N,) values, and the standard error of that mean, NaN for a single value.

    Raises:
        ValueError: no values.
    """
    if not values.numel():
        raise ValueError("values must not be empty")
    values = values.double()
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(math.nan)
    return values.mean().item(), error.item()
