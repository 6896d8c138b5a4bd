"""VQ-VAE in two stages: the autoencoder, then an autoregressive prior on its frozen codes.

van den Oord et al., 2017 (arXiv 1711.00937): the first stage minimises eq. 3, the second the
negative log likelihood of the codes (section 3.3). The reconstruction term is the negative log
likelihood, in nats a dimension, or the squared error in units of the data's variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from fastgen.data import ImageDataset, Source, TensorSource
from fastgen.losses import check_unit_range
from fastgen.models import VQVAE, CodePrior
from fastgen.training.config import EngineConfig, OptimizerConfig, StageConfig
from fastgen.training.draws import Draws
from fastgen.training.ranges import (
    BelowOne,
    Channels,
    Count,
    Depth,
    Levels,
    MaybeDepth,
    Options,
    Range,
    Weight,
)
from fastgen.training.tasks.base import (
    Batch,
    Nets,
    PhaseLoss,
    Stage,
    Task,
)
from fastgen.training.tasks.vqvae_measures import (
    code_histograms,
    codebook_measures,
    encode_all,
    fit_pixels,
    likelihood_measures,
    prior_measures,
    reconstruction_measures,
)

_DRAWN = 32
_DRAW_SEED = 1234


@dataclass
class ModelConfig(Options):
    """The autoencoder.

    Args:
        num_codes: codebook size.
        code_dim: width of a code.
        channels: width of the convolutions.
        residual_blocks: residual blocks in encoder and decoder each.
        downsamplings: halvings of the image's side.
        quantizers: codes a position, each of a codebook of its own that quantizes what the ones
            before it left.
        likelihood: of the pixels given the codes. Bernoulli is for binary images; the discretised
            logistic gives a probability to each stored value; mse: squared errors, and for
            evaluation a discretised logistic of one scale a channel, fitted to the training images.
        scale: of the discretised logistic: given by the decoder for a pixel, or learned for a
            channel.
        levels: how many values a pixel has, for the discretised logistic.
        codebook: how the codebook learns: moving averages or the gradient.
        decay: decay of the moving averages.
        commitment_weight: beta of eq. 3.
        kmeans_init: start the codebook at the first batch's k-means.
        revive_after: steps without use after which a code is moved onto an input; null for never.
    """

    num_codes: Annotated[int, Range(1, 2**18)] = 64
    code_dim: Channels = 8
    channels: Annotated[int, Range(2, 2**12)] = 64
    residual_blocks: MaybeDepth = 2
    downsamplings: Annotated[int, Range(0, 16)] = 1
    quantizers: Depth = 1
    likelihood: Literal["mse", "bernoulli", "discretized-logistic"] = "mse"
    scale: Literal["pixel", "shared"] = "pixel"
    levels: Levels = 256
    codebook: Literal["ema", "gradient"] = "ema"
    decay: BelowOne = 0.99
    commitment_weight: Weight = 0.25
    kmeans_init: bool = True
    revive_after: Count | None = 100


@dataclass
class PriorConfig(Options):
    """The transformer over the code grid.

    Args:
        width, layers, heads: its size.
        dropout: dropout probability.
        conditional: condition on the labels, where the data set has them.
    """

    width: Channels = 64
    layers: Depth = 2
    heads: Channels = 4
    dropout: BelowOne = 0.1
    conditional: bool = True


@dataclass
class VQVAEConfig(Options):
    """Recipe `vqvae`.

    Args:
        data: name of the data set, or an .npz file.
        data_root: folder of the data files; by default the environment variable FASTGEN_DATA.
        model: the autoencoder.
        prior_model: the prior.
        autoencoder: optimisation of the first stage.
        prior: optimisation of the second stage.
        engine: what is common to all recipes.
    """

    data: str = "digits"
    data_root: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    prior_model: PriorConfig = field(default_factory=PriorConfig)
    autoencoder: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=800, batch_size=128, optimizer=OptimizerConfig(lr=1e-3)
        )
    )
    prior: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=800, batch_size=128, optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1)
        )
    )
    engine: EngineConfig = field(default_factory=EngineConfig)


_LARGE: dict[str, Any] = {
    "model.num_codes": 256,
    "model.code_dim": 32,
    "model.downsamplings": 2,
    "model.likelihood": "discretized-logistic",
    "prior_model.width": 192,
    "prior_model.layers": 4,
    "prior_model.dropout": 0.1,
    "autoencoder.steps": 10_000,
    "prior.steps": 20_000,
}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"model.decay": 0.95, "model.revive_after": 20, "model.levels": 17},
    "mnist": _LARGE,
    "fashion-mnist": _LARGE,
    "binarized-mnist": _LARGE | {"model.likelihood": "bernoulli"},
    "cifar10": _LARGE | {"model.num_codes": 512, "model.code_dim": 64, "model.channels": 128},
}


class AutoencoderStage(Stage):
    """Stage one: reconstruction and codebook."""

    name = "autoencoder"

    def __init__(self, config: StageConfig, model: VQVAE, dataset: ImageDataset):
        self.config = config
        self.modules = {"autoencoder": model}
        self.dataset = dataset
        self.model = model
        self.variance = data_variance(dataset)

    def train_source(self) -> Source:
        return TensorSource(images=self.dataset.train.images)

    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws) -> PhaseLoss:
        images = batch["images"]
        output = nets["autoencoder"](images)
        relative_mse = (output.reconstruction.float() - images).square().mean() / self.variance
        reconstruction, logs = relative_mse, {"relative_mse": relative_mse}
        if output.log_likelihood is not None:
            reconstruction = -output.log_likelihood.mean() / images[0].numel()
            logs["nats_per_dim"] = reconstruction
        loss = reconstruction + output.vq_loss
        logs |= {"loss": loss, "vq_loss": output.vq_loss}
        return PhaseLoss(loss, logs | {"histograms": code_histograms(output.codes, self.model)})

    def summarise(self, logs: dict[str, Tensor]) -> dict[str, float]:
        scalars = {name: value.item() for name, value in logs.items() if name != "histograms"}
        return scalars | codebook_measures(logs["histograms"])

    def validate(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        return reconstruction_measures(_vqvae(modules), self.dataset.valid, self.variance)

    def draw(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        model = _vqvae(modules)
        images = self.dataset.valid.images[:_DRAWN]
        device = next(model.parameters()).device
        reconstructions = model.decode(model.encode(images.to(device))).cpu()
        pairs = torch.stack([images, reconstructions], dim=1).flatten(0, 1)
        return {"reconstructions": pairs}


class PriorStage(Stage):
    """Stage two: the likelihood of the frozen autoencoder's codes."""

    name = "prior"

    def __init__(
        self, config: StageConfig, prior: CodePrior, autoencoder: VQVAE, dataset: ImageDataset
    ):
        self.config = config
        self.modules = {"prior": prior}
        self.autoencoder = autoencoder
        self.dataset = dataset
        self.positions = math.prod(prior.grid_shape)

    def train_source(self) -> Source:
        labels = self.dataset.train.labels if _conditional(self.modules) else None
        codes = encode_all(self.autoencoder, self.dataset.train.images)
        return TensorSource(codes=codes, labels=labels)

    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws) -> PhaseLoss:
        codes = batch["codes"].flatten(1)
        logits = nets["prior"](codes, batch.get("labels")).float()
        nats_per_code = nn.functional.cross_entropy(logits.transpose(1, 2), codes)
        return PhaseLoss(nats_per_code, {"nats_per_code": nats_per_code})

    def summarise(self, logs: dict[str, Tensor]) -> dict[str, float]:
        return {"nats_per_code": logs["nats_per_code"].item()}

    def validate(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        return prior_measures(_prior(modules), self.autoencoder, self.dataset.valid)

    def draw(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        prior = _prior(modules)
        device = prior.position.device
        generator = torch.Generator(device).manual_seed(_DRAW_SEED)
        labels = balanced_labels(2 * _DRAWN, prior.num_classes, device)
        codes = prior.sample(2 * _DRAWN, labels, generator=generator)
        return {"samples": self.autoencoder.decode(codes).cpu()}


class VQVAETask(Task):
    """Autoencoder and prior for one data set.

    Raises:
        ValueError: sizes that do not fit the images, or images that the likelihood is not for.
    """

    def __init__(self, config: VQVAEConfig, dataset: ImageDataset):
        self.dataset = dataset
        model = VQVAE(dataset.image_shape, **vars(config.model))
        prior_options = vars(config.prior_model).copy()
        num_classes = dataset.num_classes if prior_options.pop("conditional") else None
        prior = CodePrior(
            model.num_codes, model.grid_shape, num_classes=num_classes, **prior_options
        )
        for name in ("train", "valid", "test"):
            check = check_unit_range if model.likelihood is None else model.likelihood.check
            check(getattr(dataset, name).images, f"{name} images of {dataset.name}")
        self.autoencoder, self.prior, self.levels = model, prior, config.model.levels
        self.modules = {"autoencoder": model, "prior": prior}
        self.stages = [
            AutoencoderStage(config.autoencoder, model, dataset),
            PriorStage(config.prior, prior, model, dataset),
        ]

    def sample(
        self, num: int, *, labels: Tensor | None, temperature: float, generator: torch.Generator
    ) -> Tensor:
        device = self.prior.position.device
        if labels is None:
            labels = balanced_labels(num, self.prior.num_classes, device)
        codes = self.prior.sample(num, labels, temperature=temperature, generator=generator)
        return self.autoencoder.decode(codes)

    def evaluate(self) -> dict[str, dict[str, float]]:
        model, prior, variance = self.autoencoder, self.prior, data_variance(self.dataset)
        pixels = None
        if model.likelihood is None:
            pixels = fit_pixels(model, self.dataset.train.images, self.levels)
        return {
            name: reconstruction_measures(model, split, variance)
            | prior_measures(prior, model, split)
            | likelihood_measures(model, prior, split, pixels)
            for name, split in (("valid", self.dataset.valid), ("test", self.dataset.test))
        }


def data_variance(dataset: ImageDataset) -> float:
    """Variance of the training pixels about their common mean."""
    return dataset.train.images.var(correction=0).item()


def balanced_labels(num: int, num_classes: int | None, device: torch.device) -> Tensor | None:
    """(num,) labels 0, 1, ... over and over; None without classes."""
    return None if num_classes is None else torch.arange(num, device=device) % num_classes


def _vqvae(modules: Mapping[str, nn.Module]) -> VQVAE:
    model = modules["autoencoder"]
    assert isinstance(model, VQVAE)
    return model


def _prior(modules: Mapping[str, nn.Module]) -> CodePrior:
    prior = modules["prior"]
    assert isinstance(prior, CodePrior)
    return prior


def _conditional(modules: Mapping[str, nn.Module]) -> bool:
    return _prior(modules).num_classes is not None
