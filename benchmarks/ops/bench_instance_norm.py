"""instance_norm: reads x, writes y, weight and bias are negligible."""

import torch
from torch import Tensor

from benchmarks.case import BACKWARD, SECOND, Case, dtype_note
from fastgen import ops
from fastgen.ops.instance_norm import instance_norm_with_stats

MOMENTUM = 0.1


def _torch(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.instance_norm(x, weight=weight, bias=bias)


def _running(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """What fastgen.nn.InstanceNorm does in training with ``track_running_stats=True``."""
    y, mean, var = instance_norm_with_stats(x, weight, bias, backend=backend)
    size = x.shape[2:].numel()
    running_mean.lerp_(mean.mean(0).to(x.dtype), MOMENTUM)
    running_var.lerp_((var.mean(0) * (size / (size - 1))).to(x.dtype), MOMENTUM)
    return y


def _torch_running(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor
) -> Tensor:
    return torch.nn.functional.instance_norm(
        x, running_mean, running_var, weight, bias, momentum=MOMENTUM
    )


def _case(
    *shape: int,
    kind: str = "",
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    more: tuple[str, ...] = (),
) -> Case:
    """`kind` is "" for weight and bias, "plain" for neither, "running" for statistics as well."""
    channels = shape[1]
    plane_bytes = dtype.itemsize * torch.Size(shape).numel()

    def make() -> tuple[Tensor, ...]:
        x = torch.randn(shape, dtype=dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        count = {"plain": 0, "": 2, "running": 4}[kind]
        return x, *(torch.ones(channels, dtype=dtype) for _ in range(count))

    notes = [kind] * bool(kind) + ["channels_last"] * channels_last + dtype_note(dtype)
    return Case(
        op="instance_norm",
        size=" ".join(["x".join(map(str, shape)), *notes]),
        make=make,
        call=_running if kind == "running" else ops.instance_norm,
        grad=(0,) if kind == "plain" else (0, 1, 2),
        bytes=2 * plane_bytes,
        flops=6 * torch.Size(shape).numel(),
        # x and the cotangent in, the gradient of x out.
        bytes_backward=3 * plane_bytes,
        flops_backward=9 * torch.Size(shape).numel(),
        # x, the cotangent and that of the gradient in, the gradients of the first two out.
        bytes_second=5 * plane_bytes,
        more=more,
        peers={"torch": _torch_running if kind == "running" else _torch},
    )


CASES = [
    _case(8, 128, 128, 128),
    _case(8, 128, 128, 128, kind="plain"),
    _case(8, 128, 128, 128, kind="running"),
    _case(8, 128, 128, 128, channels_last=True),
    _case(4, 32, 512, 512),
    _case(4, 32, 512, 512, channels_last=True),
    _case(1, 64, 512, 512),
    _case(2, 32, 64, 64, 64),
    _case(8, 64, 16, 16),
]

# What a call costs.
CASES += [_case(16, 8, 4, 4), _case(16, 64, 4, 4), _case(16, 64, 8, 8)]

GPU_CASES = [
    _case(32, 256, 56, 56, dtype=torch.float16, more=(BACKWARD, SECOND)),
    _case(16, 512, 128, 128, dtype=torch.float16, more=(BACKWARD, SECOND)),
    _case(8, 64, 512, 512, channels_last=True),
    _case(2, 32, 128, 128, 128),
]
