"""affine_coupling: reads x, raw_scale and shift, writes y; log_det is negligible."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.flow_peers import affine_peers
from benchmarks.harness import Case
from fastgen import ops


def _case(batch: int, size: int, scale: str = "tanh") -> Case:
    def make(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, size, dtype=dtype) for _ in range(3))

    return Case(
        op="affine_coupling",
        size=f"{batch}x{size}{'' if scale == 'tanh' else f' {scale}'}",
        make=partial(make, batch, torch.float32),
        call=partial(ops.affine_coupling, scale=scale),
        grad=(0, 1, 2),
        bytes=4 * 4 * batch * size,
        flops=5 * batch * size,
        # x, raw_scale and the cotangent in, two gradients out: that of shift is the cotangent.
        bytes_backward=5 * 4 * batch * size,
        flops_backward=8 * batch * size,
        # The form of Glow, the one scale that every library has.
        peers=affine_peers() if scale == "sigmoid" else {},
        small=partial(make, 16, torch.float64),
    )


CASES = [
    _case(65536, 64),
    _case(65536, 64, "sigmoid"),
    _case(1024, 3072),
    _case(65536, 2),
    _case(1023, 37),
    _case(16, 64),
]


def _torch(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    log_s = torch.tanh(raw_scale)
    return x * torch.exp(log_s) + shift, log_s.sum(1)


# What a call costs.
CASES += [replace(_case(16, size), peers={"torch": _torch}) for size in (2, 32)]
