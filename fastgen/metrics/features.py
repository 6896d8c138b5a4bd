"""Features of images: what Frechet distance, precision and recall compare.

Any module that maps images to (N, D) serves. `fastgen train classifier` trains one on the data set
itself, offline; `InceptionFeatures` needs torchvision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def extract_features(
    network: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Features of images (N, C, H, W), in parts: (N, D), float32, on the CPU.

    A module is put into evaluation mode, and back after. Further dimensions of its output are
    flattened.

    Raises:
        ValueError: the features are not finite, or do not have one row an image.
    """
    training = isinstance(network, nn.Module) and network.training
    if isinstance(network, nn.Module):
        network.eval()
    parts = []
    for batch in images.split(batch_size):
        features = network(batch.to(device)).float().cpu()
        if len(features) != len(batch):
            raise ValueError(
                f"features must have a row an image, got {len(features)} of {len(batch)} images"
            )
        parts.append(features.flatten(1))
    if isinstance(network, nn.Module):
        network.train(training)
    result = torch.cat(parts)
    if not result.isfinite().all():
        raise ValueError("features must be finite, got NaN or infinity")
    return result
