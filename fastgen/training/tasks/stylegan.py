"""StyleGAN: a stage for each resolution, each beginning with the fade-in of its layers.

Karras et al. 2019 (arXiv 1812.04948) and 2018 (arXiv 1710.10196). As in the paper's code every
resolution begins with fresh optimisers; what a smaller one does not use yet is not trained. With
averaged weights each stage starts from the generator's averages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fastgen.data import ImageDataset, Source, TensorSource
from fastgen.losses import (
    gradient_penalty,
    nonsaturating_discriminator_loss,
    nonsaturating_generator_loss,
    r1_penalty,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
)
from fastgen.metrics import frechet_distance
from fastgen.models import StyleGANDiscriminator, StyleGANGenerator
from fastgen.models.stylegan import fade_images, level_of, to_unit
from fastgen.training.config import EngineConfig, OptimizerConfig, StageConfig
from fastgen.training.draws import Draws
from fastgen.training.ranges import (
    BelowOne,
    Channels,
    Count,
    MaybeDepth,
    Options,
    Range,
    Share,
    Steps,
    Weight,
)
from fastgen.training.tasks.base import Batch, Nets, PhaseLoss, Stage, Task

_SEED = 1234
_GRID = 8
_MIXED = 6
_MEASURED = 1000
_AT_ONCE = 100
_JUDGED_SIDE = 8


_Side = Annotated[int, Range(4, 2**12)]


@dataclass
class ModelConfig(Options):
    """The networks.

    Args:
        resolution: side of the images, a power of two; smaller ones get a border of zeros.
        latent_dim: dimensions of z and w.
        mapping_layers: depth of the mapping; the paper has 8.
        mapping_lr: its learning rate, relative to that of all else. At the paper's 0.01 a mapping
            hardly moves in ten thousand steps.
        channel_base: feature maps of a layer times its side.
        channel_max: most feature maps of a layer.
        group_size: images whose spread the discriminator sees together.
    """

    resolution: _Side = 32
    latent_dim: Channels = 64
    mapping_layers: MaybeDepth = 4
    mapping_lr: Annotated[float, Range(0, 100, above=True)] = 0.1
    channel_base: Annotated[int, Range(1, 2**20)] = 512
    channel_max: Channels = 64
    group_size: Count = 4


@dataclass
class ObjectiveConfig(Options):
    """What the two networks minimise.

    Args:
        loss: non-saturating with the R1 penalty, or Wasserstein with the gradient penalty.
        gamma: weight of R1; the paper's 10 is for sides of 1024. The fewer pixels show a
            difference, the steeper is a discriminator that sees it.
        penalty: weight of the gradient penalty.
        drift: weight of squared scores, which keeps Wasserstein scores near 0.
        penalty_every: steps between penalties, then so many times their weight.
        mixing: probability that an image has the styles of two latents; the paper has 0.9.
        mirror: turn half of the images round.
    """

    loss: Literal["nonsaturating-r1", "wgan-gp"] = "nonsaturating-r1"
    gamma: Weight = 0.1
    penalty: Weight = 10.0
    drift: Weight = 1e-3
    penalty_every: Count = 1
    mixing: Share = 0.5
    mirror: bool = False


@dataclass
class GrowthConfig(Options):
    """The resolutions, from `start` on, each twice the last.

    Args:
        start: side of the first images.
        steps: of each resolution, with its fade-in.
        batch_size: of each resolution, or one for all.
        fade: part of a resolution's steps in which its layers are faded in.
    """

    start: _Side = 8
    steps: list[Steps] = field(default_factory=lambda: [1500, 2500, 6000])
    batch_size: list[Count] = field(default_factory=lambda: [32])
    fade: BelowOne = 0.3


@dataclass
class StyleGANConfig(Options):
    """Recipe `stylegan`.

    Args:
        data: name of a data set, or a folder of images.
        data_root: folder of the data files; by default the environment variable FASTGEN_DATA.
        model: the networks.
        objective: the losses.
        growth: lengths and batches of the stages.
        optimizer: of both networks, in every stage.
        engine: what is common to all recipes.
    """

    data: str = "mnist"
    data_root: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=2e-3, betas=(0.0, 0.99), warmup_steps=0, final_lr=1.0
        )
    )
    engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(
            ema_decay=0.998, valid_every=500, sample_every=500, checkpoint_every=500
        )
    )


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "model.resolution": 8,
        "model.channel_base": 256,
        "growth.start": 4,
        "growth.steps": [500, 1500],
        "engine.ema_decay": 0.98,
    },
    "cifar10": {
        "model.channel_base": 1024,
        "model.channel_max": 128,
        "model.latent_dim": 128,
        "objective.mirror": True,
    },
}


class StyleGANStage(Stage):
    """One resolution: a step of the discriminator, then one of the generator."""

    averaged = ("generator",)

    def __init__(
        self, config: StageConfig, options: StyleGANConfig, task: StyleGANTask, level: int
    ):
        self.name = f"{4 << level}x{4 << level}"
        self.config = config
        self.objective = options.objective
        self.level = level
        self.generator, self.discriminator = task.generator, task.discriminator
        self.modules = dict(task.modules)
        self.task = task
        self.rows_together = self.discriminator.spread.group_size
        self.fade_steps = 0
        if level > level_of(options.growth.start):
            self.fade_steps = round(options.growth.fade * config.steps)

    def train_source(self) -> Source:
        return TensorSource(images=self.task.at_level(self.task.dataset.train.images, self.level))

    def optimizers(self) -> dict[str, Optimizer]:
        """Also lets nothing but what this resolution uses be trained: all of it has gradients."""
        built = {}
        for name, module in (
            ("discriminator", self.discriminator),
            ("generator", self.generator),
        ):
            module.requires_grad_(False)
            for parameter in module.parameters_at(self.level, fading=self.fade_steps > 0):
                parameter.requires_grad_(True)
            built[name] = self.config.optimizer.build([module])
        return built

    def alpha(self) -> float:
        """How far this resolution is faded in: 0 in its first step, 1 from `fade_steps` on."""
        return min(self.steps_done / self.fade_steps, 1.0) if self.fade_steps else 1.0

    def _blend(self, device: torch.device) -> float | Tensor:
        """Alpha, a tensor wherever there is something to blend, so that all layers stay in use."""
        return torch.tensor(self.alpha(), device=device) if self.fade_steps else 1.0

    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws) -> PhaseLoss:
        images = batch["images"]
        alpha = self._blend(images.device)
        generate = partial(self._generate, nets["generator"], draws, alpha)
        if phase == "generator":
            # unwrapped: only the generator's gradients are wanted, and to be summed over processes
            self._train_discriminator(False)
            loss = self._generator_loss(self.discriminator(generate(), alpha=alpha))
            self._train_discriminator(True)
            return PhaseLoss(loss, {"generator_loss": loss})
        self.generator.grow(self.level, self.alpha())
        with torch.no_grad():
            fake = generate()
        real = self._real(images, draws, alpha)
        return self._discriminator_loss(nets, real, fake, draws, alpha)

    def _generate(self, generator: Any, draws: Draws, alpha: float | Tensor) -> Tensor:
        level, layers = self.level, self.generator.layers_at(self.level)
        z, other = (draws.normal(self.generator.latent_dim) for _ in range(2))
        mixed = draws.uniform() < self.objective.mixing
        crossover = torch.where(mixed, draws.integers(1, layers), layers)
        noise = [draws.normal(*shape) for shape in self.generator.noise_shapes(level)]
        return generator(z, other=other, crossover=crossover, level=level, alpha=alpha, noise=noise)

    def _real(self, images: Tensor, draws: Draws, alpha: float | Tensor) -> Tensor:
        if self.objective.mirror:
            turned = draws.uniform(1, 1, 1) < 0.5
            images = torch.where(turned, images.flip(3), images)
        return fade_images(2 * images - 1, alpha)

    def _train_discriminator(self, wanted: bool) -> None:
        for parameter in self.discriminator.parameters_at(self.level, fading=self.fade_steps > 0):
            parameter.requires_grad_(wanted)

    def _generator_loss(self, scores: Tensor) -> Tensor:
        if self.objective.loss == "wgan-gp":
            return wasserstein_generator_loss(scores)
        return nonsaturating_generator_loss(scores)

    def _discriminator_loss(
        self, nets: Nets, real: Tensor, fake: Tensor, draws: Draws, alpha: float | Tensor
    ) -> PhaseLoss:
        options = self.objective
        discriminate = partial(nets["discriminator"], alpha=alpha)
        penalised = self.steps_done % options.penalty_every == 0
        wasserstein = options.loss == "wgan-gp"
        real.requires_grad_(penalised and not wasserstein)
        real_scores, fake_scores = discriminate(real), discriminate(fake)
        penalty = torch.zeros((), device=real.device)
        if wasserstein:
            loss = wasserstein_discriminator_loss(real_scores, fake_scores)
            loss = loss + options.drift * real_scores.square().mean()
            if penalised:
                mix = draws.uniform()
                penalty = options.penalty * gradient_penalty(discriminate, real, fake, mix)
        else:
            loss = nonsaturating_discriminator_loss(real_scores, fake_scores)
            if penalised:
                penalty = options.gamma * r1_penalty(real_scores, real)
        # weighted by what was left out since the last one
        penalty = penalty * options.penalty_every
        logs = {
            "discriminator_loss": loss,
            "penalty": penalty,
            "score_real": real_scores.mean(),
            "score_fake": fake_scores.mean(),
        }
        return PhaseLoss(loss + penalty, logs)

    def summarise(self, logs: dict[str, Tensor]) -> dict[str, float]:
        return {name: value.item() for name, value in logs.items()} | {"alpha": self.alpha()}

    def validate(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        generator, discriminator = _networks(modules)
        generator.grow(self.level, self.alpha())
        return self.task.measure(generator, discriminator, "valid")

    def draw(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        generator, _ = _networks(modules)
        generator.grow(self.level, self.alpha())
        return pictures(generator)


class StyleGANTask(Task):
    """StyleGAN for one data set.

    Raises:
        ValueError: sizes that do not fit, or options that exclude each other.
    """

    def __init__(self, config: StyleGANConfig, dataset: ImageDataset):
        if config.engine.compile:
            raise ValueError(
                "engine.compile must be false: the penalties are of second order, which compiled "
                "networks do not have"
            )
        options = dict(vars(config.model))
        resolution, group_size = options.pop("resolution"), options.pop("group_size")
        widths = {name: options[name] for name in ("channel_base", "channel_max")}
        channels = dataset.image_shape[0]
        self.generator = StyleGANGenerator(resolution, channels, **options)
        self.discriminator = StyleGANDiscriminator(
            resolution, channels, group_size=group_size, **widths
        )
        self.modules = {"generator": self.generator, "discriminator": self.discriminator}
        self.dataset = dataset
        self.border = _border(dataset, resolution)
        self.stages = [
            StyleGANStage(stage, config, self, level)
            for level, stage in zip(_levels(config), _stage_configs(config), strict=True)
        ]

    def at_level(self, images: Tensor, level: int) -> Tensor:
        """Data (N, C, H, W) with its border, averaged down to the side of a level."""
        images = F.pad(images, self.border)
        factor = 1 << (self.generator.top - level)
        return F.avg_pool2d(images, factor) if factor > 1 else images

    def sample(
        self, num: int, *, labels: Tensor | None, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """Images without the border, of the data's size; `temperature` is psi of the truncation.

        Raises:
            ValueError: labels are given, or `temperature` is negative.
        """
        if labels is not None:
            raise ValueError("this generator has no classes: leave out --label")
        if not temperature >= 0:
            raise ValueError(f"temperature (psi) must not be negative, got {temperature}")
        images = self.generator.sample(num, psi=temperature, generator=generator)
        images = F.interpolate(images, size=(4 << self.generator.top,) * 2)
        left, _, top, _ = self.border
        height, width = self.dataset.image_shape[1:]
        return images[:, :, top : top + height, left : left + width]

    def evaluate(self) -> dict[str, dict[str, float]]:
        return {
            split: self.measure(self.generator, self.discriminator, split)
            for split in ("valid", "test")
        }

    @torch.no_grad()
    def measure(
        self, generator: StyleGANGenerator, discriminator: StyleGANDiscriminator, split: str
    ) -> dict[str, float]:
        """Mean scores of a split, of training images and of samples, and a Frechet distance.

        Scores of the split well below those of training images: the discriminator knows the latter
        by heart. The distance is that of the pixels of 8x8 averages: a look at progress, to be
        compared within one run only; `fastgen eval --features` judges by a network.
        """
        device = generator.constant.device
        level, alpha = int(generator.growth[0]), float(generator.growth[1])

        def prepared(images: Tensor) -> Tensor:
            count = min(_MEASURED, len(images))
            chosen = torch.arange(count) * len(images) // count
            # a split may be sorted by class, and a group of neighbours would vary less
            order = torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))
            chosen = chosen[order]
            real = self.at_level(images[chosen], level)
            return fade_images(real, alpha) if level else real

        real = prepared(getattr(self.dataset, split).images)
        seen = prepared(self.dataset.train.images)
        rng = torch.Generator(device).manual_seed(_SEED)
        fake = torch.cat(
            [
                generator.sample(len(part), generator=rng).cpu()
                for part in torch.arange(len(real)).split(_AT_ONCE)
            ]
        )

        def score(images: Tensor) -> float:
            parts = (part.to(device) for part in images.split(_AT_ONCE))
            scores = [_scores(discriminator, 2 * part - 1, alpha) for part in parts]
            return torch.cat(scores).mean().item()

        return {
            "score": score(real),
            "score_train": score(seen),
            "score_samples": score(fake),
            "frechet_8x8": frechet_distance(_judged(real), _judged(fake)),
        }


def _scores(discriminator: StyleGANDiscriminator, images: Tensor, alpha: float) -> Tensor:
    """Of whole groups: a smaller one would have another spread."""
    group = discriminator.spread.group_size
    count = len(images) // group * group or len(images)
    return discriminator(images[:count], alpha=alpha)


def _judged(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images, _JUDGED_SIDE).flatten(1)


@torch.no_grad()
def pictures(generator: StyleGANGenerator) -> dict[str, Tensor]:
    """Samples, the same truncated, and the mixing of styles: square grids of (C, H, W) images.

    Mixing: the first row has the coarse layers' styles, the first column those of the finer ones.
    """
    device = generator.constant.device

    def rng() -> torch.Generator:
        return torch.Generator(device).manual_seed(_SEED)

    layers = generator.layers_at(int(generator.growth[0]))
    coarse, fine = torch.randn(2, _MIXED, generator.latent_dim, device=device, generator=rng())
    mixed = generator.style_mixing(coarse, fine, layers // 2)
    columns = to_unit(generator(coarse, noise=False))
    rows = to_unit(generator(fine, noise=False))
    first = torch.cat([torch.ones_like(columns[:1]), columns])[None]
    table = torch.cat([first, torch.cat([rows[:, None], mixed], 1)])
    return {
        "samples": generator.sample(_GRID * _GRID, generator=rng()).cpu(),
        "truncated": generator.sample(_GRID * _GRID, psi=0.7, generator=rng()).cpu(),
        "mixing": table.flatten(0, 1).cpu(),
    }


def _border(dataset: ImageDataset, resolution: int) -> tuple[int, int, int, int]:
    """Zeros to the left, right, top and bottom that make the images as large as the model's."""
    height, width = dataset.image_shape[1:]
    if max(height, width) > resolution:
        raise ValueError(
            f"model.resolution must be at least the side of the images, {max(height, width)}, "
            f"got {resolution}"
        )
    x, y = resolution - width, resolution - height
    return x // 2, x - x // 2, y // 2, y - y // 2


