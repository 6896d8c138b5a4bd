"""State of one codebook and its update, shared by VectorQuantizer and the stages of ResidualVQ.

Everything here works on rows: x as (N, D), indices, mask and valid as (N,). Valid are the rows that
are in the mask and finite: codes start from them, and move by them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from fastgen import ops
from fastgen.nn import _kmeans
from fastgen.nn._ranks import shared
from fastgen.ops import _check
from fastgen.ops._snapshot import snapshot

__all__ = ["Codebook"]


class Codebook(nn.Module):
    """Codes with EMA statistics, usage counts, k-means start and revival: see VectorQuantizer."""

    _version = 1

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    usage_counts: Tensor
    idle_steps: Tensor
    initialized: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        codebook: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        epsilon: float = 1e-5,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        revive_after: int | None = None,
        revive_threshold: float = 0.1,
        channel_first: bool = False,
        sync: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.positive_int(num_codes, "num_codes")
        _check.positive_int(dim, "dim")
        _check.one_of(codebook, "codebook", ("ema", "gradient"))
        _check.one_of(metric, "metric", ("euclidean", "cosine"))
        _check.between(decay, "decay", 0, 1)
        _check.positive(epsilon, "epsilon")
        _check.non_negative(commitment_weight, "commitment_weight")
        _check.non_negative(codebook_weight, "codebook_weight")
        _check.positive_int(kmeans_iters, "kmeans_iters")
        if revive_after is not None:
            _check.positive_int(revive_after, "revive_after")
        _check.between(revive_threshold, "revive_threshold", 0, 1)
        if dtype is not None and dtype not in _check.FLOATS:
            raise TypeError(f"dtype: expected float32, float64, float16 or bfloat16, got {dtype}")
        self.num_codes, self.dim = num_codes, dim
        self.ema, self.metric = codebook == "ema", metric
        self.decay, self.epsilon = decay, epsilon
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.kmeans_init, self.kmeans_iters = kmeans_init, kmeans_iters
        self.revive_after, self.revive_threshold = revive_after, revive_threshold
        self.channel_first, self.sync = channel_first, sync
        self._register(device, dtype or torch.get_default_dtype())
        self.reset_parameters()

    def _register(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        shape, wide = (self.num_codes, self.dim), torch.promote_types(dtype, torch.float32)

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype))

        if self.ema:
            buffer("codebook", shape, wide)
            buffer("ema_sums", shape, wide)
        else:
            self.codebook = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        buffer("ema_counts", shape[:1], wide)
        buffer("usage_counts", shape[:1], torch.int64)
        buffer("idle_steps", shape[:1], torch.int64)
        buffer("initialized", (), torch.bool)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the codes (entries uniform with variance 1/dim, as in Sonnet), clears the state."""
        bound = (3 / self.dim) ** 0.5
        self._set_codes(self.codebook.new_empty(self.codebook.shape).uniform_(-bound, bound))
        self.usage_counts.zero_()
        self.idle_steps.zero_()
        self.initialized.fill_(not self.kmeans_init)
        # Python's twin of the buffer: asking the device each step would wait for it.
        self._initialized = not self.kmeans_init
        # Whether the other ranks are known to have started too.
        self._agreed = False

    def _set_codes(
        self, codes: Tensor, counts: Tensor | None = None, where: Tensor | None = None
    ) -> None:
        """Sets the codes, each as the mean of max(count, 1) rows; one row without `counts`."""
        if self.metric == "cosine":
            codes = normalize(codes, dim=1)
        codes = codes.to(self.codebook.dtype)
        counts = torch.ones_like(self.ema_counts) if counts is None else counts.clamp(min=1)
        _fill(self.codebook, codes, where)
        _fill(self.ema_counts, counts, where)
        if self.ema:
            _fill(self.ema_sums, codes * counts[:, None], where)

    def codes(self) -> Tensor:
        """The codes (K, D) that rows are compared with: `codebook`, at unit length for "cosine"."""
        return self._compared(self.codebook)

    def _compared(self, codebook: Tensor) -> Tensor:
        return normalize(codebook, dim=1) if self.metric == "cosine" and not self.ema else codebook

    def nearest(self, rows: Tensor) -> Tensor:
        """Index (N,) of the code nearest to each row."""
        codes = self.codes()
        wide = torch.promote_types(rows.dtype, codes.dtype)
        return ops.vq_nearest(rows.to(wide), codes.to(wide))

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes (..., D) of indices (...); zeros where an index is negative."""
        found = embedding(indices.clamp(min=0), self.codes())
        return torch.where(indices[..., None] < 0, 0, found)

    @torch.no_grad()
    def start_from(
        self, rows: Tensor, valid: Tensor, started: Tensor | Literal[False] = False
    ) -> None:
        """Puts the codes at the k-means of the valid rows, if there are any, unless `started`."""
        codes, counts, total = _kmeans.kmeans(
            rows.to(self.codebook.dtype),
            valid,
            self.codebook,
            self.kmeans_iters,
            spherical=self.metric == "cosine",
            sync=self.sync,
        )
        found = total > 0
        if started is False:
            started = torch.zeros_like(found)
        self._set_codes(codes, counts, found & ~started)
        self.initialized.copy_(self.initialized | found | started)
        # A compiled graph cannot ask: it takes the first batch for one that has rows.
        self._initialized = torch.compiler.is_compiling() or bool(self.initialized)
        self._agreed = True

    def start(self, rows: Tensor, valid: Tensor) -> None:
        """Once, in the first training step that has valid rows: `kmeans_init`."""
        several = shared(self.sync)
        if self._initialized and (self._agreed or not several or not self.kmeans_init):
            return
        if not several:
            # An empty batch is none; ranks must agree, so that theirs joins the others.
            if rows.shape[0] > 0:
                self.start_from(rows, valid)
            return
        started = self._adopt()
        if not torch.compiler.is_compiling() and bool(started):
            self._initialized = self._agreed = True
        else:
            self.start_from(rows, valid, started)

    @torch.no_grad()
    def _adopt(self) -> Tensor:
        """Takes the state of the first rank that has started, such as from a checkpoint that it
        alone has loaded; () bool, whether there is one."""
        ranks = torch.arange(dist.get_world_size(), device=self.initialized.device)
        flags = ((ranks == dist.get_rank()) & self.initialized).int()
        flags = _kmeans.all_reduce(flags, self.sync)
        started, first = flags.any(), flags.argmax() == dist.get_rank()
        for tensor in (self.codebook, *self.buffers(recurse=False)):
            state = tensor.detach()
            theirs = _kmeans.all_reduce(torch.where(first, state, 0).to(state.dtype), self.sync)
            _fill(tensor, theirs, started)
        return started

    def quantize(self, rows: Tensor, mask: Tensor | None) -> ops.VQResult:
        """The straight-through quantization of rows (N, D); masked rows get code 0 and no loss."""
        codebook = self.codebook
        if self.training and (self.ema or self.revive_after is not None):
            # Backward needs the codes as they were; the update of this step overwrites them.
            codebook = snapshot(codebook)
        codes = self._compared(codebook)
        wide = torch.promote_types(rows.dtype, codes.dtype)
        rows, codes = rows.to(wide), codes.to(wide)
        if mask is not None:
            # A row that equals a code has no loss and no gradient.
            rows = torch.where(mask[:, None], rows, codes[0].detach())
        quantized, indices, loss = ops.vq_quantize(
            rows,
            codes,
            commitment_weight=self.commitment_weight,
            codebook_weight=0.0 if self.ema else self.codebook_weight,
        )
        if mask is not None:
            loss = loss * (mask.numel() / mask.sum().clamp(min=1))
        return ops.VQResult(quantized, indices, loss)

    @torch.no_grad()
    def draw(self, valid: Tensor) -> _kmeans.Draw | None:
        """What revival draws, for one step: `valid` (..., N) bool is of the rows of each stage."""
        if self.revive_after is None:
            return None
        return _kmeans.agree(valid.sum(-1), self.num_codes, self.sync)

    @torch.no_grad()
    def statistics(
        self, rows: Tensor, indices: Tensor, valid: Tensor, draw: _kmeans.Draw | None
    ) -> Tensor:
        """What the update needs of this batch, in columns (K, W), made to be summed over ranks.

        Counts and sums; for revival the candidate rows and whether there is one.
        """
        rows = rows.to(self.codebook.dtype)
        summed = rows if self.ema else rows[:, :1]
        counts, sums = _kmeans.row_statistics(summed, indices, valid, self.num_codes)
        columns = [counts[:, None], sums]
        if draw is not None:
            columns.append(_kmeans.candidates(rows, valid, draw))
        return torch.cat(columns, 1)

    def step(self, rows: Tensor, indices: Tensor, valid: Tensor) -> None:
        """The update of one training step, over all ranks."""
        statistics = self.statistics(rows, indices, valid, self.draw(valid))
        self.update(_kmeans.all_reduce(statistics, self.sync))

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        """One training step of the buffers from the `statistics` of all ranks."""
        width = self.dim if self.ema else 1
        counts, sums = _kmeans.spare(statistics[:, 0], statistics[:, 1 : width + 1])
        self.usage_counts.add_(counts.long())
        # Without rows there is no step: averages that decay to nothing would lose the codes.
        some = counts.sum() > 0
        self._average(self.ema_counts, counts, some)
        if self.ema:
            self._average(self.ema_sums, sums, some)
            codes = self._ema_codes()
            _fill(self.codebook, codes, (some & _kmeans.finite_sums(codes))[:, None])
        if self.revive_after is not None:
            rows, offered = statistics[:, -self.dim - 1 : -1], statistics[:, -1] > 0
            self._revive(rows, offered, self.revive_after)

    def _average(self, average: Tensor, value: Tensor, where: Tensor) -> None:
        _fill(average, average.mul(self.decay).add_(value, alpha=1 - self.decay), where)

    def _ema_codes(self) -> Tensor:
        if self.metric == "cosine":
            length = self.ema_sums.norm(dim=1, keepdim=True)
            tiny = torch.finfo(length.dtype).tiny
            return torch.where(length > tiny, self.ema_sums / length, self.codebook)
        total = self.ema_counts.sum()
        share = (self.ema_counts + self.epsilon) / (total + self.num_codes * self.epsilon)
        return self.ema_sums / (share * total)[:, None]

    def _revive(self, rows: Tensor, offered: Tensor, after: int) -> None:
        floor = self.revive_threshold * self.ema_counts.mean()
        self.idle_steps.add_(1).mul_(self.ema_counts < floor)
        dead = (self.idle_steps >= after) & offered
        self.idle_steps.masked_fill_(dead, 0)
        self.ema_counts.copy_(torch.where(dead, floor, self.ema_counts))
        self.codebook.copy_(torch.where(dead[:, None], rows, self.codebook))
        if self.ema:
            self.ema_sums.copy_(torch.where(dead[:, None], rows * floor, self.ema_sums))

    def usage(self) -> Tensor:
        """Fraction of the codes used since :meth:`reset_usage`: float32 scalar in [0, 1]."""
        return (self.usage_counts > 0).float().mean()

    def perplexity(self) -> Tensor:
        """exp(entropy) of code use since :meth:`reset_usage`: float32 scalar in [1, K], or 0."""
        total = self.usage_counts.sum()
        share = self.usage_counts / total.clamp(min=1)
        return torch.where(total > 0, torch.special.entr(share).sum().exp(), 0.0)

    @torch.no_grad()
    def reset_usage(self) -> None:
        """Starts a new interval for :meth:`usage` and :meth:`perplexity`."""
        self.usage_counts.zero_()

    def extra_repr(self) -> str:
        parts = [f"{self.num_codes}, {self.dim}, codebook={'ema' if self.ema else 'gradient'!r}"]
        parts += (
            [f"decay={self.decay}"] if self.ema else [f"codebook_weight={self.codebook_weight}"]
        )
        parts.append(f"commitment_weight={self.commitment_weight}, metric={self.metric!r}")
        for name in ("kmeans_init", "revive_after", "channel_first"):
            if value := getattr(self, name):
                parts.append(f"{name}={value}")
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        """As nn.Module, but buffers stay wide: half precision cannot hold a decay of 0.99."""

        buffers = {id(buffer) for buffer in self.buffers(recurse=False)}

        def keep_wide(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            narrowed = new.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(new.device) if narrowed and id(tensor) in buffers else new

        return super()._apply(keep_wide, recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.kmeans_init:
            self.initialized = torch.ones_like(self.initialized)
        elif prefix + "initialized" in state_dict:
            self._initialized = bool(state_dict[prefix + "initialized"])
            self._agreed = False


def _fill(tensor: Tensor, value: Tensor, where: Tensor | None) -> None:
    """Sets `tensor` to `value` where `where`, everywhere by default, in place."""
    tensor.copy_(value if where is None else torch.where(where, value, tensor))
