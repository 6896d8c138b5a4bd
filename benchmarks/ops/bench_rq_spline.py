"""rq_spline: reads x and 3K - 1 parameters an element, writes y and log_det."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, dtype_note
from benchmarks.flow_peers import spline_peers
from fastgen import ops


def _case(
    batch: int,
    size: int,
    bins: int,
    *,
    inverse: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    def make(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = 1.5 * torch.randn(batch, size, dtype=dtype)
        return x, *(torch.randn(batch, size, k, dtype=dtype) for k in (bins, bins, bins - 1))

    parameters = 3 * bins - 1
    return Case(
        op="rq_spline",
        size=" ".join([f"{batch}x{size} K={bins}", *["inverse"] * inverse, *dtype_note(dtype)]),
        make=partial(make, batch, dtype),
        call=partial(ops.rq_spline, inverse=inverse),
        grad=(0, 1, 2, 3),
        bytes=dtype.itemsize * batch * size * (parameters + 3),
        flops=batch * size * (10 * bins + 40),
        # x, the parameters and two cotangents in, the gradients of x and the parameters out.
        bytes_backward=dtype.itemsize * batch * size * (2 * parameters + 4),
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

GPU_CASES = [
    _case(32768, 32, 8),
    _case(32768, 32, 8, inverse=True),
    _case(32768, 32, 8, dtype=torch.bfloat16),
    _case(32768, 32, 32),
]
