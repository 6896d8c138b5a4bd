"""Features of torchvision's Inception v3, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SIDE = 299


class InceptionFeatures(nn.Module):
    """The 2048 numbers before the classifier of Inception v3 (Szegedy et al. 2016, figure 5).

    The weights are torchvision's, which it fetches once, not those of the published FID figures:
    distances are comparable among themselves alone. Images are resized to 299x299, bilinear with
    antialiasing.

    Raises:
        ValueError: torchvision is not installed, or the weights cannot be fetched.
    """

    def __init__(self) -> None:
        super().__init__()
        if importlib.util.find_spec("torchvision") is None:
            raise ValueError("Inception features need torchvision: pip install torchvision")
        models = importlib.import_module("torchvision.models")
        try:
            self.network = models.inception_v3(weights="IMAGENET1K_V1")
        except OSError as error:
            raise ValueError(f"Inception's weights cannot be fetched: {error}") from error
        # it would undo the normalisation of ImageNet, which our images do not have
        self.network.transform_input = False
        self.network.fc = nn.Identity()
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1 or 3, H, W) in [0, 1] -> (N, 2048).

        Raises:
            ValueError: another shape.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be (N, 1 or 3, H, W), got {tuple(images.shape)}")
        size = (_SIDE, _SIDE)
        large = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return self.network(2 * large.expand(-1, 3, -1, -1) - 1)
