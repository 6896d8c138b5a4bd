"""rq_spline: reads x and 3K - 1 parameters an element, writes y and log_det."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case
from fastgen import ops


def _nflows(inverse: bool, *tensors: Tensor) -> Any:
    from nflows.transforms.splines.rational_quadratic import (
        unconstrained_rational_quadratic_spline,
    )

    return unconstrained_rational_quadratic_spline(*tensors, inverse=inverse, tail_bound=3.0)


def _case(batch: int, size: int, bins: int, *, inverse: bool = False) -> Case:
    def make() -> tuple[Tensor, ...]:
        raw = (torch.randn(batch, size, k) for k in (bins, bins, bins - 1))
        return 1.5 * torch.randn(batch, size), *raw

    return Case(
        op="rq_spline",
        size=f"{batch}x{size} K={bins}{' inverse' if inverse else ''}",
        make=make,
        call=partial(ops.rq_spline, inverse=inverse),
        grad=(0, 1, 2, 3),
        bytes=4 * batch * size * (3 * bins - 1 + 3),
        peers={"nflows": partial(_nflows, inverse)},
    )


CASES = [
    _case(65536, 32, 8),
    _case(65536, 32, 8, inverse=True),
    _case(4096, 64, 4),
    _case(4096, 64, 16),
    _case(4096, 64, 32),
    _case(16, 32, 8),
]

# What a call costs.
CASES += [_case(16, 2, 8)]
