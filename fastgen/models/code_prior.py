"""Autoregressive prior over a grid of codes: p(z) = prod_i p(z_i | z_<i, label), in raster order.

The factorisation is that of van den Oord et al., 2017, section 3.3; the network is a causal
transformer with pre-normalisation (Radford et al., "Language Models are Unsupervised Multitask
Learners", 2019) in the place of the PixelCNN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalBlock(nn.Module):
    """Causal self-attention, then an MLP, each on normalised input: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        qkv = self.qkv(self.norm1(x)).unflatten(
            -1, (3, self.heads, -1)
        )  # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), dropout, self.training)


class CodePrior(nn.Module):
    """Causal transformer over the flattened code grid, N = h * w positions.

    Args:
        num_codes: codebook size K.
        grid_shape: (h, w) of the code grid.
        num_classes: condition on labels in [0, num_classes); None for no labels.
        width: model width, a multiple of `heads`.
        layers, heads: number of blocks, and of attention heads in each.
        dropout: dropout probability in training mode.

    Raises:
        ValueError: a size below 1, or a width that the heads do not divide.
    """

    def __init__(
        self,
        num_codes: int,
        grid_shape: tuple[int, int],
        *,
        num_classes: int | None = None,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        if min(num_codes, width, layers, heads, *grid_shape) < 1 or width % heads:
            raise ValueError(
                "sizes must be positive and width a multiple of heads, got "
                f"{num_codes=}, {grid_shape=}, {width=}, {layers=}, {heads=}"
            )
        self.num_codes = num_codes
        self.grid_shape = tuple(grid_shape)
        self.num_classes = num_classes
        length = grid_shape[0] * grid_shape[1]
        self.code_embedding = nn.Embedding(num_codes, width)
        self.start_embedding = nn.Embedding(num_classes or 1, width)
        self.position = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.Sequential(*(CausalBlock(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_codes)
        for weight in (self.position, self.code_embedding.weight, self.start_embedding.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.head.weight)  # training starts at the uniform distribution, log K nats
        nn.init.zeros_(self.head.bias)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of every code given those before it.

        Args:
            codes: (B, h, w) or the first n <= N codes in raster order (B, n), int64.
            labels: (B,), int64, exactly where the prior is conditional.

        Returns:
            logits (B, N, K); (B, n + 1, K) for a prefix of n < N codes: the last row predicts the
            next code.

        Raises:
            ValueError: labels missing or superfluous, or more than N codes.
        """
        flat = codes.flatten(1)
        length = len(self.position)
        if flat.shape[1] > length:
            raise ValueError(
                f"codes must have at most {length} positions, got {tuple(codes.shape)}"
            )
        if (labels is None) != (self.num_classes is None):
            wanted = "none" if self.num_classes is None else f"(B,) in [0, {self.num_classes})"
            raise ValueError(
                f"labels must be {wanted}, got {'none' if labels is None else tuple(labels.shape)}"
            )
        if labels is None:
            labels = flat.new_zeros(len(flat))
        start = self.start_embedding(labels).unsqueeze(1)
        tokens = torch.cat([start, self.code_embedding(flat[:, : length - 1])], dim=1)
        return self.head(self.norm(self.blocks(tokens + self.position[: tokens.shape[1]])))

    def log_prob(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(codes | labels): codes (B, h, w) -> (B,), nats, float32.

        Raises:
            ValueError: codes that are not a whole grid, and as `forward`.
        """
        if codes.shape[1:] != self.grid_shape:
            raise ValueError(f"codes must be (B, *{self.grid_shape}), got {tuple(codes.shape)}")
        logits = self(codes, labels).float()
        return -F.cross_entropy(logits.transpose(1, 2), codes.flatten(1), reduction="none").sum(1)

    @torch.no_grad()
    def sample(
        self,
        num: int,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw code grids, one position after the other.

        Args:
            num: how many.
            labels: (num,), int64; a conditional prior given none draws them uniformly.
            temperature: divides the logits; below 1 for likelier samples.
            generator: source of randomness, on the model's device.

        Returns:
            codes (num, h, w), int64.

        Raises:
            ValueError: a temperature that is not positive, or as many labels as not `num`.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if labels is not None and labels.shape != (num,):
            raise ValueError(f"labels must be ({num},), got {tuple(labels.shape)}")
        classes = self.num_classes
        if labels is not None and classes and not ((labels >= 0) & (labels < classes)).all():
            raise ValueError(
                f"labels must be in [0, {classes}), got {sorted(set(labels.tolist()))}"
            )
        device = self.position.device
        if labels is None and self.num_classes is not None:
            labels = torch.randint(self.num_classes, (num,), generator=generator, device=device)
        codes = torch.empty(num, 0, dtype=torch.int64, device=device)
        for _ in range(len(self.position)):
            probs = (self(codes, labels)[:, -1].float() / temperature).softmax(-1)
            codes = torch.cat([codes, torch.multinomial(probs, 1, generator=generator)], dim=1)
        return codes.unflatten(1, self.grid_shape)
