"""zuko: the NSF of its README, conditional and fully autoregressive, the same with coupling steps,
and RealNVP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import zuko
from torch import nn

from benchmarks.integrations.case import patched_case
from benchmarks.models.case import Training

BATCH = 4096
HIDDEN = {"transforms": 3, "hidden_features": [128] * 3}


def _training(make: Callable[..., nn.Module], features: int, context: int) -> Training:
    flow = make(features, context, **HIDDEN)
    batch = torch.randn(BATCH, features), torch.randn(BATCH, context)
    return Training(flow, batch, lambda x, c: -flow(c).log_prob(x).mean())


CASES = [
    patched_case(
        "zuko",
        "zuko",
        f"{name} D={features}, 5 contexts, B={BATCH}, 3 steps",
        partial(_training, make, features, 5),
    )
    for name, make, features in (
        ("NSF", zuko.flows.NSF, 3),
        ("NSF", zuko.flows.NSF, 64),
        ("NSF, passes=2,", partial(zuko.flows.NSF, passes=2), 64),
        ("RealNVP", zuko.flows.RealNVP, 64),
    )
]
