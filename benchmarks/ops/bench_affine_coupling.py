"""affine_coupling: reads x, raw_scale and shift, writes y; log_det is negligible."""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness import Case
from fastgen import ops


def _case(batch: int, size: int) -> Case:
    return Case(
        op="affine_coupling",
        size=f"{batch}x{size}",
        make=lambda: tuple(torch.randn(batch, size) for _ in range(3)),
        call=ops.affine_coupling,
        grad=(0, 1, 2),
        bytes=4 * 4 * batch * size,
    )


CASES = [
    _case(65536, 64),
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
