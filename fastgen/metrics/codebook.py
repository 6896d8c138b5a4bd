"""How much of a codebook a quantizer uses.

Both measures take a histogram, so that one can be gathered over any interval: sum or average the
histograms first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def code_histogram(codes: Tensor, num_codes: int) -> Tensor:
    """Share of each code among `codes`.

    Args:
        codes: integer tensor of any shape, values in [0, num_codes).
        num_codes: codebook size K.

    Returns:
        float32 (K,), summing to 1 (all zeros when `codes` is empty).

    Raises:
        TypeError: `codes` is not an integer tensor.
    """
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise TypeError(f"codes must be integers, got {codes.dtype}")
    counts = torch.bincount(codes.flatten(), minlength=num_codes)
    return counts.float() / max(codes.numel(), 1)


def codebook_usage(histogram: Tensor) -> Tensor:
    """Share of the codes that occur at all: histogram (K,) -> scalar in [0, 1]."""
    return (histogram > 0).float().mean()


def codebook_perplexity(histogram: Tensor) -> Tensor:
    """exp of the histogram's entropy: histogram (K,) -> scalar in [1, K]."""
    share = histogram / histogram.sum()
    return torch.exp(-torch.xlogy(share, share).sum())
