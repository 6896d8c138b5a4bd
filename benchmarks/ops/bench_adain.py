"""adain: reads x, writes y, scale and shift are negligible; the peer is torch's own normalisation
followed by the same affine map."""

import torch
from torch import Tensor

from benchmarks.case import BACKWARD, SECOND, Case, dtype_note
from fastgen import ops


def _torch(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    per_plane = (*x.shape[:2], *(1,) * (x.dim() - 2))
    return torch.nn.functional.instance_norm(x) * scale.view(per_plane) + shift.view(per_plane)


def _case(
    batch: int,
    channels: int,
    *spatial: int,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    more: tuple[str, ...] = (),
) -> Case:
    shape = (batch, channels, *spatial)

    def make() -> tuple[Tensor, ...]:
        x = torch.randn(shape, dtype=dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return (
            x,
            torch.randn(batch, channels, dtype=dtype),
            torch.randn(batch, channels, dtype=dtype),
        )

    notes = ["channels_last"] * channels_last + dtype_note(dtype)
    plane_bytes = dtype.itemsize * torch.Size(shape).numel()
    return Case(
        op="adain",
        size=" ".join(["x".join(map(str, shape)), *notes]),
        make=make,
        call=ops.adain,
        grad=(0, 1, 2),
        bytes=2 * plane_bytes,
        flops=6 * torch.Size(shape).numel(),
        # x and the cotangent in, the gradient of x out.
        bytes_backward=3 * plane_bytes,
        flops_backward=9 * torch.Size(shape).numel(),
        # x, the cotangent and that of the gradient in, the gradients of the first two out.
        bytes_second=5 * plane_bytes,
        more=more,
        peers={"torch": _torch},
    )


CASES = [
    _case(8, 128, 128, 128),
    _case(8, 128, 128, 128, channels_last=True),
    _case(8, 128, 128, 128, dtype=torch.bfloat16),
    _case(4, 32, 512, 512),
    _case(4, 32, 512, 512, channels_last=True),
    _case(8, 512, 4, 4),
]

# What a call costs.
CASES += [_case(16, c, n, n) for c, n in ((8, 4), (64, 4), (512, 4), (64, 8))]

GPU_CASES = [
    _case(*shape, dtype=dtype, channels_last=channels_last, more=(BACKWARD, SECOND))
    for shape in ((32, 256, 56, 56), (16, 512, 128, 128))
    for dtype, channels_last in (
        (torch.float16, False),
        (torch.float16, True),
        (torch.float32, False),
    )
]
