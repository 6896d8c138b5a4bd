"""RealNVP and neural spline flows: maximum likelihood of toy densities and of images.

Dinh et al., 2017 (arXiv 1605.08803); Durkan et al., 2019 (arXiv 1906.04032). The loss is
-log p(x), eq. 3. For the toys the data's own entropy is known, and measures say how far the model
is above it, in nats: the Kullback-Leibler divergence from the data to the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from fastgen.data import (
    TOYS,
    ImageDataset,
    PointDataset,
    Source,
    TensorSource,
    load_images,
    load_toy,
)
from fastgen.data.toys import TOY_EXTENT
from fastgen.models import ImageRealNVP, RealNVP
from fastgen.models.realnvp import Flow
from fastgen.training.config import EngineConfig, OptimizerConfig, StageConfig
from fastgen.training.draws import Draws
from fastgen.training.ranges import Count, Depth, Levels, MaybeDepth, Options, Range, Width
from fastgen.training.tasks.base import Batch, Nets, PhaseLoss, Stage, Task

_EVAL_BATCH = 2000
_EVAL_IMAGES = 250
_SEED = 1234
_DRAWN_IMAGES = 64
_DRAWN_POINTS = 50_000
_PICTURE_SIDE = 200


@dataclass
class FlowConfig(Options):
    """The flow.

    Args:
        coupling: affine couplings (RealNVP) or rational-quadratic splines (neural spline flow).
        layers: coupling layers, for points.
        scales: levels of the multi-scale architecture, for images.
        hidden: width of the conditioners.
        blocks: residual blocks of a conditioner.
        num_bins: bins of a spline.
        tail_bound: half the width of the interval that a spline covers.
        batch_norm: batch normalisation between the couplings.
        levels: grey values of the images.
        alpha: how far the images are kept from 0 and 1 before the logit.
        reversible: rebuild activations in backward, so that memory does not grow with depth.
        anchor_every: layers between kept states then.
    """

    coupling: Literal["affine", "spline"] = "spline"
    layers: Depth = 6
    scales: Annotated[int, Range(1, 16)] = 2
    hidden: Width = 64
    blocks: MaybeDepth = 2
    num_bins: Annotated[int, Range(1, 1024)] = 16
    tail_bound: Annotated[float, Range(0, 10**6, above=True)] = 3.0
    batch_norm: bool = False
    levels: Levels = 256
    alpha: Annotated[float, Range(0, 0.5, above=True, below=True)] = 0.05
    reversible: bool = False
    anchor_every: Count = 16


@dataclass
class RealNVPConfig(Options):
    """Recipe `realnvp`.

    Args:
        data: a toy density (eight-gaussians, moons, checkerboard, rings), an image data set, or an
            .npz file of images.
        data_root: folder of the data files; by default the environment variable FASTGEN_DATA.
        model: the flow.
        flow: optimisation.
        engine: what is common to all recipes.
    """

    data: str = "eight-gaussians"
    data_root: str | None = None
    model: FlowConfig = field(default_factory=FlowConfig)
    flow: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=6000, batch_size=512, optimizer=OptimizerConfig(lr=2e-3, final_lr=0.0)
        )
    )
    engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(
            log_every=200,
            valid_every=1000,
            sample_every=5000,
            checkpoint_every=1000,
            max_grad_norm=5.0,
            ema_decay=0.998,
        )
    )


#: Without averaged weights: the batch norm's running averages are of the weights as they train, and
#: whitened by them the averaged weights' activations are not.
_IMAGES: dict[str, Any] = {
    "model.coupling": "affine",
    "model.hidden": 32,
    "model.num_bins": 8,
    "model.batch_norm": True,
    "flow.batch_size": 64,
    "flow.steps": 8000,
    "flow.optimizer.lr": 1e-3,
    "engine.max_grad_norm": 50.0,
    "engine.ema_decay": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": _IMAGES | {"model.levels": 17, "flow.steps": 2000, "flow.batch_size": 128},
    "mnist": _IMAGES,
    "fashion-mnist": _IMAGES,
    "binarized-mnist": _IMAGES | {"model.levels": 2},
    "cifar10": _IMAGES | {"model.hidden": 64, "model.blocks": 4, "model.scales": 3},
}


def load_data(name: str, root: Path | None) -> PointDataset | ImageDataset:
    """A toy density by its name, or else images.

    Raises:
        DataError: what `fastgen.data.load_images` cannot load.
    """
    return load_toy(name) if name in TOYS else load_images(name, root)


class FlowStage(Stage):
    """Maximum likelihood; a subclass knows how to look at its kind of data."""

    name = "flow"

    def __init__(self, config: StageConfig, model: Flow, train: Tensor):
        self.config = config
        self.modules = {"flow": model}
        self.train = train

    def train_source(self) -> Source:
        return TensorSource(x=self.train)

    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws) -> PhaseLoss:
        nll = -self.log_prob(nets["flow"], batch["x"], draws).mean()
        return PhaseLoss(nll, {"nll": nll})

    def log_prob(self, net: Callable[..., Tensor], x: Tensor, draws: Draws) -> Tensor:
        """log p(x) (B,) of a training batch."""
        return net(x)

    def measure(self, model: Flow, split: str) -> dict[str, float]:
        """The measures of the split "valid" or "test"."""
        raise NotImplementedError

    def validate(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        return self.measure(_flow(modules), "valid")


class PointStage(FlowStage):
    """Points of a density that is known."""

    def __init__(self, config: StageConfig, model: RealNVP, dataset: PointDataset):
        super().__init__(config, model, dataset.train.points)
        self.dataset = dataset

    def summarise(self, logs: dict[str, Tensor]) -> dict[str, float]:
        return {"nll": logs["nll"].item()}

    def measure(self, model: Flow, split: str) -> dict[str, float]:
        """Nats: the mean of -log q, the data's entropy, the mean of log p - log q, standard errors.

        The excess is the divergence KL(p || q), with less noise than nll - entropy.
        """
        points = getattr(self.dataset, split).points
        log_q = log_probs(model, points)
        excess = self.dataset.density.log_prob(points) - log_q
        return {
            "nll": -log_q.mean().item(),
            "nll_error": _standard_error(log_q),
            "entropy": self.dataset.density.entropy,
            "excess": excess.mean().item(),
            "excess_error": _standard_error(excess),
        }

    def draw(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        model = _flow(modules)
        device = next(model.parameters()).device
        points = model.sample(_DRAWN_POINTS, generator=_generator(device))
        centres = _pixel_centres()
        truth = self.dataset.density.log_prob(centres)
        panels = [truth.exp(), log_probs(model, centres).exp(), _histogram(points)]
        pictures = torch.stack([p.view(1, _PICTURE_SIDE, _PICTURE_SIDE).float() for p in panels])
        return {"density": pictures / truth.max().exp()}


class ImageStage(FlowStage):
    """Images, by the bound that dequantisation gives; one draw of noise an image, always the same
    in evaluation."""

    def __init__(self, config: StageConfig, model: ImageRealNVP, dataset: ImageDataset):
        super().__init__(config, model, dataset.train.images)
        self.dataset = dataset
        self.bits = model.bits_per_dim

    def log_prob(self, net: Callable[..., Tensor], x: Tensor, draws: Draws) -> Tensor:
        return net(x, draws.uniform(*x.shape[1:]))

    def summarise(self, logs: dict[str, Tensor]) -> dict[str, float]:
        return {"nll": logs["nll"].item(), "bits_per_dim": self.bits(-logs["nll"]).item()}

    def measure(self, model: Flow, split: str) -> dict[str, float]:
        """Mean of -log P(image) in nats and in bits a dimension, with its standard error."""
        bits = self.bits(log_probs(model, getattr(self.dataset, split).images))
        nats = math.log(2) * math.prod(self.dataset.image_shape)
        return {
            "nll": bits.mean().item() * nats,
            "bits_per_dim": bits.mean().item(),
            "bits_per_dim_error": _standard_error(bits),
        }

    def draw(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        model = _flow(modules)
        device = next(model.parameters()).device
        return {"samples": model.sample(_DRAWN_IMAGES, generator=_generator(device)).cpu()}


class RealNVPTask(Task):
    """A flow for one data set.

    Raises:
        ValueError: sizes that do not fit the data.
    """

    def __init__(self, config: RealNVPConfig, dataset: PointDataset | ImageDataset):
        self.dataset = dataset
        options = dict(vars(config.model))
        layers, scales, levels, alpha = (
            options.pop(name) for name in ("layers", "scales", "levels", "alpha")
        )
        stage: FlowStage
        if isinstance(dataset, PointDataset):
            points = dataset.train.points
            model = RealNVP(points.shape[1], layers=layers, **options)
            model.standardize.fit(points)
            self.model: Flow = model
            stage = PointStage(config.flow, model, dataset)
        else:
            self.model = image_model = ImageRealNVP(
                dataset.image_shape, scales=scales, levels=levels, alpha=alpha, **options
            )
            _check_levels(dataset, levels)
            stage = ImageStage(config.flow, image_model, dataset)
        self.stage = stage
        self.modules = {"flow": self.model}
        self.stages = [stage]

    def sample(
        self, num: int, *, labels: Tensor | None, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """Images, or one picture (1, 1, H, W) of `num` points.

        Raises:
            ValueError: labels are given, or `temperature` is not positive.
        """
        if labels is not None:
            raise ValueError("this flow has no classes: leave out --label")
        drawn = self.model.sample(num, temperature=temperature, generator=generator)
        if isinstance(self.model, ImageRealNVP):
            return drawn
        picture = _histogram(drawn).view(1, 1, _PICTURE_SIDE, _PICTURE_SIDE)
        return picture / picture.max()

    def evaluate(self) -> dict[str, dict[str, float]]:
        return {split: self.stage.measure(self.model, split) for split in ("valid", "test")}


@torch.no_grad()
def log_probs(model: Flow, x: Tensor) -> Tensor:
    """log p(x) of all rows (N,), float64 on the CPU; images with noise that is always the same."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(_SEED)
    found = []
    for part in x.split(_EVAL_IMAGES if isinstance(model, ImageRealNVP) else _EVAL_BATCH):
        if isinstance(model, ImageRealNVP):
            noise = torch.rand(part.shape, generator=generator)
            log_prob = model.log_prob(part.to(device), noise.to(device))
        else:
            log_prob = model.log_prob(part.to(device))
        found.append(log_prob.cpu().double())
    return torch.cat(found)


