"""FrEIA: a sequence of AllInOneBlocks, as its documentation starts with, and of GLOW couplings."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.integrations.case import patched_case
from benchmarks.models.case import ModelCase, Training

with warnings.catch_warnings():
    # its docstrings hold escapes that Python does not know
    warnings.simplefilter("ignore")
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm


def _subnet(hidden: int, channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels_in, hidden), nn.ReLU(), nn.Linear(hidden, channels_out))


def _sequence(kind: type[nn.Module], layers: int, dim: int, hidden: int, batch: int) -> Training:
    np.random.seed(0)  # the permutations are numpy's
    inn = Ff.SequenceINN(dim)
    for _ in range(layers):
        inn.append(kind, subnet_constructor=partial(_subnet, hidden))

    def loss(x: torch.Tensor) -> torch.Tensor:
        z, log_jacobian = inn(x)
        return (0.5 * z.square().sum(1) - log_jacobian).mean() / dim

    return Training(inn, (torch.randn(batch, dim),), loss)


def _case(kind: type[nn.Module], layers: int, dim: int, hidden: int, batch: int) -> ModelCase:
    size = f"{kind.__name__} {layers} layers, D={dim}, hidden {hidden}, B={batch}"
    return patched_case(
        "freia", "FrEIA", size, partial(_sequence, kind, layers, dim, hidden, batch)
    )


CASES = [
    _case(kind, 8, dim, hidden, batch)
    for kind in (Fm.AllInOneBlock, Fm.GLOWCouplingBlock)
    for dim, hidden, batch in ((2, 128, 512), (64, 128, 4096))
]
