"""A small image classifier, whose last hidden layer gives the features that judge samples."""

from __future__ import annotations

from torch import Tensor, nn

from fastgen.nn import Dropout


class Classifier(nn.Module):
    """Two convolutions that halve the sides, a hidden layer of features, class logits.

    Args:
        image_shape: (C, H, W).
        num_classes: number of classes, at least 2.
        channels: of the first convolution; the second has twice as many.
        feature_dim: D, width of the hidden layer.
        dropout: probability, before and after the hidden layer.

    Raises:
        ValueError: fewer than 2 classes, or a size below 1.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        channels: int = 32,
        feature_dim: int = 128,
        dropout: float = 0.3,
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if channels < 1 or feature_dim < 1:
            raise ValueError(
                f"channels and feature_dim must be at least 1, got {channels} and {feature_dim}"
            )
        image_channels, height, width = image_shape
        self.image_shape = image_shape
        self.num_classes = num_classes
        grid = -(-height // 4) * -(-width // 4)
        self.hidden = nn.Sequential(
            nn.Conv2d(image_channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            Dropout(dropout),
            nn.Linear(2 * channels * grid, feature_dim),
            nn.ReLU(),
        )
        self.head = nn.Sequential(Dropout(dropout), nn.Linear(feature_dim, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, num_classes)."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, D), not negative."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images must be (B, *{self.image_shape}), got {tuple(images.shape)}")
        return self.hidden(2 * images - 1)
