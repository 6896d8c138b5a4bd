"""Ensembles: one layer run by torch.vmap over the stacked parameters of several."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state

import fastgen.nn as fnn

MEMBERS = 3


class Sampler(nn.Module):
    """GaussianReparam has no parameters of its own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.reparam = nn.Linear(4, 6), fnn.GaussianReparam()

    def forward(self, x):
        return self.reparam(self.encoder(x), key=torch.tensor([1, 2]))


class Dropper(nn.Module):
    """Nor has Dropout."""

    def __init__(self):
        super().__init__()
        self.encoder, self.dropout = nn.Linear(4, 6), fnn.Dropout()

    def forward(self, x):
        with fnn.keyed_dropout([self], torch.tensor([1, 2])):
            return self.dropout(self.encoder(x))


def conditioner(outputs):
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, outputs))


#: Each makes one member; its inputs have these shapes.
LAYERS = {
    "adain": (lambda: fnn.AdaIN(3, 4), (2, 4, 3, 3), (2, 3)),
    "affine_coupling": (lambda: fnn.AffineCoupling(conditioner(4)), (3, 4)),
    "rq_spline_coupling": (lambda: fnn.RQSplineCoupling(conditioner(22), num_bins=4), (3, 4)),
    "chain": (
        lambda: fnn.InvertibleChain(
            fnn.AffineCoupling(conditioner(4), swap=swap) for swap in (False, True)
        ),
        (3, 4),
    ),
    "dropout": (Dropper, (3, 4)),
    "gaussian_reparam": (Sampler, (3, 4)),
    "instance_norm1d": (lambda: fnn.InstanceNorm1d(4, affine=True), (2, 4, 7)),
    "instance_norm2d": (
        lambda: fnn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        (2, 4, 3, 3),
    ),
    "instance_norm3d": (lambda: fnn.InstanceNorm3d(4, affine=True), (2, 4, 2, 3, 2)),
    "vector_quantizer": (lambda: fnn.VectorQuantizer(5, 4, codebook="gradient"), (7, 4)),
    "vector_quantizer_cosine": (
        lambda: fnn.VectorQuantizer(5, 4, codebook="gradient", metric="cosine"),
        (7, 4),
    ),
    "vector_quantizer_ema": (lambda: fnn.VectorQuantizer(5, 4), (7, 4)),
    "residual_vq": (lambda: fnn.ResidualVQ(2, 5, 4, codebook="gradient"), (7, 4)),
}


def test_every_layer_is_here():
    made = {type(module) for make, *_ in LAYERS.values() for module in make().modules()}
    public = [getattr(fnn, name) for name in fnn.__all__]
    layers = {c for c in public if isinstance(c, type) and issubclass(c, nn.Module)}
    assert layers - {fnn.Invertible, fnn.VolumePreserving} <= made


def loss_of(results):
    results = (results,) if isinstance(results, torch.Tensor) else results
    return sum(r.double().square().sum() for r in results if r.is_floating_point())


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("layer", LAYERS)
def test_an_ensemble_is_its_members(layer, training):
    """Losses, gradients of parameters and inputs, and buffers after the step."""
    make, *shapes = LAYERS[layer]
    torch.manual_seed(0)
    members = [make().double().train(training) for _ in range(MEMBERS)]
    inputs = [torch.randn(MEMBERS, *shape, dtype=torch.float64) for shape in shapes]
    for p in (p for m in members for p in m.parameters()):
        p.data.add_(0.1 * torch.randn_like(p))
    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0])

    def run(parameters, buffers, *inputs):
        return loss_of(functional_call(skeleton, (parameters, buffers), inputs))

    leaves = [x.clone().requires_grad_() for x in inputs]
    losses = torch.vmap(run)(parameters, buffers, *leaves)
    losses.sum().backward()
    for n, member in enumerate(members):
        own = [x[n].clone().requires_grad_() for x in inputs]
        loss = loss_of(member(*own))
        loss.backward()
        torch.testing.assert_close(losses[n], loss)
        for stacked, alone in zip(leaves, own, strict=True):
            torch.testing.assert_close(stacked.grad[n], alone.grad)
        for name, parameter in member.named_parameters():
            assert parameter.grad.any()
            torch.testing.assert_close(parameters[name].grad[n], parameter.grad)
        for name, buffer in member.named_buffers():
            torch.testing.assert_close(buffers[name][n], buffer)
