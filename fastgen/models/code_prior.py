"""Autoregressive prior over a grid of codes: p(z) = prod_i p(z_i | z_<i, label), in raster order,
with the codes of a position one after the other where there are several.

The factorisation is that of van den Oord et al., 2017, section 3.3; the network is a causal
transformer with pre-normalisation (Radford et al., "Language Models are Unsupervised Multitask
Learners", 2019) in the place of the PixelCNN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen.nn import Dropout


class Past:
    """Keys and values of a block's first `count` tokens, with room for `length`."""

    def __init__(self, length: int):
        self.length = length
        self.count = 0
        self._stored: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of further tokens (B, heads, n, D/heads) -> those of all so far."""
        if self._stored is None:
            batch, heads, _, size = keys.shape
            self._stored = keys.new_empty(2, batch, heads, self.length, size)
        new = slice(self.count, self.count + keys.shape[2])
        self._stored[:, :, :, new] = torch.stack([keys, values])
        self.count = new.stop
        all_keys, all_values = self._stored[:, :, :, : self.count].unbind()
        return all_keys, all_values


class CausalBlock(nn.Module):
    """Causal self-attention, then an MLP, each on normalised input: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.drop_weights, self.drop_mixed, self.drop_hidden = (Dropout(dropout) for _ in range(3))
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """Tokens x (B, N, D), or one token (B, 1, D) after those of `past`, which it joins."""
        qkv = self.qkv(self.norm1(x)).unflatten(
            -1, (3, self.heads, -1)
        )  # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = past.extend(k, v)
        mixed = self._attend(q, k, v, causal=past is None)
        x = x + self.drop_mixed(self.proj(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop_hidden(self.mlp(self.norm2(x)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        if not (self.training and self.drop_weights.p):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        # torch's own would drop by the process, not by the row
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return self.drop_weights(scores.softmax(-1)) @ v


class CodePrior(nn.Module):
    """Causal transformer over the flattened code grid of N = h * w codes, or h * w * Q.

    Args:
        num_codes: codebook size K.
        grid_shape: (h, w) of the code grid; (h, w, Q) where a position has Q codes, of a codebook
            each.
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
        grid_shape: tuple[int, ...],
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
        self.codebooks = math.prod(grid_shape[2:])
        length = math.prod(grid_shape)
        self.code_embedding = nn.Embedding(self.codebooks * num_codes, width)
        self.start_embedding = nn.Embedding(num_classes or 1, width)
        self.position = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.Sequential(*(CausalBlock(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.codebooks * num_codes)
        for weight in (self.position, self.code_embedding.weight, self.start_embedding.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.head.weight)  # training starts at the uniform distribution, log K nats
        nn.init.zeros_(self.head.bias)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of every code given those before it.

        Args:
            codes: (B, *grid_shape) or the first n <= N codes in raster order (B, n), int64.
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
        tokens = torch.cat([self._start(labels), self._tokens(flat[:, : length - 1], 0)], dim=1)
        return self._logits(self.blocks(tokens + self.position[: tokens.shape[1]]), 0)

    def _start(self, labels: Tensor) -> Tensor:
        return self.start_embedding(labels).unsqueeze(1)

    def _tokens(self, codes: Tensor, first: int) -> Tensor:
        """Embeddings (B, n, width) of codes (B, n), of which the first is the grid's `first`."""
        books = (torch.arange(codes.shape[1], device=codes.device) + first) % self.codebooks
        return self.code_embedding(codes + books * self.num_codes)

    def _logits(self, hidden: Tensor, first: int) -> Tensor:
        """Logits (B, n, K), each of its own codebook, of the codes from the grid's `first` on."""
        hidden = self.norm(hidden)
        if self.codebooks == 1:
            return self.head(hidden)
        logits = hidden.new_empty(*hidden.shape[:2], self.num_codes)
        weights, biases = (p.chunk(self.codebooks) for p in (self.head.weight, self.head.bias))
        for book, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            own = slice((book - first) % self.codebooks, None, self.codebooks)
            logits[:, own] = F.linear(hidden[:, own], weight, bias).to(logits.dtype)
        return logits

    def log_prob(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(codes | labels): codes (B, *grid_shape) -> (B,), nats, float32.

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
        """Draw code grids, one code after the other; what was attended to is kept, not rerun.

        Args:
            num: how many.
            labels: (num,), int64; a conditional prior given none draws them uniformly.
            temperature: divides the logits; below 1 for likelier samples.
            generator: source of randomness, on the model's device.

        Returns:
            codes (num, *grid_shape), int64.

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
        if labels is None:
            labels = torch.zeros(num, dtype=torch.int64, device=device)
        length = len(self.position)
        past = [Past(length) for _ in self.blocks]
        codes = torch.empty(num, length, dtype=torch.int64, device=device)
        token = self._start(labels)
        for i in range(length):
            hidden = token + self.position[i]
            for block, before in zip(self.blocks, past, strict=True):
                hidden = block(hidden, before)
            probs = (self._logits(hidden, i)[:, 0].float() / temperature).softmax(-1)
            drawn = torch.multinomial(probs, 1, generator=generator)
            codes[:, i : i + 1] = drawn
            token = self._tokens(drawn, i)
        return codes.unflatten(1, self.grid_shape)
