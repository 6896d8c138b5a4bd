"""normflows: the RealNVP of its README, a neural spline flow and a Glow, by maximum likelihood."""

from __future__ import annotations

from functools import partial
from unittest import mock

import normflows as nf
import torch
from normflows.utils import splines
from torch import Tensor, nn

import fastgen
from benchmarks.integrations.case import patched_case
from benchmarks.models.case import ModelCase, Peer, Training


def _spread(model: nn.Module) -> nn.Module:
    """Layers that start as the identity would compare nothing."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def _likelihood(model: nn.Module, x: Tensor) -> Training:
    return Training(_spread(model), (x,), lambda x: model.forward_kld(x))


def _spline_flow(layers: int, dim: int, hidden: int, batch: int) -> Training:
    flows = [
        nf.flows.CoupledRationalQuadraticSpline(dim, 2, hidden, reverse_mask=i % 2 == 1)
        for i in range(layers)
    ]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), flows)
    return _likelihood(model, torch.randn(batch, dim))


def _stub(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """The least that gives every parameter a gradient."""
    widths, heights = unnormalized_widths.sum(-1), unnormalized_heights.sum(-1)
    return inputs, 1e-3 * (widths + heights + unnormalized_derivatives.sum(-1))


def _without_splines(ours: Training) -> Training:
    """What remains of the library's step where its splines cost next to nothing."""
    fastgen.unpatch(ours.model)

    def objective(x: Tensor) -> Tensor:
        with mock.patch.object(splines, "unconstrained_rational_quadratic_spline", _stub):
            return ours.objective(x)

    return Training(ours.model, ours.batch, objective)


def _real_nvp(layers: int, dim: int, hidden: int, batch: int) -> Training:
    flows = []
    for _ in range(layers):
        net = nf.nets.MLP([dim - dim // 2, hidden, hidden, dim // 2 * 2], init_zeros=True)
        flows += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(dim, mode="swap")]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim), flows)
    return _likelihood(model, torch.randn(batch, dim))


def _glow(levels: int, steps: int, hidden: int, batch: int, side: int, split_mode: str) -> Training:
    channels, bases, flows = 3, [], []
    for level in range(levels):
        blocks = [
            nf.flows.GlowBlock(channels * 2 ** (levels + 1 - level), hidden, split_mode=split_mode)
            for _ in range(steps)
        ]
        flows.append([*blocks, nf.flows.Squeeze()])
        depth = levels - level
        width = channels * 2 ** (depth + (level == 0))
        bases.append(nf.distributions.DiagGaussian((width, side // 2**depth, side // 2**depth)))
    merges = [nf.flows.Merge() for _ in range(levels - 1)]
    model = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)
    return _likelihood(model, torch.rand(batch, channels, side, side))


def _splines(layers: int, dim: int, hidden: int, batch: int) -> ModelCase:
    size = f"RQ-NSF {layers} layers, D={dim}, hidden {hidden}, B={batch}"
    make = partial(_spline_flow, layers, dim, hidden, batch)
    stubbed = {"splines stubbed": Peer(_without_splines, "normflows")}
    return patched_case("normflows", "normflows", size, make, stubbed)


def _affine(layers: int, dim: int, hidden: int, batch: int) -> ModelCase:
    size = f"RealNVP {layers} layers, D={dim}, hidden {hidden}, B={batch}"
    make = partial(_real_nvp, layers, dim, hidden, batch)
    return patched_case("normflows", "normflows", size, make)


def _images(split_mode: str) -> ModelCase:
    make = partial(_glow, 2, 4, 32, 16, 32, split_mode)
    size = f"Glow 2x4 blocks, hidden 32, 3x32x32, B=16, {split_mode}"
    return patched_case("normflows", "normflows", size, make)


CASES = [
    _splines(10, 64, 128, 512),
    _splines(8, 2, 64, 512),
    _affine(32, 2, 64, 512),
    _affine(32, 64, 128, 512),
    _images("channel"),
    _images("checkerboard"),
]
