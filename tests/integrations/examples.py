"""A small model of each library that fastgen.patch() covers, with every class of it that is."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Objective(nn.Module):
    """A model and what is made of its call: tensors with the batch first, or losses."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def outputs(self, x: Tensor) -> list[Tensor]:
        return [t for t in self._call(self.model, x) if t.is_floating_point()]

    def forward(self, x: Tensor) -> Tensor:
        """A mean over the batch."""
        terms = [t if t.dim() == 0 else t.square().mean() for t in self.outputs(x)]
        return torch.stack(terms).sum()


@dataclass(frozen=True)
class Example:
    """What makes the model, under a fixed seed, and the shape of one of its inputs.

    `buffers_join`: ranks that train it hold the buffers of one process on the joint batch, as its
    library sends statistics around; those of an instance norm are a rank's own.
    """

    make: Callable[[], Objective]
    shape: tuple[int, ...]
    buffers_join: bool = True
    #: Of float64 results, relative and absolute.
    rounding: float = 1e-9

    def objective(self, dtype: torch.dtype = torch.float32) -> Objective:
        torch.manual_seed(0)
        return self.make().to(dtype)

    def batch(self, size: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, *self.shape, generator=torch.manual_seed(seed), dtype=dtype)


def instance_norms() -> Objective:
    options = {"affine": True, "track_running_stats": True}
    model = nn.Sequential(
        nn.Conv3d(3, 6, 1),
        nn.InstanceNorm3d(6, **options),
        nn.Tanh(),
        nn.Flatten(3),
        nn.InstanceNorm2d(6, **options),
        nn.Flatten(2),
        nn.InstanceNorm1d(6, **options),
    )
    return Objective(model, lambda model, x: [model(x)])


def quantizers() -> Objective:
    from vector_quantize_pytorch import ResidualVQ, VectorQuantize

    def call(model: Any, x: Tensor) -> list[Tensor]:
        x, _, loss = model["layer"](model["linear"](x))
        y, _, losses = model["residual"](x)
        return [y, loss.sum(), losses.sum()]

    # The library looks for a group once in a process.
    options = {"dim": 8, "codebook_size": 5, "sync_codebook": dist.is_initialized()}
    layers = {
        "linear": nn.Linear(8, 8),
        "layer": VectorQuantize(**options),
        "residual": ResidualVQ(**options, num_quantizers=2),
    }
    return Objective(nn.ModuleDict(layers), call)


def nflows_transforms() -> Objective:
    from nflows import transforms
    from nflows.nn.nets import ResidualNet

    def net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, 8, num_blocks=1, activation=torch.tanh)

    mask, hidden = [1, 0, 1, 0], {"hidden_features": 8, "num_blocks": 1, "activation": torch.tanh}
    spline = {"tails": "linear", "tail_bound": 2.0, "num_bins": 4}
    model = transforms.CompositeTransform(
        [
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                mask, net, **spline, apply_unconditional_transform=True
            ),
            transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                4, **hidden, **spline
            ),
            transforms.AffineCouplingTransform(mask, net),
            transforms.AdditiveCouplingTransform(mask[::-1], net),
            transforms.MaskedAffineAutoregressiveTransform(4, **hidden),
        ]
    )
    return Objective(model, lambda model, x: model(x))


def normflows_layers() -> Objective:
    import normflows as nf

    net = nf.nets.MLP
    model = nn.ModuleList(
        [
            nf.flows.AffineCouplingBlock(net([2, 8, 4]), scale_map="sigmoid"),
            nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0, 0, 1]), net([4, 8, 4]), net([4, 8, 4])),
            nf.flows.MaskedAffineAutoregressive(4, 8),
            nf.flows.CoupledRationalQuadraticSpline(4, 1, 8, num_bins=4),
            nf.flows.AutoregressiveRationalQuadraticSpline(4, 1, 8, num_bins=4),
        ]
    )

    def call(model: Any, x: Tensor) -> list[Tensor]:
        total = 0.0
        for flow in model:
            # The direction without a loop: dynamo does not follow the library's.
            autoregressive = isinstance(flow, nf.flows.MaskedAffineAutoregressive)
            x, log_det = flow(x) if autoregressive else flow.inverse(x)
            total = total + log_det
        return [x, total]

    return Objective(model, call)


def zuko_flow() -> Objective:
    import zuko
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform
    from zuko.flows.coupling import GeneralCouplingTransform
    from zuko.flows.gaussianization import ElementWiseTransform
    from zuko.lazy import UnconditionalTransform

    spline = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(4,), (4,), (3,)]}
    net = {"hidden_features": (8,), "activation": nn.Tanh}
    base = UnconditionalTransform(zuko.distributions.DiagNormal, torch.zeros(4), torch.ones(4))
    model = zuko.flows.Flow(
        [
            MaskedAutoregressiveTransform(4, **spline, **net),
            GeneralCouplingTransform(4, **net),
            ElementWiseTransform(4, **spline),
        ],
        base,
    )
    return Objective(model, lambda model, x: [model().log_prob(x)])


def freia_sequence() -> Objective:
    import numpy as np

    with warnings.catch_warnings():
        # its docstrings hold escapes that Python does not know
        warnings.simplefilter("ignore")
        import FrEIA.framework as Ff
        import FrEIA.modules as Fm

    def net(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 8), nn.SiLU(), nn.Linear(8, outputs))

    np.random.seed(0)  # the permutations are numpy's
    model = Ff.SequenceINN(4)
    for kind in (
        Fm.AllInOneBlock,
        Fm.GLOWCouplingBlock,
        Fm.RNVPCouplingBlock,
        Fm.AffineCouplingOneSided,
    ):
        model.append(kind, subnet_constructor=net)
    model.append(Fm.ConditionalAffineTransform, cond=0, cond_shape=(2,), subnet_constructor=net)
    return Objective(model, lambda model, x: model(x, c=[x[:, :2]]))


def adaptive_norm() -> Objective:
    from diffusers.models.normalization import AdaGroupNorm

    model = nn.ModuleDict({"embed": nn.Linear(8, 10), "norm": AdaGroupNorm(10, 8, 4)})
    return Objective(model, lambda m, x: [m["norm"](x, m["embed"](x.mean((2, 3))))])


EXAMPLES = {
    "FrEIA": Example(freia_sequence, (4,)),
    "diffusers": Example(adaptive_norm, (8, 3, 3)),
    "nflows": Example(nflows_transforms, (4,)),
    "normflows": Example(normflows_layers, (4,)),
    "torch.nn": Example(instance_norms, (3, 3, 2, 4), buffers_join=False),
    # The library's codebooks are float32 in any model.
    "vector_quantize_pytorch": Example(quantizers, (3, 8), rounding=5e-5),
    "zuko": Example(zuko_flow, (4,)),
}


def installed() -> Iterator[str]:
    """The libraries of EXAMPLES that there are."""
    for library in EXAMPLES:
        if importlib.util.find_spec(library.partition(".")[0]) is not None:
            yield library