def _levels(config: StyleGANConfig) -> list[int]:
    first, last = level_of(config.growth.start), level_of(config.model.resolution)
    if first > last:
        raise ValueError(
            f"growth.start must be at most model.resolution, {config.model.resolution}, "
            f"got {config.growth.start}"
        )
    return list(range(first, last + 1))


def _stage_configs(config: StyleGANConfig) -> list[StageConfig]:
    growth, count = config.growth, len(_levels(config))
    sides = f"{config.growth.start} to {config.model.resolution}"
    if len(growth.steps) != count:
        raise ValueError(
            f"growth.steps must be {count} numbers, one for each side from {sides}, "
            f"got {growth.steps}"
        )
    batches = growth.batch_size * count if len(growth.batch_size) == 1 else growth.batch_size
    if len(batches) != count:
        raise ValueError(
            f"growth.batch_size must be one number, or {count} for the sides from {sides}, "
            f"got {growth.batch_size}"
        )
    for batch in batches:
        _check_groups(batch // config.engine.accumulate, config.model.group_size)
    return [
        StageConfig(steps, batch, replace(config.optimizer))
        for steps, batch in zip(growth.steps, batches, strict=True)
    ]


def _check_groups(batch: int, group_size: int) -> None:
    if group_size < 1 or (batch > group_size and batch % group_size):
        raise ValueError(
            f"growth.batch_size / engine.accumulate must be a multiple of model.group_size, "
            f"got {batch} and {group_size}"
        )


def _networks(
    modules: Mapping[str, nn.Module],
) -> tuple[StyleGANGenerator, StyleGANDiscriminator]:
    generator, discriminator = modules["generator"], modules["discriminator"]
    assert isinstance(generator, StyleGANGenerator)
    assert isinstance(discriminator, StyleGANDiscriminator)
    return generator, discriminator
