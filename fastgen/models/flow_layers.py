"""Layers of normalizing flows that have no elementwise op of their own, and conditioners.

Dinh et al. 2017, "Density estimation using Real NVP" (arXiv 1605.08803), sections 3.3 to 3.7 and
4.1; Durkan et al. 2019, "Neural Spline Flows", for the residual conditioner of vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from fastgen.nn import Invertible, VolumePreserving, _ranks
from fastgen.nn.reversible import Cotangents, Memory, Unwound, pull_back, zero_log_det


class Permutation(VolumePreserving):
    """Puts the channels of x (B, C, ...) in another order: y[:, i] = x[:, order[i]]."""

    order: Tensor
    back: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def rearrange(self, x: Tensor) -> Tensor:
        return x[:, self.order]

    def restore(self, y: Tensor) -> Tensor:
        return y[:, self.back]


class Squeeze(VolumePreserving):
    """Blocks of 2x2 pixels become channels: (B, C, H, W) -> (B, 4C, H/2, W/2) (section 3.6).

    The channels of a pixel stay together, so a half of them holds two whole pixels of each block.
    """

    def rearrange(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return blocks.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)

    def restore(self, y: Tensor) -> Tensor:
        blocks = y.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2)
        return blocks.flatten(4, 5).flatten(2, 3)


class Checkerboard(VolumePreserving):
    """The two colours of a checkerboard become halves of the channels (section 3.4).

    (B, C, H, W) -> (B, 2C, H, W/2): first the pixels (i, j) with even i + j, then the others; row i
    stays row i. A coupling layer after it is masked by the checkerboard.
    """

    def rearrange(self, x: Tensor) -> Tensor:
        return torch.cat([self.of_colour(x, 0), self.of_colour(x, 1)], 1)

    def of_colour(self, x: Tensor, colour: int) -> Tensor:
        """The pixels of one colour, (B, C, H, W) -> (B, C, H, W/2), the channels last in memory."""
        pixels = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        rows = [pixels[:, :, 0, :, colour], pixels[:, :, 1, :, 1 - colour]]
        return torch.stack(rows, 2).flatten(1, 2).permute(0, 3, 1, 2)

    def restore(self, y: Tensor) -> Tensor:
        first, second = y.unflatten(2, (-1, 2)).chunk(2, 1)
        even = torch.stack([first[..., 0, :], second[..., 0, :]], -1)
        odd = torch.stack([second[..., 1, :], first[..., 1, :]], -1)
        return torch.stack([even, odd], 3).flatten(4, 5).flatten(2, 3)


class Undo(VolumePreserving):
    """The inverse of a rearrangement."""

    def __init__(self, layer: VolumePreserving) -> None:
        super().__init__()
        self.layer = layer

    def rearrange(self, x: Tensor) -> Tensor:
        return self.layer.restore(x)

    def restore(self, y: Tensor) -> Tensor:
        return self.layer.rearrange(y)


class Standardize(Invertible):
    """y = (x - mean) / std with fixed buffers of the data's, for x (B, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def fit(self, points: Tensor) -> None:
        """Take mean and standard deviation from points (N, D).

        Raises:
            ValueError: a dimension that does not vary, or values that are not finite.
        """
        mean, std = points.mean(0), points.std(0, correction=0)
        if not (std > 0).all() or not (mean.isfinite() & std.isfinite()).all():
            raise ValueError("points: expected finite values that vary in every dimension")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = -self.std.log().sum()
        return (x - self.mean) / self.std, zero_log_det(x) + log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        log_det = self.std.log().sum()
        return y * self.std + self.mean, zero_log_det(y) + log_det


