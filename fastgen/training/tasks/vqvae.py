"""VQ-VAE in two stages: the autoencoder, then an autoregressive prior on its frozen codes.

van den Oord et al., 2017 (arXiv 1711.00937): the first stage minimises eq. 3 with the
reconstruction error in units of the data's variance, the second the negative log likelihood of the
codes (section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen.data import ImageDataset, ImageSplit
from fastgen.metrics import code_histogram, codebook_perplexity, codebook_usage
from fastgen.models import VQVAE, CodePrior
from fastgen.training.config import EngineConfig, OptimizerConfig, StageConfig
from fastgen.training.tasks.base import (
    Batch,
    Nets,
    PhaseLoss,
    Stage,
    Task,
)

_EVAL_BATCH = 500
_DRAWN = 32
_DRAW_SEED = 1234


@dataclass
class ModelConfig:
    """The autoencoder.

    Args:
        num_codes: codebook size.
        code_dim: width of a code.
        channels: width of the convolutions.
        residual_blocks: residual blocks in encoder and decoder each.
        downsamplings: halvings of the image's side.
        codebook: how the codebook learns: moving averages or the gradient.
        decay: decay of the moving averages.
        commitment_weight: beta of eq. 3.
        kmeans_init: start the codebook at the first batch's k-means.
        revive_after: steps without use after which a code is moved onto an input; null for never.
    """

    num_codes: int = 64
    code_dim: int = 8
    channels: int = 64
    residual_blocks: int = 2
    downsamplings: int = 1
    codebook: Literal["ema", "gradient"] = "ema"
    decay: float = 0.99
    commitment_weight: float = 0.25
    kmeans_init: bool = True
    revive_after: int | None = 100


@dataclass
class PriorConfig:
    """The transformer over the code grid.

    Args:
        width, layers, heads: its size.
        dropout: dropout probability.
        conditional: condition on the labels, where the data set has them.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    conditional: bool = True


@dataclass
class VQVAEConfig:
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
    "prior_model.width": 192,
    "prior_model.layers": 4,
    "prior_model.dropout": 0.1,
    "autoencoder.steps": 10_000,
    "prior.steps": 20_000,
}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"model.decay": 0.95, "model.revive_after": 20},
    "mnist": _LARGE,
    "fashion-mnist": _LARGE,
    "binarized-mnist": _LARGE,
    "cifar10": _LARGE | {"model.num_codes": 512, "model.code_dim": 64, "model.channels": 128},
}


class AutoencoderStage(Stage):
    """Stage one: reconstruction and codebook."""

    name = "autoencoder"

    def __init__(self, config: StageConfig, model: VQVAE, dataset: ImageDataset):
        self.config = config
        self.modules = {"autoencoder": model}
        self.dataset = dataset
        self.num_codes = model.num_codes
        self.variance = data_variance(dataset)

    def train_tensors(self) -> dict[str, Tensor | None]:
        return {"images": self.dataset.train.images}

    def loss(self, phase: str, nets: Nets, batch: Batch) -> PhaseLoss:
        images = batch["images"]
        output = nets["autoencoder"](images)
        relative_mse = (output.reconstruction.float() - images).square().mean() / self.variance
        loss = relative_mse + output.vq_loss
        return PhaseLoss(
            loss,
            {
                "loss": loss,
                "relative_mse": relative_mse,
                "vq_loss": output.vq_loss,
                "histogram": code_histogram(output.codes, self.num_codes),
            },
        )

    def summarise(self, logs: dict[str, Tensor]) -> dict[str, float]:
        scalars = {name: logs[name].item() for name in ("loss", "relative_mse", "vq_loss")}
        return scalars | _codebook_measures(logs["histogram"])

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

    def train_tensors(self) -> dict[str, Tensor | None]:
        labels = self.dataset.train.labels if _conditional(self.modules) else None
        return {"codes": encode_all(self.autoencoder, self.dataset.train.images), "labels": labels}

    def loss(self, phase: str, nets: Nets, batch: Batch) -> PhaseLoss:
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
        ValueError: sizes that do not fit the images.
    """

    def __init__(self, config: VQVAEConfig, dataset: ImageDataset):
        self.dataset = dataset
        model = VQVAE(dataset.image_shape, **vars(config.model))
        prior_options = vars(config.prior_model).copy()
        num_classes = dataset.num_classes if prior_options.pop("conditional") else None
        prior = CodePrior(
            model.num_codes, model.grid_shape, num_classes=num_classes, **prior_options
        )
        self.autoencoder, self.prior = model, prior
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
        variance = data_variance(self.dataset)
        return {
            name: reconstruction_measures(self.autoencoder, split, variance)
            | prior_measures(self.prior, self.autoencoder, split)
            for name, split in (("valid", self.dataset.valid), ("test", self.dataset.test))
        }


def data_variance(dataset: ImageDataset) -> float:
    """Variance of the training pixels about their common mean."""
    return dataset.train.images.var(correction=0).item()


def balanced_labels(num: int, num_classes: int | None, device: torch.device) -> Tensor | None:
    """(num,) labels 0, 1, ... over and over; None without classes."""
    return None if num_classes is None else torch.arange(num, device=device) % num_classes


@torch.no_grad()
def encode_all(model: VQVAE, images: Tensor) -> Tensor:
    """Codes (N, h, w) of all images (N, C, H, W), on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model.encode(part.to(device)).cpu() for part in images.split(_EVAL_BATCH)])


@torch.no_grad()
def reconstruction_measures(model: VQVAE, split: ImageSplit, variance: float) -> dict[str, float]:
    """Mean squared error, also relative to the data's variance, and the use of the codebook."""
    device = next(model.parameters()).device
    error, histogram = 0.0, torch.zeros(model.num_codes)
    for images in split.images.split(_EVAL_BATCH):
        codes = model.encode(images.to(device))
        error += (model.decode(codes).cpu() - images).square().sum().item()
        histogram += code_histogram(codes, model.num_codes).cpu() * len(images)
    mse = error / split.images.numel()
    return {"mse": mse, "relative_mse": mse / variance} | _codebook_measures(histogram)


@torch.no_grad()
def prior_measures(prior: CodePrior, autoencoder: VQVAE, split: ImageSplit) -> dict[str, float]:
    """Negative log likelihood of the codes, in nats a code, beside that of uniform codes, log K."""
    device = prior.position.device
    total = 0.0
    labels = split.labels if prior.num_classes is not None else None
    codes = encode_all(autoencoder, split.images)
    for i in range(0, len(codes), _EVAL_BATCH):
        part = slice(i, i + _EVAL_BATCH)
        given = None if labels is None else labels[part].to(device)
        total -= prior.log_prob(codes[part].to(device), given).sum().item()
    return {
        "nats_per_code": total / codes.numel(),
        "uniform_nats_per_code": math.log(prior.num_codes),
    }


def _codebook_measures(histogram: Tensor) -> dict[str, float]:
    return {
        "usage": codebook_usage(histogram).item(),
        "perplexity": codebook_perplexity(histogram).item(),
    }


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
