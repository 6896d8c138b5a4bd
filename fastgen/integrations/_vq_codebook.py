"""The codebook of vector-quantize-pytorch without matrices of rows times codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vector_quantize_pytorch import vector_quantize_pytorch as library
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from fastgen.integrations import _vq_rows
from fastgen.ops._snapshot import snapshot

__all__ = ["FusedCodebook", "Weight", "mask_of_rows"]

#: What the averages' step of each code is weighted with: (H, K) or (K,), or made from sums, counts.
Weight = Tensor | Callable[[Tensor, Tensor], Tensor] | None


class FusedCodebook(Codebook):
    """A patched Codebook: k-means and statistics without a one-hot matrix, and :meth:`assign`.

    `forward` is the library's, as the scores of all codes are among its results; a patched
    VectorQuantize calls :meth:`assign` instead.
    """

    def own_code(self, *args: Any, **kwargs: Any) -> str:
        return "the scores of all codes are a result; VectorQuantize does not call it"

    @torch.autocast("cuda", enabled=False)
    def assign(
        self, rows: Tensor, mask: Tensor | None, freeze_codebook: bool, **update: Any
    ) -> tuple[Tensor, Tensor]:
        """The nearest codes, after which the codebook takes its step, unless it is frozen.

        Args:
            rows: (H, R, D) float32.
            mask: (H, R) bool, False where a row does not count for the codebook.
            **update: how it takes the step; as :meth:`update_codebook`.

        Returns:
            codes: (H, K, D) float32, as they were compared with.
            indices: (H, R).
        """
        self.init_embed_(rows, mask=mask)
        if self.affine_param:
            self.update_affine(rows, self.embed, mask=mask)
        codes = self._codes()
        if self.training:
            # The step, of now or of later, overwrites what backward needs.
            codes = snapshot(codes)
        indices = _vq_rows.nearest(rows, codes, self.use_cosine_sim)
        if self.training and not freeze_codebook:
            self.update_codebook(rows, indices, mask=mask, **update)
        return codes, indices

    def _codes(self) -> Tensor:
        codes = self.embed if self.learnable_codebook else self.embed.detach()
        codes = codes.float()
        if self.vq_bridge is not None:
            codes = self.vq_bridge(codes)
        if self.affine_param:
            scale = self._std(self.batch_variance) / self._std(self.codebook_variance)
            codes = (codes - self.codebook_mean) * scale + self.batch_mean
        return codes

    @staticmethod
    def _std(variance: Tensor) -> Tensor:
        return variance.clamp(min=1e-5).sqrt()

    @torch.no_grad()
    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        """Starts from the k-means of `data` (H, R, D), once."""
        if self.initted:
            return
        if mask is not None:
            data = data[mask].view(data.shape[0], -1, data.shape[2])
        if data.shape[1] < self.codebook_size:
            library.logger.warning(
                f"Codebook: the k-means of codebook_size={self.codebook_size} starts from "
                f"{data.shape[1]} vectors, some of which are taken more than once"
            )
        means, counts = self._kmeans(data)
        self.embed_avg.data.copy_(means * counts[..., None])
        self.cluster_size.data.copy_(counts)
        self.update_ema()
        self.initted.data.fill_(True)

    def _kmeans(self, data: Tensor) -> tuple[Tensor, Tensor]:
        means = self.sample_fn(data, self.codebook_size)
        for _ in range(self.kmeans_iters):
            indices = _vq_rows.nearest(data, means, self.use_cosine_sim)
            counts, sums = _vq_rows.statistics(data, indices, None, self.codebook_size)
            self.kmeans_all_reduce_fn(counts)
            new = sums / counts.clamp(min=1)[..., None]
            self.kmeans_all_reduce_fn(new)
            if self.use_cosine_sim:
                new = library.l2norm(new)
            means = torch.where(counts[..., None] == 0, means, new)
        return means, counts

    @torch.no_grad()
    def track_cluster_size_and_embed_avg(
        self,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Weight = None,
        accum_ema_update: bool = False,
    ) -> None:
        """The averages' step; `embed_onehot` may be the indices (H, R) instead."""
        if embed_onehot.is_floating_point():
            super().track_cluster_size_and_embed_avg(
                flatten, embed_onehot, mask, ema_update_weight, accum_ema_update
            )
            return
        if self.affine_param:
            scale = self._std(self.codebook_variance) / self._std(self.batch_variance)
            flatten = (flatten - self.batch_mean) * scale + self.codebook_mean
        counts, sums = _vq_rows.statistics(flatten, embed_onehot, mask, self.codebook_size)
        self.all_reduce_fn(counts)
        self.all_reduce_fn(sums)
        if accum_ema_update:
            library.accum_grad_(self.cluster_size, counts)
            library.accum_grad_(self.embed_avg, sums)
            return
        weight = (
            ema_update_weight(sums, counts) if callable(ema_update_weight) else ema_update_weight
        )
        library.ema_inplace(self.cluster_size, counts, self.decay, weight)
        library.ema_inplace(self.embed_avg, sums, self.decay, weight)

    def update_indices(
        self,
        x: Tensor,
        embed_ind: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Weight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """The codebook's step for rows (..., D) whose codes are known; -1 counts as code 0."""
        heads = x.shape[0] if x.dim() >= 4 else 1
        rows = x.detach().float().reshape(heads, -1, x.shape[-1])
        indices = embed_ind.reshape(heads, -1)
        self.update_codebook(
            rows,
            indices.masked_fill(indices == -1, 0),
            mask=None if mask is None else mask_of_rows(mask, rows),
            ema_update_weight=ema_update_weight,
            accum_ema_update=accum_ema_update,
            ema_update=ema_update,
        )

    update_ema_indices = update_indices


def mask_of_rows(mask: Tensor, rows: Tensor) -> Tensor:
    """The mask (B, n) for rows (H, R, D): their order is that of heads, batch, heads, tokens."""
    batch, tokens = mask.shape
    heads, count = rows.shape[:2]
    repeats = count // mask.numel() if mask.numel() else 0
    return mask[:, None].expand(batch, repeats, tokens).reshape(1, -1).expand(heads, -1)
