"""Tasks: what optimising each model family needs. `RECIPES` lists what `fastgen train` knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastgen.data import load_images
from fastgen.training.tasks import classifier, realnvp, stylegan, vae, vqvae
from fastgen.training.tasks.base import Task


@dataclass(frozen=True)
class Recipe:
    """A task with its options.

    Attributes:
        config: dataclass of the options, with fields data, data_root and engine among them.
        task: builds the task from such a config and the data set.
        presets: data set -> dotted option -> default value that suits it better.
        load: (name, data folder or None) -> the data set, with `train` of a known length.
    """

    config: type
    task: Callable[[Any, Any], Task]
    presets: dict[str, dict[str, Any]]
    load: Callable[..., Any] = load_images


RECIPES = {
    "classifier": Recipe(
        classifier.ClassifierConfig, classifier.ClassifierTask, classifier.PRESETS
    ),
    "realnvp": Recipe(
        realnvp.RealNVPConfig, realnvp.RealNVPTask, realnvp.PRESETS, realnvp.load_data
    ),
    "stylegan": Recipe(stylegan.StyleGANConfig, stylegan.StyleGANTask, stylegan.PRESETS),
    "vae": Recipe(vae.VAEConfig, vae.VAETask, vae.PRESETS),
    "vqvae": Recipe(vqvae.VQVAEConfig, vqvae.VQVAETask, vqvae.PRESETS),
}

__all__ = ["RECIPES", "Recipe", "Task"]