class FlowBatchNorm(Invertible):
    """Batch normalisation as an invertible layer, by running averages (section 3.7, appendix E).

    y = (x - m) / sqrt(v + eps), with log_det = -P/2 sum log(v + eps) over channels of P positions.
    In training mode m and v are the running averages with this batch already in them, and gradients
    flow through the batch's part; the first batch sets them. In eval mode they stand still. With
    several processes of torch.distributed the batch is that of all of them, which must all run the
    layer, forward and backward.

    Args:
        channels: C of x (B, C, *spatial).
        momentum: share of the old average that stays at each batch.
        eps: added to the variance.
        sync: False: each process counts its own part of the batch.

    State dict: mean (C,), var (C,), batches ().
    """

    mean: Tensor
    var: Tensor
    batches: Tensor

    def __init__(
        self, channels: int, *, momentum: float = 0.9, eps: float = 1e-5, sync: bool = True
    ) -> None:
        super().__init__()
        self.momentum, self.eps, self.sync = momentum, eps, sync
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det, _ = self.remember(x)
        return y, log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """By the running averages, in training mode too."""
        std = (self.var + self.eps).sqrt()
        x = y * _as_channels(std, y) + _as_channels(self.mean, y)
        return x, _log_det_of(std, y)

    def remember(self, x: Tensor) -> tuple[Tensor, Tensor, Memory]:
        if not self.training:
            return *self._normalise(x, self.mean, self.var), ()
        share = torch.where(self.batches == 0, 1.0, 1 - self.momentum).to(x.dtype)
        mean, var = _statistics(x, self.sync)
        mean = torch.lerp(self.mean, mean.to(self.mean.dtype), share.to(self.mean.dtype))
        var = torch.lerp(self.var, var.to(self.var.dtype), share.to(self.var.dtype))
        with torch.no_grad():
            self.mean.copy_(mean)
            self.var.copy_(var)
            self.batches += 1
        return *self._normalise(x, mean, var), (mean.detach(), var.detach(), share)

    def replay(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        if not memory:
            return self(x)
        # the values of forward, with the gradient through this batch's share of them
        mean, var, share = memory
        now = (share * (new - new.detach()) for new in _statistics(x, self.sync))
        return self._normalise(x, *(old + n for old, n in zip((mean, var), now, strict=True)))

    def unwind(
        self, y: Tensor, memory: Memory, cotangents: Cotangents, parameters: Sequence[Tensor]
    ) -> Unwound:
        if not memory:
            return super().unwind(y, memory, cotangents, parameters)
        mean, var, _ = memory
        x = y * _as_channels((var + self.eps).sqrt(), y) + _as_channels(mean, y)
        x.requires_grad_()
        with torch.enable_grad():
            outputs = self.replay(x, memory)
        (grad_x,) = pull_back(outputs, cotangents, (x,))
        assert grad_x is not None
        return Unwound(x.detach(), grad_x, [None] * len(parameters))

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        std = (var + self.eps).sqrt()
        return (x - _as_channels(mean, x)) / _as_channels(std, x), -_log_det_of(std, x)

    def extra_repr(self) -> str:
        return f"{len(self.mean)}, momentum={self.momentum}, eps={self.eps}"


def _statistics(x: Tensor, sync: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of x (B, C, *spatial), of all ranks' where `sync` says so."""
    var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
    if not _ranks.shared(sync):
        return mean, var
    count = torch.full_like(mean, x.numel() // len(mean))
    counts, means, variances = _ranks.gather(torch.stack([count, mean, var])).unbind(1)
    shares = counts / counts.sum(0)
    mean = (shares * means).sum(0)
    # about the common mean: squares about another would cancel
    return mean, (shares * (variances + (means - mean).square())).sum(0)


def _as_channels(value: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped to go with x (B, C, *spatial)."""
    return value.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))


def _log_det_of(std: Tensor, x: Tensor) -> Tensor:
    """(B,): the log-determinant of a multiplication by `std`."""
    return zero_log_det(x) + math.prod(x.shape[2:]) * std.log().sum()


class LogitDequantize(nn.Module):
    """Grey values of an image to the real line (section 4.1).

    A grey value v of 0 to `levels` - 1, that is v / (levels - 1) in the image, becomes
    u = (v + noise) / levels with noise uniform in [0, 1), then logit(a + (1 - 2a) u). The density p
    of u bounds the probability of v, log P(v) >= E log p(u) - D log(levels); that is what log_det
    leads to, so the model's log_prob is a bound on that of the grey values.

    Args:
        levels: number of grey values, at least 2.
        alpha: a, in [0, 0.5).
    """

    def __init__(self, levels: int = 256, alpha: float = 0.05) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha must be in (0, 0.5), got {alpha}")
        self.levels, self.alpha = levels, alpha

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """images in [0, 1] and noise in [0, 1), both (B, C, H, W) -> y, log_det (B,)."""
        u = ((images * (self.levels - 1)).round() + noise) / self.levels
        squeezed = self.alpha + (1 - 2 * self.alpha) * u
        y = squeezed.log() - (-squeezed).log1p()
        slopes = -F.logsigmoid(y) - F.logsigmoid(-y)
        constant = math.log((1 - 2 * self.alpha) / self.levels)
        return y, slopes.flatten(1).sum(1) + constant * y[0].numel()

    def inverse(self, y: Tensor) -> Tensor:
        """y (B, C, H, W) -> images in [0, 1] of `levels` grey values."""
        u = (torch.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)
        return (u * self.levels).floor().clamp(0, self.levels - 1) / (self.levels - 1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, alpha={self.alpha}"


class ResidualMLP(nn.Module):
    """Conditioner of vectors: (B, inputs) -> (B, outputs), zero at the start.

    A linear layer, `blocks` of x + W2 relu(W1 relu(x)), a linear layer (Durkan et al. 2019).
    """

    def __init__(self, inputs: int, outputs: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden)
            )
            for _ in range(blocks)
        )
        self.leave = zero(nn.Linear(hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


class ResidualConvNet(nn.Module):
    """Conditioner of images, (B, inputs, H, W) -> (B, outputs, H, W), zero at the start.

    As `ResidualMLP`, of weight-normalised 3x3 convolutions (section 3.7). With `colour` 0 or 1 its
    input is that half of a `Checkerboard`, (B, inputs, H, W/2): it is laid out on the board, zeros
    between, and what comes out is for the pixels of the other half. Channels are last in memory,
    which convolutions of few channels are fastest in, and a pixel's parameters lie together.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int, blocks: int, *, colour: int | None = None
    ) -> None:
        super().__init__()
        self.colour = colour
        self.board = Checkerboard()
        self.enter = weight_norm(nn.Conv2d(inputs, hidden, 3, padding=1))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                weight_norm(nn.Conv2d(hidden, hidden, 3, padding=1)),
                nn.ReLU(),
                weight_norm(nn.Conv2d(hidden, hidden, 3, padding=1)),
            )
            for _ in range(blocks)
        )
        self.leave = zero(nn.Conv2d(hidden, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.colour is not None:
            zeros = torch.zeros_like(x)
            x = self.board.restore(torch.cat([zeros, x] if self.colour else [x, zeros], 1))
        x = self.enter(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = x + block(x)
        x = F.relu(x)
        if self.colour is not None:
            x = self.board.of_colour(x, 1 - self.colour)
        return self.leave(x)


def zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer with zero weights and biases."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
