"""rq_spline: reads x and 3K - 1 parameters an element, writes y and log_det."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.flow_peers import spline_peers
from benchmarks.harness import Case
from fastgen import ops


def _case(batch: int, size: int, bins: int, *, inverse: bool = False) -> Case:
    def make(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = 1.5 * torch.randn(batch, size, dtype=dtype)
        return x, *(torch.randn(batch, size, k, dtype=dtype) for k in (bins, bins, bins - 1))

    parameters = 3 * bins - 1
    return Case(
        op="rq_spline",
        size=f"{batch}x{size} K={bins}{' inverse' if inverse else ''}",
        make=partial(make, batch, torch.float32),
        call=partial(ops.rq_spline, inverse=inverse),
        grad=(0, 1, 2, 3),
        bytes=4 * batch * size * (parameters + 3),
        flops=batch * size * (10 * bins + 40),
        # x, the parameters and two cotangents in, the gradients of x and the parameters out.
        bytes_backward=4 * batch * size * (2 * parameters + 4),
        flops_backward=batch * size * (20 * bins + 80),
        peers=spline_peers(inverse),
        small=partial(make, 16, torch.float64),
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
