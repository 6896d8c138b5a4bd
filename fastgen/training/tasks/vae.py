"""VAE: one stage, trained on the evidence lower bound or the importance-weighted bound.

Kingma and Welling 2014 (arXiv 1312.6114); Burda, Grosse and Salakhutdinov 2016 (arXiv 1509.00519),
whose test likelihood, the bound with thousands of samples, is what `evaluate` gives. All values
are nats an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgen.data import ImageDataset, ImageSplit, Source, TensorSource
from fastgen.losses import Bernoulli, Gaussian, check_unit_range
from fastgen.metrics import bits_per_dim, mean_and_error
from fastgen.models import VAE
from fastgen.random import fold_in, make_key
from fastgen.training.config import EngineConfig, OptimizerConfig, StageConfig
from fastgen.training.draws import Draws
from fastgen.training.ranges import (
    BelowOne,
    Count,
    Levels,
    MaybeDepth,
    Options,
    Range,
    Steps,
    Weight,
    Width,
)
from fastgen.training.tasks.base import Batch, Nets, PhaseLoss, Stage, Task

_EVAL_DECODED = 2000
_EVAL_BATCH = 50
_EVAL_SEED = 1234
_ACTIVE_VARIANCE = 0.01
_GRID = 8
_TRAVERSED = 10


@dataclass
class ModelConfig(Options):
    """The model.

    Args:
        latent_dim: number of latents.
        network: perceptrons, or convolutions that halve the sides.
        width: of the hidden layers; a first convolution has width / 16 channels.
        layers: hidden layers, or halvings, in encoder and decoder each.
        dropout: probability, in the encoder.
        likelihood: of the pixels. Bernoulli is for binary images; the discretised logistic gives a
            probability to each stored value, the Gaussian a density.
        scale: of the latter two: learned for a channel, or given by the decoder for a pixel.
        levels: how many values a pixel has, for the discretised logistic.
        kl: in closed form, or estimated from the sample.
    """

    latent_dim: Width = 50
    network: Literal["mlp", "conv"] = "mlp"
    width: Width = 500
    layers: MaybeDepth = 2
    dropout: BelowOne = 0.0
    likelihood: Literal["bernoulli", "gaussian", "discretized-logistic"] = "bernoulli"
    scale: Literal["shared", "pixel"] = "shared"
    levels: Levels = 256
    kl: Literal["analytic", "mc"] = "analytic"


@dataclass
class ObjectiveConfig(Options):
    """What is maximised.

    Args:
        samples: latents an image; with several it is the importance-weighted bound.
        elbo_steps: steps with one sample before that, `samples` times cheaper; the learning rate
            rises and falls in each of the two.
        beta: weight of the KL in the evidence lower bound.
        beta_warmup_steps: steps in which the weight rises to beta from 0.
        free_bits: nats that each latent's KL costs at least.
        binarize: what the Bernoulli likelihood does with grey pixels: draw each as 0 or 1 with its
            value as the probability, anew in every step, once for validation and test; or refuse
            them.
    """

    samples: Annotated[int, Range(1, 10**5)] = 1
    elbo_steps: Steps = 0
    beta: Weight = 1.0
    beta_warmup_steps: Steps = 0
    free_bits: Weight = 0.0
    binarize: Literal["dynamic", "no"] = "dynamic"

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.beta == 1 and not self.free_bits
        if self.samples > 1 and not (plain and self.beta_warmup_steps <= self.elbo_steps):
            raise ValueError(
                "objective.beta, beta_warmup_steps and free_bits weigh the KL of one sample; the "
                f"importance-weighted bound of {self.samples} samples has none: leave them as they "
                "are, and end the warm-up within elbo_steps"
            )


@dataclass
class EvaluationConfig(Options):
    """What `fastgen eval` measures.

    Args:
        samples: importance samples an image of the log likelihood.
        images: take only so many images of a split, evenly spaced; null for all.
        splits: where to measure.
    """

    samples: Annotated[int, Range(1, 10**7)] = 1000
    images: Count | None = None
    splits: list[Literal["valid", "test"]] = field(default_factory=lambda: ["test"])


@dataclass
class VAEConfig(Options):
    """Recipe `vae`.

    Args:
        data: name of the data set, or an .npz file.
        data_root: folder of the data files; by default the environment variable FASTGEN_DATA.
        model: the model.
        objective: the bound.
        vae: optimisation.
        evaluation: what `fastgen eval` measures.
        engine: what is common to all recipes.
    """

    data: str = "digits"
    data_root: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    vae: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=2000, batch_size=100, optimizer=OptimizerConfig(lr=1e-3, final_lr=0.01)
        )
    )
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(ema_decay=0.999))


_LARGE: dict[str, Any] = {
    "vae.steps": 100_000,
    "engine.valid_every": 1000,
    "engine.sample_every": 10_000,
    "engine.checkpoint_every": 2500,
}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"model.latent_dim": 8, "model.width": 128, "engine.ema_decay": 0.99},
    "mnist": _LARGE,
    "fashion-mnist": _LARGE,
    "binarized-mnist": _LARGE | {"model.network": "conv", "model.width": 256},
    "cifar10": _LARGE
    | {
        "model.network": "conv",
        "model.width": 512,
        "model.latent_dim": 128,
        "model.likelihood": "discretized-logistic",
    },
}


class VAEStage(Stage):
    """Maximises the bound."""

    name = "vae"

    def __init__(
        self, config: StageConfig, objective: ObjectiveConfig, model: VAE, dataset: ImageDataset
    ):
        self.config = config
        self.objective = objective
        self.modules = {"vae": model}
        self.dataset = dataset
        self.latent_dim = model.latent_dim
        self.binarize = isinstance(model.likelihood, Bernoulli) and not _is_binary(
            dataset.train.images
        )

    def train_source(self) -> Source:
        return TensorSource(images=self.dataset.train.images)

    def lr(self, step: int) -> float:
        first, steps = self.objective.elbo_steps, self.config.steps
        if step < first:
            return self.config.optimizer.lr_at(step, min(first, steps))
        return self.config.optimizer.lr_at(step - first, steps - first)

    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws) -> PhaseLoss:
        images = draws.bernoulli(batch["images"]) if self.binarize else batch["images"]
        options, samples, latent_dim = self.objective, self._samples(), self.latent_dim
        bound, log_likelihood, kl = nets["vae"](
            images,
            samples=samples,
            beta=self._beta(images.device),
            free_bits=options.free_bits,
            **draws.normal_source(*((samples, latent_dim) if samples > 1 else (latent_dim,))),
        )
        loss = -bound.mean()
        return PhaseLoss(
            loss, {"loss": loss, "reconstruction": -log_likelihood.mean(), "kl": kl.mean()}
        )

    def _samples(self) -> int:
        return 1 if self.steps_done < self.objective.elbo_steps else self.objective.samples

    def _beta(self, device: torch.device) -> float | Tensor:
        """A tensor while it moves, so that a compiled network is not compiled again."""
        options = self.objective
        if not options.beta_warmup_steps:
            return options.beta
        share = min(self.steps_done / options.beta_warmup_steps, 1.0)
        return torch.tensor(options.beta * share, device=device)

    def summarise(self, logs: dict[str, Tensor]) -> dict[str, float]:
        return {name: value.item() for name, value in logs.items()}

    def validate(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        return bound_measures(_vae(modules), self.dataset.valid, self._samples())

    def draw(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        return pictures(_vae(modules), self.dataset.valid.images)


class VAETask(Task):
    """A VAE for one data set.

    Raises:
        ValueError: sizes that do not fit, or images that the likelihood is not for.
    """

    def __init__(self, config: VAEConfig, dataset: ImageDataset):
        self.model = VAE(dataset.image_shape, **vars(config.model))
        self.modules = {"vae": self.model}
        self.evaluation = config.evaluation
        self.dataset = self._fit(dataset, config.objective.binarize == "dynamic")
        self.stages = [VAEStage(config.vae, config.objective, self.model, self.dataset)]

    def _fit(self, dataset: ImageDataset, binarize: bool) -> ImageDataset:
        """The data set as the likelihood takes it; training images are binarised in each step."""
        splits = {"train": dataset.train, "valid": dataset.valid, "test": dataset.test}
        drawn = binarize and isinstance(self.model.likelihood, Bernoulli)
        check = check_unit_range if drawn else self.model.likelihood.check
        for name, split in splits.items():
            check(split.images, f"{name} images of {dataset.name}")
        if not drawn:
            return dataset
        return replace(dataset, valid=_binarized(dataset.valid), test=_binarized(dataset.test))

    def sample(
        self, num: int, *, labels: Tensor | None, temperature: float, generator: torch.Generator
    ) -> Tensor:
        if labels is not None:
            raise ValueError("a VAE has no labels to draw")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        return self.model.sample(num, temperature=temperature, generator=generator)

    def evaluate(self) -> dict[str, dict[str, float]]:
        splits = {"valid": self.dataset.valid, "test": self.dataset.test}
        return {name: self._measure(splits[name]) for name in self.evaluation.splits}

    def _measure(self, split: ImageSplit) -> dict[str, float]:
        options = self.evaluation
        count = min(options.images or len(split), len(split))
        chosen = torch.arange(count) * len(split) // count  # a split may be sorted by class
        split = ImageSplit(split.images[chosen])
        nll, error = mean_and_error(-log_probs(self.model, split.images, options.samples))
        measures = {"nll": nll, "nll_standard_error": error, "samples": float(options.samples)}
        if not isinstance(self.model.likelihood, Gaussian):
            measures["bits_per_dim"] = bits_per_dim(nll, self.model.image_shape)
        return measures | bound_measures(self.model, split)


def log_probs(model: VAE, images: Tensor, samples: int) -> Tensor:
    """log p(x) of all images (N, C, H, W) by `samples` importance samples each: (N,), CPU."""
    generator = torch.Generator(_device(model)).manual_seed(_EVAL_SEED)
    parts = tqdm(images.split(_EVAL_BATCH), desc=f"{samples} importance samples", disable=None)
    return torch.cat(
        [
            model.log_prob(part.to(_device(model)), samples, generator=generator).cpu()
            for part in parts
        ]
    )


@torch.no_grad()
def bound_measures(model: VAE, split: ImageSplit, samples: int = 1) -> dict[str, float]:
    """The negative bound with `samples` samples, of what it is made, and how many latents say
    something: those whose posterior mean varies over the images by more than 0.01 (Burda et al.
    2016, section 5.2)."""
    key = make_key(_EVAL_SEED, device=_device(model))
    sums, means = torch.zeros(3, dtype=torch.float64), []
    for i, images in enumerate(split.images.split(max(_EVAL_DECODED // samples, 1))):
        images = images.to(_device(model))
        terms = model(images, samples=samples, key=fold_in(key, i))
        sums += torch.stack([term.double().sum() for term in terms]).cpu()
        means.append(model.encode(images)[0])
    bound, log_likelihood, kl = (sums / len(split)).tolist()
    active = int((torch.cat(means).var(0, correction=0) > _ACTIVE_VARIANCE).sum())
    return {
        "nll_bound": -bound,
        "reconstruction": -log_likelihood,
        "kl": kl,
        "active_latents": float(active),
    }


@torch.no_grad()
def pictures(model: VAE, images: Tensor) -> dict[str, Tensor]:
    """Reconstructions, samples, interpolations and traversals: square grids of (C, H, W) images."""
    images = images[: 4 * _GRID * _GRID].to(_device(model))
    means = model.encode(images)[0]
    shown = images[: _GRID * _GRID // 2]
    pairs = torch.stack([shown, model.decode(means[: len(shown)])], 1)
    generator = torch.Generator(_device(model)).manual_seed(_EVAL_SEED)
    ends = min(_GRID, len(images))
    lines = model.interpolate(images[:ends], images[-ends:], _GRID)
    most_active = means.var(0, correction=0).argsort(descending=True)[:_TRAVERSED]
    traversals = model.traverse(images[0], most_active, len(most_active))
    return {
        "reconstructions": pairs.flatten(0, 1).cpu(),
        "samples": model.sample(_GRID * _GRID, generator=generator).cpu(),
        "interpolations": lines.transpose(0, 1).flatten(0, 1).cpu(),
        "traversals": traversals.flatten(0, 1).cpu(),
    }


def _binarized(split: ImageSplit) -> ImageSplit:
    """Each pixel drawn with its value as the probability of 1, the same in every run."""
    generator = torch.Generator().manual_seed(_EVAL_SEED)
    return replace(split, images=torch.bernoulli(split.images, generator=generator))


def _is_binary(images: Tensor) -> bool:
    return bool(((images == 0) | (images == 1)).all())


def _device(model: VAE) -> torch.device:
    return next(model.parameters()).device


def _vae(modules: Mapping[str, nn.Module]) -> VAE:
    model = modules["vae"]
    assert isinstance(model, VAE)
    return model
