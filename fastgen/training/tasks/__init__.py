"""Tasks: what optimising each model family needs. `RECIPES` lists what `fastgen train` knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastgen.data import ImageDataset
from fastgen.training.tasks import classifier, vae, vqvae
from fastgen.training.tasks.base import Task


@dataclass(frozen=True)
class Recipe:
    """A task with its options.

    Attributes:
        config: dataclass of the options, with fields data, data_root and engine among them.
        task: builds the task from such a config and the data set.
        presets: data set -> dotted option -> default value that suits it better.
    """

    config: type
    task: Callable[[Any, ImageDataset], Task]
    presets: dict[str, dict[str, Any]]


RECIPES = {
    "classifier": Recipe(
        classifier.ClassifierConfig, classifier.ClassifierTask, classifier.PRESETS
    ),
    "vae": Recipe(vae.VAEConfig, vae.VAETask, vae.PRESETS),
    "vqvae": Recipe(vqvae.VQVAEConfig, vqvae.VQVAETask, vqvae.PRESETS),
}

__all__ = ["RECIPES", "Recipe", "Task"]
