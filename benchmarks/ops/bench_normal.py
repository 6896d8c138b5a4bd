"""normal: writes its result. The peer is torch's own stateful generator."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, dtype_note
from fastgen import ops, random


def _case(count: int, dtype: torch.dtype = torch.float32) -> Case:
    def torch_randn(key: Tensor) -> Tensor:
        return torch.randn(count, device=key.device, dtype=dtype)

    return Case(
        op="normal",
        size=" ".join([str(count), *dtype_note(dtype)]),
        make=lambda: (random.make_key(1),),
        call=partial(ops.normal, size=(count,), dtype=dtype),
        bytes=dtype.itemsize * count,
        # What is done in floats; the words of Philox are integers.
        flops=9 * count,
        peers={"torch.randn": torch_randn},
    )


CASES = [_case(2**24), _case(2**16), _case(64)]


def _seeded(count: int) -> Case:
    """Beside a generator that starts from a seed, as a key does, in each call."""
    generator = torch.Generator()

    def seeded(key: Tensor) -> Tensor:
        return torch.randn(count, generator=generator.manual_seed(1))

    case = _case(count)
    return replace(case, peers={**case.peers, "torch.randn seeded": seeded})


# What a call costs.
CASES += [_seeded(16), _seeded(16 * 64)]

GPU_CASES = [_case(2**28, dtype) for dtype in (torch.float32, torch.bfloat16)]