def _check_levels(dataset: ImageDataset, levels: int) -> None:
    """Grey values that are none of `levels` would be rounded, and the likelihood of others."""
    steps = dataset.train.images * (levels - 1)
    if (steps - steps.round()).abs().max() > 1e-2:
        raise ValueError(
            f"model.levels must be the number of grey values in the data, got {levels}"
        )


def _standard_error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values))


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(_SEED)


def _pixel_centres() -> Tensor:
    """(side^2, 2) points, row by row from the top left of the picture."""
    side = (torch.arange(_PICTURE_SIDE) + 0.5) / _PICTURE_SIDE * 2 * TOY_EXTENT - TOY_EXTENT
    y, x = torch.meshgrid(-side, side, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def _histogram(points: Tensor) -> Tensor:
    """Density (side^2,) of points (N, 2) by counting them a pixel, in the order of the centres."""
    pixel = 2 * TOY_EXTENT / _PICTURE_SIDE
    inside = points[(points.abs() < TOY_EXTENT).all(1)].cpu()
    column = ((inside[:, 0] + TOY_EXTENT) / pixel).long()
    row = ((TOY_EXTENT - inside[:, 1]) / pixel).long()
    which = (row * _PICTURE_SIDE + column).clamp(0, _PICTURE_SIDE**2 - 1)
    counts = torch.bincount(which, minlength=_PICTURE_SIDE**2)
    return counts.float() / (len(points) * pixel**2)


def _flow(modules: Mapping[str, nn.Module]) -> Flow:
    model = modules["flow"]
    assert isinstance(model, Flow)
    return model
