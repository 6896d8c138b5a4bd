"""affine_coupling: reads x, raw_scale and shift, writes y; log_det is negligible."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import BACKWARD, COPY_ALL, Case, Provider, dtype_note
from benchmarks.flow_peers import LEAST, affine_peers, floored_affine_peers
from fastgen import ops
from fastgen.ops.affine_coupling import FLOORED, SCALES

# As many bytes as the forward reads and writes, twice those of x.clone(). With a backward it is no
# floor.
COPY_OF_ALL = {
    COPY_ALL: Provider(
        torch.clone, prepare=lambda x, raw_scale, shift: (torch.cat((x, raw_scale)),), grad=(0,)
    )
}


def _case(
    batch: int,
    size: int,
    scale: str = "tanh",
    dtype: torch.dtype = torch.float32,
    min_scale: float = 0.0,
) -> Case:
    options = [*[scale] * (scale != "tanh"), *[f"+ {min_scale:g}"] * (min_scale > 0)]

    def make(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, size, dtype=dtype) for _ in range(3))

    peers: Mapping[str, Provider] = COPY_OF_ALL
    if min_scale > 0:
        peers = COPY_OF_ALL | floored_affine_peers(scale)
    elif scale == "sigmoid":
        # The form of Glow, the one scale that every library has.
        peers = COPY_OF_ALL | affine_peers()
    return Case(
        op="affine_coupling",
        size=" ".join([f"{batch}x{size}", *options, *dtype_note(dtype)]),
        make=partial(make, batch, dtype),
        call=partial(ops.affine_coupling, scale=scale, min_scale=min_scale),
        grad=(0, 1, 2),
        bytes=4 * dtype.itemsize * batch * size,
        flops=5 * batch * size,
        # x, raw_scale and the cotangent in, two gradients out: that of shift is the cotangent.
        bytes_backward=5 * dtype.itemsize * batch * size,
        flops_backward=8 * batch * size,
        peers=peers,
        small=partial(make, 16, torch.float64),
    )


CASES = [
    *(_case(65536, 64, scale) for scale in SCALES),
    *(_case(1024, 3072, scale) for scale in SCALES),
    # nflows' and normflows' couplings and masked autoregressive flows.
    *(
        _case(batch, size, scale, min_scale=LEAST)
        for batch, size in ((65536, 64), (1024, 3072))
        for scale in FLOORED
    ),
    _case(65536, 2),
    _case(1023, 37),
    _case(16, 64),
]


def _torch(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    log_s = torch.tanh(raw_scale)
    return x * torch.exp(log_s) + shift, log_s.sum(1)


# What a call costs.
CASES += [replace(_case(16, size), peers={"torch": _torch}) for size in (2, 32)]

GPU_CASES = [
    replace(case, more=(BACKWARD,))
    for case in (
        _case(65536, 1024),
        _case(65536, 1024, "sigmoid"),
        _case(65536, 1024, dtype=torch.bfloat16),
        _case(1024, 3072),
    )
]
