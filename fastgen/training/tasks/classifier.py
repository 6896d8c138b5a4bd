"""A classifier of the data set's labels: the feature network of `fastgen eval --features`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.data import ImageDataset, ImageSplit, Source, TensorSource
from fastgen.models import Classifier
from fastgen.training.config import EngineConfig, OptimizerConfig, StageConfig
from fastgen.training.draws import Draws
from fastgen.training.ranges import BelowOne, Channels, Options, Width
from fastgen.training.tasks.base import Batch, Nets, PhaseLoss, Stage, Task

_EVAL_BATCH = 500


@dataclass
class ModelConfig(Options):
    """The network.

    Args:
        channels: of the first convolution; the second has twice as many.
        feature_dim: width of the hidden layer.
        dropout: probability.
    """

    channels: Channels = 32
    feature_dim: Width = 128
    dropout: BelowOne = 0.3


@dataclass
class ClassifierConfig(Options):
    """Recipe `classifier`.

    Args:
        data: name of a data set with labels.
        data_root: folder of the data files; by default the environment variable FASTGEN_DATA.
        model: the network.
        classifier: optimisation.
        engine: what is common to all recipes.
    """

    data: str = "digits"
    data_root: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    classifier: StageConfig = field(
        default_factory=lambda: StageConfig(
            steps=500, batch_size=100, optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.01)
        )
    )
    engine: EngineConfig = field(default_factory=EngineConfig)


PRESETS: dict[str, dict[str, Any]] = {
    "mnist": {"classifier.steps": 3000},
    "fashion-mnist": {"classifier.steps": 5000},
    "cifar10": {"classifier.steps": 10_000, "model.channels": 64},
}


class ClassifierStage(Stage):
    """Minimises the cross entropy."""

    name = "classifier"

    def __init__(self, config: StageConfig, model: Classifier, dataset: ImageDataset):
        self.config = config
        self.modules = {"classifier": model}
        self.dataset = dataset

    def train_source(self) -> Source:
        return TensorSource(images=self.dataset.train.images, labels=self.dataset.train.labels)

    def loss(self, phase: str, nets: Nets, batch: Batch, draws: Draws) -> PhaseLoss:
        logits = nets["classifier"](batch["images"]).float()
        loss = F.cross_entropy(logits, batch["labels"])
        accuracy = (logits.argmax(1) == batch["labels"]).float().mean()
        return PhaseLoss(loss, {"cross_entropy": loss, "accuracy": accuracy})

    def summarise(self, logs: dict[str, Tensor]) -> dict[str, float]:
        return {name: value.item() for name, value in logs.items()}

    def validate(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        return classification_measures(modules["classifier"], self.dataset.valid)

    def draw(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        return {}


class ClassifierTask(Task):
    """A classifier for one data set.

    Raises:
        ValueError: a data set without labels, or sizes that do not fit.
    """

    def __init__(self, config: ClassifierConfig, dataset: ImageDataset):
        if dataset.num_classes is None:
            raise ValueError(f"data set {dataset.name!r} has no labels to learn")
        self.dataset = dataset
        self.model = Classifier(dataset.image_shape, dataset.num_classes, **vars(config.model))
        self.modules = {"classifier": self.model}
        self.stages = [ClassifierStage(config.classifier, self.model, dataset)]

    def sample(
        self, num: int, *, labels: Tensor | None, temperature: float, generator: torch.Generator
    ) -> Tensor:
        raise ValueError("a classifier draws no images")

    def evaluate(self) -> dict[str, dict[str, float]]:
        splits = {"valid": self.dataset.valid, "test": self.dataset.test}
        return {name: classification_measures(self.model, split) for name, split in splits.items()}


@torch.no_grad()
def classification_measures(model: nn.Module, split: ImageSplit) -> dict[str, float]:
    """Mean cross entropy in nats, and the share of right classes."""
    device = next(model.parameters()).device
    assert split.labels is not None
    nats, right = 0.0, 0
    for images, labels in zip(
        split.images.split(_EVAL_BATCH), split.labels.split(_EVAL_BATCH), strict=True
    ):
        logits = model(images.to(device)).cpu()
        nats += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
    return {"cross_entropy": nats / len(split), "accuracy": right / len(split)}
