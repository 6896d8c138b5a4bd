"""nflows: neural spline flows (Durkan et al. 2019, appendix B: coupling and autoregressive steps,
each after a random permutation and an LU linear layer), its SimpleRealNVP, and a MAF."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from nflows import distributions, flows, transforms
from nflows.flows.realnvp import SimpleRealNVP
from nflows.nn.nets import ResidualNet
from nflows.utils import torchutils
from torch import nn

from benchmarks.integrations.case import patched_case
from benchmarks.models.case import Training

SPLINE = {"num_bins": 8, "tails": "linear", "tail_bound": 3.0}


def _coupling(features: int, step: int) -> nn.Module:
    mask = torchutils.create_alternating_binary_mask(features, even=step % 2 == 0)
    net = partial(ResidualNet, hidden_features=128, num_blocks=2)
    return transforms.PiecewiseRationalQuadraticCouplingTransform(mask, net, **SPLINE)


def _autoregressive(features: int, step: int) -> nn.Module:
    return transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        features, hidden_features=128, **SPLINE
    )


def _maf(features: int, step: int) -> nn.Module:
    return transforms.MaskedAffineAutoregressiveTransform(features, hidden_features=128)


def _linear(features: int) -> list[nn.Module]:
    return [transforms.RandomPermutation(features), transforms.LULinear(features)]


def _training(flow: nn.Module, features: int, batch: int) -> Training:
    return Training(flow, (torch.randn(batch, features),), lambda x: -flow.log_prob(x).mean())


def _flow(step: Callable[[int, int], nn.Module], features: int, batch: int, steps: int) -> Training:
    chain = [m for i in range(steps) for m in (*_linear(features), step(features, i))]
    base = distributions.StandardNormal([features])
    return _training(flows.Flow(transforms.CompositeTransform(chain), base), features, batch)


def _realnvp(features: int, batch: int, steps: int) -> Training:
    flow = SimpleRealNVP(features, hidden_features=128, num_layers=steps, num_blocks_per_layer=2)
    return _training(flow, features, batch)


CASES = [
    patched_case("nflows", "nflows", f"{name} D=64, B=512, {steps} steps", make)
    for name, steps, make in (
        ("RQ-NSF (C)", 10, partial(_flow, _coupling, 64, 512, 10)),
        ("RQ-NSF (AR)", 10, partial(_flow, _autoregressive, 64, 512, 10)),
        ("SimpleRealNVP", 10, partial(_realnvp, 64, 512, 10)),
        ("MAF", 10, partial(_flow, _maf, 64, 512, 10)),
    )
]
