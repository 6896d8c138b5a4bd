"""RealNVP and neural spline flows: maximum likelihood of vectors and of images.

normflows is given our weights, so that it computes the same likelihood: its masks alternate between
even and odd columns, ours between halves, so its x has our first half in the even columns.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.case import ModelCase, Peer, Training
from fastgen.models import ImageRealNVP, RealNVP
from fastgen.nn import AffineCoupling, RQSplineCoupling


def _vectors(batch: int, dim: int, **options: Any) -> Training:
    model = RealNVP(dim, permute=False, **options)
    for name, parameter in model.named_parameters():
        if ".leave." in name:
            # not the identity, so that comparing losses says something, nor far from it
            nn.init.normal_(parameter, std=0.02 if options["coupling"] == "spline" else 0.001)
    return Training(model, (torch.randn(batch, dim),), lambda x: -model(x).mean())


def _images(batch: int, shape: tuple[int, int, int], **options: Any) -> Training:
    model = ImageRealNVP(shape, **options)
    images, noise = torch.randint(256, (batch, *shape)) / 255, torch.rand(batch, *shape)
    return Training(model, (images, noise), lambda x, noise: -model(x, noise).mean())


def _residual_net(ours: Any) -> Any:
    """normflows' conditioner, with the weights of our `ResidualMLP`."""
    from normflows.nets.resnet import ResidualNet

    net = ResidualNet(
        ours.enter.in_features,
        ours.leave.out_features,
        ours.enter.out_features,
        num_blocks=len(ours.blocks),
    )
    pairs = [(net.initial_layer, ours.enter), (net.final_layer, ours.leave)]
    for block, own in zip(net.blocks, ours.blocks, strict=True):
        pairs += [(block.linear_layers[0], own[1]), (block.linear_layers[1], own[3])]
    for theirs, own in pairs:
        theirs.load_state_dict(own.state_dict())
    return net


def _interleave(x: Tensor) -> Tensor:
    """The first half in the even columns, the second in the odd ones."""
    return torch.stack(x.chunk(2, 1), 2).flatten(1)


def _flow(flows: list[Any], dim: int) -> nn.Module:
    """A model of normflows, which lists its flows from z to x."""
    import normflows

    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(dim), flows[::-1])
    for parameter in model.q0.parameters():
        parameter.requires_grad_(False)
    return model


@torch.no_grad()
def _fit_spline(net: Any, layer: RQSplineCoupling) -> None:
    """normflows divides widths and heights by sqrt(width) and does not shift the derivatives."""
    bins, each = layer.num_bins, layer.numbers_each
    weight = net.final_layer.weight.view(-1, each, net.hidden_features)
    bias = net.final_layer.bias.view(-1, each)
    for values in (weight, bias):
        values[:, : 2 * bins] *= math.sqrt(net.hidden_features)
    bias[:, 2 * bins :] += math.log(math.expm1(1 - 1e-3))


def _normflows_splines(unconditional: bool, ours: Training) -> Training:
    """The same flow; `unconditional`: with splines of the kept half too, as normflows ships it."""
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
    from normflows.flows.neural_spline.wrapper import CoupledRationalQuadraticSpline

    model, (x,) = ours.model, ours.batch
    assert isinstance(model, RealNVP)
    dim, flows = model.latent_dim, []
    for i, layer in enumerate(model.chain):
        assert isinstance(layer, RQSplineCoupling)
        net = _residual_net(layer.conditioner)
        _fit_spline(net, layer)
        # the wrapper turns the coupling round, and leaves no choice of its splines
        flow = CoupledRationalQuadraticSpline(dim, 1, 8, num_bins=layer.num_bins)
        flow.prqct = PiecewiseRationalQuadraticCoupling(
            mask=(torch.arange(dim) + i) % 2,
            transform_net_create_fn=lambda *_, net=net: net,
            num_bins=layer.num_bins,
            tails="linear",
            tail_bound=layer.tail_bound,
            apply_unconditional_transform=unconditional,
        )
        flows.append(flow)
    theirs = _flow(flows, dim)
    return Training(theirs, (_interleave(x),), lambda x: -theirs.log_prob(x).mean())


def _normflows_affine(ours: Training) -> Training:
    """Of the same size: log s is the net's output there, 2 tanh of it here, and s x + t gives x."""
    from normflows.flows import AffineCouplingBlock, Permute

    model = ours.model
    assert isinstance(model, RealNVP)
    flows: list[Any] = []
    for layer in model.chain:
        assert isinstance(layer, AffineCoupling)
        block = AffineCouplingBlock(_residual_net(layer.conditioner), scale_map="exp")
        flows += [block, Permute(model.latent_dim, mode="swap")]
    theirs = _flow(flows, model.latent_dim)
    return Training(theirs, ours.batch, lambda x: -theirs.log_prob(x).mean())


def _vector_case(coupling: str, batch: int, dim: int, layers: int, hidden: int) -> ModelCase:
    peers = {
        "affine": {"normflows": Peer(_normflows_affine, "normflows")},
        "spline": {
            "normflows": Peer(partial(_normflows_splines, False), "normflows", 1e-3),
            "normflows default": Peer(partial(_normflows_splines, True), "normflows"),
        },
    }
    options = {"coupling": coupling, "layers": layers, "hidden": hidden}
    return ModelCase(
        op="realnvp",
        size=f"{coupling} {layers} layers, D={dim}, hidden {hidden}, B={batch}",
        make=partial(_vectors, batch, dim, **options),
        peers=peers[coupling],
    )


def _image_case(coupling: str, reversible: bool) -> ModelCase:
    options = {"coupling": coupling, "hidden": 32, "reversible": reversible}
    return ModelCase(
        op="realnvp",
        size=f"{coupling} 1x28x28, hidden 32, B=16{', reversible' * reversible}",
        make=partial(_images, 16, (1, 28, 28), **options),
        # the batch norm's state and the reversible chain's own backward keep eager mode
        compiled=False,
    )


CASES = [
    _vector_case("spline", 512, 64, 10, 128),
    _vector_case("affine", 512, 64, 32, 128),
    _vector_case("spline", 512, 2, 8, 64),
    _image_case("affine", False),
    _image_case("affine", True),
    _image_case("spline", False),
]
