"""instance_norm: reads x, writes y, weight and bias are negligible."""

import torch

from benchmarks.harness import Case
from fastgen import ops


def _torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.instance_norm(x, weight=weight, bias=bias)


def _case(batch: int, channels: int, *spatial: int) -> Case:
    shape = (batch, channels, *spatial)
    return Case(
        op="instance_norm",
        size="x".join(map(str, shape)),
        make=lambda: (torch.randn(shape), torch.randn(channels), torch.randn(channels)),
        call=ops.instance_norm,
        grad=(0, 1, 2),
        bytes=2 * 4 * torch.Size(shape).numel(),
        flops=6 * torch.Size(shape).numel(),
        # x and the cotangent in, the gradient of x out.
        bytes_backward=3 * 4 * torch.Size(shape).numel(),
        flops_backward=9 * torch.Size(shape).numel(),
        peers={"torch": _torch},
    )


CASES = [
    _case(8, 128, 128, 128),
    _case(1, 64, 512, 512),
    _case(2, 32, 64, 64, 64),
    _case(8, 64, 16, 16),
]

# What a call costs.
CASES += [_case(16, 8, 4, 4), _case(16, 64, 4, 4), _case(16, 64, 8, 8)]
