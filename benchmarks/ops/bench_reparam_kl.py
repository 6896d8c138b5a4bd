"""reparam_kl: reads mu and logvar, writes z; kl is negligible. Noise is made from a drawn key.

The reference makes the same noise as the kernels, which plain PyTorch is slow at. What people write
instead, with torch.randn_like, is the peer "torch"; compiled, "torch randn compiled".
"""

import torch
from torch import Tensor

from benchmarks.case import BACKWARD, Case, dtype_note
from fastgen import ops


def eager(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The usual way to write it."""
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    kl = -0.5 * torch.sum(1 + logvar - mu.square() - logvar.exp(), dim=1)
    return z, kl


def _case(
    batch: int, size: int, dtype: torch.dtype = torch.float32, more: tuple[str, ...] = ()
) -> Case:
    return Case(
        op="reparam_kl",
        size=" ".join([f"{batch}x{size}", *dtype_note(dtype)]),
        make=lambda: tuple(torch.randn(batch, size, dtype=dtype) for _ in range(2)),
        call=ops.reparam_kl,
        grad=(0, 1),
        bytes=3 * dtype.itemsize * batch * size,
        # What is done in floats; the words of Philox are integers.
        flops=14 * batch * size,
        # mu, logvar and the cotangent of z in, two gradients out; noise is made again.
        bytes_backward=5 * dtype.itemsize * batch * size,
        flops_backward=16 * batch * size,
        more=more,
        peers={"torch": eager, "torch randn compiled": torch.compile(eager)},
    )


CASES = [_case(64, 65536), _case(4096, 256), _case(65536, 16), _case(65536, 10), _case(64, 20)]

# What a call costs.
CASES += [_case(16, 20), _case(16, 256)]

GPU_CASES = [_case(65536, 4096, dtype, (BACKWARD,)) for dtype in (torch.float32, torch.bfloat16)]
GPU_CASES += [_case(2**20, 32), _case(4096, 256)]
