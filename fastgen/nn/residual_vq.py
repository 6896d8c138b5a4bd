"""Residual vector quantization: each stage quantizes what the stages before it left over."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.nn import _kmeans
from fastgen.nn._codebook import Codebook
from fastgen.nn._layout import check_input, check_mask, to_first, to_last
from fastgen.ops import _check

__all__ = ["ResidualVQ"]


class ResidualVQ(nn.Module):
    """Q vector quantizers in a row (Zeghidour et al. 2021, SoundStream, algorithm 1).

    Stage i quantizes the residual r_i, with r_1 = x and r_{i+1} = r_i - sg(e_i). The output is the
    sum of the codes, straight-through once: x + sg(sum e_i - x), so that its gradient passes to x
    unscaled however many stages there are. The loss is the sum of the stages' losses, each as in
    :class:`VectorQuantizer` with r_i for x.

    ``quantize_dropout`` (SoundStream, section III-C; per sample as in Kumar et al. 2023, DAC): in
    training each sample, with this probability, uses only its first n stages, n uniform in 1..Q. A
    stage's loss is the mean over the vectors that use it.

    The statistics of all stages travel between ranks in one all_reduce per step, and what revival
    draws in a second. `quantize_dropout` is drawn on each rank for its own samples.

    Args:
        num_quantizers: Q.
        num_codes: K, of each stage.
        dim: D.
        quantize_dropout: probability in [0, 1].
        channel_first: x is (B, D, ...) instead of (..., D).
        sync: sum statistics over ranks.
        **options: of every stage, as for :class:`VectorQuantizer`; only the Euclidean metric.

    State dict: ``quantizers.<i>.<key>`` with the keys of :class:`VectorQuantizer`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """

    def __init__(
        self,
        num_quantizers: int,
        num_codes: int,
        dim: int,
        *,
        quantize_dropout: float = 0.0,
        channel_first: bool = False,
        sync: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        _check.positive_int(num_quantizers, "num_quantizers")
        _check.between(quantize_dropout, "quantize_dropout", 0, 1)
        _check.one_of(options.get("metric", "euclidean"), "metric", ("euclidean",))
        self.num_quantizers, self.num_codes, self.dim = num_quantizers, num_codes, dim
        self.quantize_dropout = quantize_dropout
        self.channel_first, self.sync = channel_first, sync
        self.quantizers = nn.ModuleList(
            Codebook(num_codes, dim, sync=sync, **options) for _ in range(num_quantizers)
        )

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, num_stages: int | None = None
    ) -> ops.VQResult:
        """Quantizes the vectors of `x`; in training also updates the buffers of the stages used.

        Args:
            x: (..., D), or (B, D, ...) for `channel_first`; dtypes as for :class:`VectorQuantizer`.
            mask: bool, shape of `x` without D: False where a vector is padding, which then gets
                the index -1 and a zero output, and counts nowhere.
            num_stages: use only the first `num_stages` of the Q stages; all by default.

        Returns:
            quantized: shape and dtype of x.
            indices: int64, (..., num_stages), ... as x without D; -1 for a stage that a vector did
                not use.
            loss: scalar, at least float32, the sum over stages.

        Raises:
            TypeError: x is not a floating tensor, mask not a bool one, `num_stages` not an int.
            ValueError: a shape does not fit, or `num_stages` is not in 1..Q.
        """
        check_input(x, self.dim, self.channel_first)
        last = to_last(x, self.channel_first)
        check_mask(mask, last.shape[:-1])
        stages = self._stages(num_stages)
        active = self._active(mask, last, len(stages))
        rows = self._rows(last)
        residual, total = rows, torch.zeros_like(rows)
        indices, losses, statistics = [], [], []
        if self.training:
            finite = _kmeans.finite_rows(rows.detach(), None)
            valid = [finite if uses is None else finite & uses for uses in active]
            draws = _draws(stages[0], valid)
        for i, (stage, uses) in enumerate(zip(stages, active, strict=True)):
            if self.training:
                stage.start(residual.detach(), valid[i])
            codes, index, loss = stage.quantize(residual, uses)
            if self.training:
                statistics.append(stage.statistics(residual, index, valid[i], draws[i]))
            codes = codes.detach()
            if uses is not None:
                codes = torch.where(uses[:, None], codes, 0)
                index = torch.where(uses, index, -1)
            residual, total = residual - codes, total + codes
            indices.append(index)
            losses.append(loss)
        if self.training:
            _update(stages, statistics, self.sync)
        quantized = total + (rows - rows.detach())
        if mask is not None:
            quantized = torch.where(mask.reshape(-1, 1), quantized, 0)
        quantized = to_first(quantized.to(x.dtype).reshape(last.shape), self.channel_first)
        shape = (*last.shape[:-1], len(stages))
        return ops.VQResult(
            quantized, torch.stack(indices, -1).view(shape), torch.stack(losses).sum()
        )

    def encode(self, x: Tensor, *, num_stages: int | None = None) -> Tensor:
        """Indices (..., num_stages) int64 of the codes of each vector of `x`, as in forward."""
        check_input(x, self.dim, self.channel_first)
        last = to_last(x, self.channel_first)
        residual, indices = self._rows(last), []
        for stage in self._stages(num_stages):
            indices.append(stage.nearest(residual))
            residual = residual - stage.lookup(indices[-1])
        return torch.stack(indices, -1).view(*last.shape[:-1], len(indices))

    def decode(self, indices: Tensor) -> Tensor:
        """Sum of the codes of `indices` (..., n) int64, n in 1..Q; negative indices add nothing.

        Returns:
            (..., D), or (B, D, ...) for `channel_first`.

        Raises:
            TypeError: indices are not int64.
            ValueError: n is not in 1..Q.
            IndexError: on the CPU, where an index is K or more.
        """
        _check.has_dtype(indices, "indices", torch.int64)
        _check.rank(indices, "indices", 1, "(..., n)")
        stages = self._stages(indices.shape[-1], "indices")
        codes = [stage.lookup(i) for stage, i in zip(stages, indices.unbind(-1), strict=True)]
        return to_first(sum(codes[1:], codes[0]), self.channel_first)

    def usage(self) -> Tensor:
        """Fraction of each stage's codes used since :meth:`reset_usage`: (Q,) float32."""
        return torch.stack([stage.usage() for stage in self._stages()])

    def perplexity(self) -> Tensor:
        """exp(entropy) of each stage's code use since :meth:`reset_usage`: (Q,) float32."""
        return torch.stack([stage.perplexity() for stage in self._stages()])

    def reset_usage(self) -> None:
        """Starts a new interval for :meth:`usage` and :meth:`perplexity`."""
        for stage in self._stages():
            stage.reset_usage()

    def extra_repr(self) -> str:
        return f"quantize_dropout={self.quantize_dropout}, channel_first={self.channel_first}"

    def _stages(self, count: int | None = None, name: str = "num_stages") -> list[Codebook]:
        count = self.num_quantizers if count is None else count
        _check.integer(count, name)
        if not 1 <= count <= self.num_quantizers:
            raise ValueError(f"{name}: expected 1 to {self.num_quantizers} stages, got {count}")
        return cast(list[Codebook], list(self.quantizers)[:count])

    def _rows(self, last: Tensor) -> Tensor:
        """`last` (..., D) as (N, D), wide enough for small residuals."""
        wide = torch.promote_types(last.dtype, self._stages(1)[0].codebook.dtype)
        return last.reshape(-1, self.dim).to(wide)

    def _active(self, mask: Tensor | None, last: Tensor, count: int) -> list[Tensor | None]:
        """For each of `count` stages, which rows (N,) of `last` (..., D) use it; None for all."""
        valid = None if mask is None else mask.reshape(-1)
        if not self.training or self.quantize_dropout == 0:
            return [valid] * count
        shape = last.shape[:-1]
        limit = torch.randint(1, count + 1, shape[:1], device=last.device)
        dropped = torch.rand(shape[:1], device=last.device) < self.quantize_dropout
        limit = torch.where(dropped, limit, count)
        limit = limit.view(shape[:1] + (1,) * len(shape[1:])).expand(shape).reshape(-1)
        return [limit > i if valid is None else valid & (limit > i) for i in range(count)]


def _draws(stage: Codebook, valid: list[Tensor]) -> list[_kmeans.Draw | None]:
    """What each stage's revival draws, agreed on in one collective."""
    draw = stage.draw(torch.stack(valid))
    if draw is None:
        return [None] * len(valid)
    return [_kmeans.Draw(*parts) for parts in zip(*draw, strict=True)]


def _update(stages: list[Codebook], statistics: list[Tensor], sync: bool) -> None:
    """Updates all stages, with one collective for all their statistics (K, W)."""
    packed = _kmeans.all_reduce(torch.stack(statistics), sync)
    for stage, summed in zip(stages, packed.unbind(0), strict=True):
        stage.update(summed)
