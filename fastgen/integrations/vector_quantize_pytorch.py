"""vector-quantize-pytorch's VectorQuantize, ResidualVQ and the codebooks inside, on
:func:`fastgen.ops.vq_nearest` and :func:`fastgen.ops.vq_codebook_stats`.

The library scores every row with every code, keeps the scores and a one-hot matrix of the same
size, and multiplies by the latter. Here nothing of that size is held. A GroupedResidualVQ is made
of ResidualVQs and needs no class of its own.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vector_quantize_pytorch import residual_vq
from vector_quantize_pytorch import vector_quantize_pytorch as library
from vector_quantize_pytorch.residual_vq import ResidualVQ
from vector_quantize_pytorch.vector_quantize_pytorch import (
    Codebook,
    LossBreakdown,
    VectorQuantize,
)

from fastgen.integrations import _vq_rows
from fastgen.integrations._calls import reason_against_tracer
from fastgen.integrations._library import Library, Swap, run_own_code
from fastgen.integrations._vq_codebook import FusedCodebook, Weight, mask_of_rows

__all__ = ["LIBRARY", "FusedCodebook", "FusedResidualVQ", "FusedVectorQuantize"]

_CODEBOOK = (library.kmeans, library.cdist, library.batched_bincount, library.ema_inplace)
_LAYER = (
    Codebook,
    *_CODEBOOK,
    library.gumbel_sample,
    library.straight_through,
    library.rotate_to,
    library.efficient_rotation_trick_transform,
    library.entropy,
)
_RESIDUAL = (VectorQuantize, *_LAYER, residual_vq.frac_gradient, residual_vq.get_maybe_sync_seed)


@dataclass
class _Batch:
    """What one call of a VectorQuantize quantizes.

    Attributes:
        tokens: (B, n, dim), the input with its dimensions in order.
        inputs: what is compared with the codes: (B, n, D), or with heads (H, B, n, D) where each
            has its codebook, else (1, B * heads, n, D).
        rows: the same as (H, R, D), one H for each codebook.
        mask: (B, n) bool, or None.
        row_mask: the same as (H, R).
        dtype: that of the input, and so of the result.
        differentiable: whether the input takes part in gradients.
    """

    tokens: Tensor
    inputs: Tensor
    rows: Tensor
    mask: Tensor | None
    row_mask: Tensor | None
    dtype: torch.dtype
    differentiable: bool

    @property
    def per_head(self) -> Tensor:
        """(H, B, n, D) or (1, B * heads, n, D), float32."""
        return (self.inputs if self.inputs.dim() == 4 else self.inputs[None]).float()


def _laid_out_as(t: Tensor, like: Tensor) -> Tensor:
    """t, with the strides of like + t."""
    if torch.empty_like(like, device="meta").stride() == t.stride():
        return t
    return torch.zeros_like(like) + t


class FusedVectorQuantize(VectorQuantize):
    """A patched VectorQuantize."""

    _codebook: FusedCodebook

    def own_code(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: Weight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> str | None:
        """Why this call runs the library's own code, or None."""
        if (reason := reason_against_tracer(x)) is not None:
            return reason
        if topk is not None:
            return "topk: the scores of all codes are sorted"
        if codebook_transform_fn is not None:
            return "codebook_transform_fn: each row has codes of its own"
        return (
            self.own_code_of_options(sample_codebook_temp)
            or self._own_code_of_shapes(x, indices)
            or self._own_code_of_masks(x, mask, lens)
            or self._own_code_of_losses(x)
        )

    def own_code_of_options(self, sample_codebook_temp: float | None = None) -> str | None:
        """The part of :meth:`own_code` that does not depend on the input."""
        codebook = self._codebook
        if not isinstance(codebook, FusedCodebook):
            return "its codebook is not a patched one"
        if codebook._forward_hooks or codebook._forward_pre_hooks:
            return "its codebook has hooks, which a patched layer would not call"
        sample = codebook.gumbel_sample
        if not isinstance(sample, functools.partial) or sample.func is not library.gumbel_sample:
            return "its codes are sampled by a function that is not the library's"
        if sample_codebook_temp is None:
            sample_codebook_temp = codebook.sample_codebook_temp
        if codebook.training and sample_codebook_temp > 0:
            if sample.keywords.get("stochastic"):
                return "stochastic_sample_codes: each score has its Gumbel noise"
            if sample.keywords.get("straight_through"):
                return "straight_through: the gradient goes to all codes, through a softmax"
        return None

    # Where the library raises an error, or answers by chance of broadcasting, it goes on doing so.
    def _own_code_of_shapes(self, x: Tensor, indices: Tensor | None) -> str | None:
        if not x.is_floating_point():
            return f"an input of {x.dtype}"
        usual = (5,) if self.accept_3d_fmap else (4,) if self.accept_image_fmap else (2, 3)
        if x.dim() not in usual or (self.accept_image_fmap and self.accept_3d_fmap):
            return f"an input of {x.dim()} dimensions, where {usual} are usual"
        if indices is not None:
            batch, tokens, _ = self._tokens(x).shape
            expected = (batch, tokens) if self.heads == 1 else (batch, tokens, self.heads)
            if indices.shape != expected or indices.dtype != torch.int64:
                return f"indices that are not int64 {expected}"
        return None

    def _own_code_of_masks(self, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> str | None:
        if mask is None and lens is None:
            return None
        if x.dim() != 3 or (mask is not None and lens is not None):
            return "a mask for an input that has no sequence, or two masks"
        if lens is not None and not self.channel_last:
            return "lens for an input with its channels first"
        if mask is not None:
            expected = tuple(self._tokens(x).shape[:2])
            if mask.dtype != torch.bool or mask.shape != expected:
                return f"a mask that is not bool {expected}"
        if self.training and self._pulls_rows() and (self.heads > 1 or self.has_projections):
            return "a mask for a commitment loss with heads or projections"
        return None

    def _own_code_of_losses(self, x: Tensor) -> str | None:
        if not self.training:
            return None
        by_entropy = self.has_commitment_loss and self.commitment_use_cross_entropy_loss
        if by_entropy and x.dim() != 3:
            return "commitment_use_cross_entropy_loss for an input that has no sequence"
        active_only = self.has_codebook_orthogonal_loss and self.orthogonal_reg_active_codes_only
        if active_only and self.heads > 1 and self.separate_codebook_per_head:
            return "orthogonal_reg_active_codes_only with a codebook per head"
        return None

    def _pulls_rows(self) -> bool:
        return self.has_commitment_loss and not self.commitment_use_cross_entropy_loss

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: Weight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple:
        arguments: dict[str, Any] = {
            "indices": indices,
            "mask": mask,
            "lens": lens,
            "topk": topk,
            "sample_codebook_temp": sample_codebook_temp,
            "freeze_codebook": freeze_codebook,
            "return_loss_breakdown": return_loss_breakdown,
            "codebook_transform_fn": codebook_transform_fn,
            "ema_update_weight": ema_update_weight,
            "accum_ema_update": accum_ema_update,
            "ema_update": ema_update,
        }
        if (reason := self.own_code(x, **arguments)) is not None:
            run_own_code("VectorQuantize", reason)
            return super().forward(x, **arguments)
        if lens is not None:
            mask = library.lens_to_mask(lens, x.shape[1])
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        batch = self._batch(x, mask)
        codes, found = self._codebook.assign(
            batch.rows.detach().float(),
            batch.row_mask,
            freeze,
            ema_update_weight=ema_update_weight,
            accum_ema_update=accum_ema_update,
            ema_update=ema_update,
        )
        inplace_loss = self.zero
        if self.in_place_codebook_optimizer is not None and self.training and not freeze:
            inplace_loss = self._optimize_codebook(batch, codes, found)
            rows = batch.rows.detach().float()
            codes, found = self._codebook.assign(rows, batch.row_mask, freeze_codebook=True)
        quantized, commitment = self._quantize(batch, codes, found, freeze)
        if indices is not None:
            return quantized, self._cross_entropy(batch, codes, indices)
        loss, losses = self._losses(batch, codes, found, commitment)
        result = (self._output(x, batch, quantized), self._indices(x, batch, found), loss)
        return (*result, LossBreakdown(*losses, inplace_loss)) if return_loss_breakdown else result

    def _tokens(self, x: Tensor) -> Tensor:
        """The input as (B, n, dim)."""
        if x.dim() == 2:
            return x[:, None]
        if self.accept_image_fmap or self.accept_3d_fmap:
            return x.movedim(1, -1).flatten(1, -2)
        return x if self.channel_last else x.mT

    def _batch(self, x: Tensor, mask: Tensor | None) -> _Batch:
        tokens = self._tokens(x)
        inputs = self.maybe_split_heads_from_input(self.project_in(tokens))
        inputs = self._codebook.transform_input(inputs)
        rows = inputs.flatten(1, 2) if inputs.dim() == 4 else inputs.flatten(0, 1)[None]
        row_mask = None if mask is None else mask_of_rows(mask, rows)
        rows = rows.contiguous()
        return _Batch(tokens, inputs, rows, mask, row_mask, x.dtype, x.requires_grad)

    def _optimize_codebook(self, batch: _Batch, codes: Tensor, found: Tensor) -> Tensor:
        """The step of the codebook's own optimizer; returns its loss."""
        rows = batch.rows.detach()
        _, loss = self._assign(batch, rows, codes, found, _vq_rows.PLAIN, pull_codes=True)
        loss.backward()
        if not self.manual_in_place_optimizer_update:
            self.update_in_place_optimizer()
        return loss

    def _assign(
        self,
        batch: _Batch,
        rows: Tensor,
        codes: Tensor,
        found: Tensor,
        route: str,
        pull_codes: bool,
    ) -> tuple[Tensor, Tensor]:
        """The codes of rows (H, R, D) in the shape of the inputs, and the mean squared distance."""
        dtype = torch.promote_types(batch.dtype, rows.dtype)
        rows, table = rows.flatten(0, 1).to(dtype), codes.flatten(0, 1).to(batch.dtype).to(dtype)
        flat = _vq_rows.in_table(found, codes.shape[1])
        mask = None if batch.row_mask is None else batch.row_mask.reshape(-1)
        quantized, squares = _vq_rows.assign(rows, table, flat, mask, route, pull_codes)
        count = rows.shape[0] if mask is None else mask.sum()
        return quantized.reshape(batch.inputs.shape), (squares / (count * rows.shape[1])).to(dtype)

    def _quantize(
        self, batch: _Batch, codes: Tensor, found: Tensor, freeze: bool
    ) -> tuple[Tensor, Tensor]:
        """The codes in place of the inputs, and the commitment loss unless it is another kind."""
        if not self.training:
            flat = _vq_rows.in_table(found, codes.shape[1])
            quantized = F.embedding(flat, codes.flatten(0, 1)).to(batch.dtype)
            return quantized.view(batch.inputs.shape), self.zero
        pull_codes = self.learnable_codebook and not freeze
        routed = batch.differentiable and self.route_gradients_to_input
        route = _vq_rows.PLAIN
        if routed and not self.directional_reparam:
            route = _vq_rows.ROTATION if self.rotation_trick else _vq_rows.STRAIGHT_THROUGH
        quantized, commitment = self._assign(batch, batch.rows, codes, found, route, pull_codes)
        if route == _vq_rows.STRAIGHT_THROUGH:
            quantized = _laid_out_as(quantized, batch.inputs)
        if routed and self.directional_reparam:
            variance = self.directional_reparam_variance
            quantized = library.directional_reparam(batch.inputs, quantized, variance)
        if self.use_cosine_sim and batch.mask is not None and self._pulls_rows():
            # With a mask the library compares the codes with what has not been normalised yet.
            rows = batch.tokens.flatten(0, 1)[None]
            _, commitment = self._assign(batch, rows, codes, found, _vq_rows.PLAIN, pull_codes)
        if self.sync_update_v > 0:
            quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
        return quantized, commitment

    def _cross_entropy(self, batch: _Batch, codes: Tensor, targets: Tensor) -> Tensor:
        """That of targets (B, n) or (B, n, heads)."""
        if self.heads > 1 and self.separate_codebook_per_head:
            targets = targets.permute(2, 0, 1)
        elif self.heads > 1:
            targets = targets.mT
        targets = targets.reshape(batch.rows.shape[:2])
        return _vq_rows.cross_entropy(batch.rows.float(), codes, targets, self.use_cosine_sim)

    def _losses(
        self, batch: _Batch, codes: Tensor, found: Tensor, commitment: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The loss, and its parts: commitment, diversity, orthogonality."""
        loss = none = self.zero
        if not self.training:
            return loss, (none, none, none)
        loss.requires_grad_()
        diversity = orthogonality = none
        if self.has_codebook_diversity_loss:
            diversity = _vq_rows.negative_entropy(
                batch.per_head, codes, self.codebook_diversity_temperature, self.use_cosine_sim
            )
            loss = loss + diversity * self.codebook_diversity_loss_weight
        if self.has_commitment_loss:
            if self.commitment_use_cross_entropy_loss:
                commitment = self._commitment_cross_entropy(batch, codes, found)
            loss = loss + commitment * self.commitment_weight
        else:
            commitment = none
        if self.has_codebook_orthogonal_loss:
            orthogonality = self._orthogonality(found)
            loss = loss + orthogonality * self.orthogonal_reg_weight
        return loss, (commitment, diversity, orthogonality)

    def _commitment_cross_entropy(self, batch: _Batch, codes: Tensor, found: Tensor) -> Tensor:
        if batch.row_mask is not None:
            found = found.masked_fill(~batch.row_mask, _vq_rows.IGNORED)
        return _vq_rows.cross_entropy(batch.rows.float(), codes, found, self.use_cosine_sim)

    def _orthogonality(self, found: Tensor) -> Tensor:
        codes = self._codebook.embed
        if self.orthogonal_reg_active_codes_only:
            codes = codes[:, torch.unique(found)]
        most, count = self.orthogonal_reg_max_codes, codes.shape[-2]
        if most is not None and count > most:
            codes = codes[:, torch.randperm(count, device=found.device)[:most]]
        return library.orthogonal_loss_fn(codes)

    def _merge_heads(self, t: Tensor, batch: _Batch) -> Tensor:
        """(H, B, n, ...) or (1, B * heads, n, ...) -> (B, n, heads, ...)."""
        if self.separate_codebook_per_head:
            return t.permute(1, 2, 0, *range(3, t.dim()))
        return t.view(len(batch.tokens), self.heads, *t.shape[2:]).transpose(1, 2)

    def _output(self, x: Tensor, batch: _Batch, quantized: Tensor) -> Tensor:
        if self.heads > 1:
            quantized = self._merge_heads(quantized, batch).flatten(2)
        quantized = self.project_out(quantized)
        if batch.mask is not None:
            other = 0 if self.return_zeros_for_masked_padding else batch.tokens
            quantized = torch.where(batch.mask[..., None], quantized, other)
        if x.dim() == 2:
            return quantized[:, 0]
        if self.accept_image_fmap or self.accept_3d_fmap:
            return quantized.mT.unflatten(2, x.shape[2:])
        return quantized if self.channel_last else quantized.mT

    def _indices(self, x: Tensor, batch: _Batch, found: Tensor) -> Tensor:
        found = found.view(batch.inputs.shape[:-1])
        if self.heads > 1:
            found = self._merge_heads(found, batch)
        if batch.mask is not None:
            mask = batch.mask if self.heads == 1 else batch.mask[..., None]
            return torch.where(mask, found, -1)
        if x.dim() == 2:
            return found[:, 0]
        if self.accept_image_fmap or self.accept_3d_fmap:
            return found.unflatten(1, x.shape[2:])
        return found


class FusedResidualVQ(ResidualVQ):
    """A patched ResidualVQ: keeps the residuals of all stages only where it needs them."""

    def own_code(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> str | None:
        """Why this call runs the library's own code, or None."""
        if (reason := reason_against_tracer(x)) is not None:
            return reason
        if indices is not None:
            return "indices: the cross entropy of all stages"
        if self.implicit_neural_codebook:
            return "implicit_neural_codebook: each row has codes of its own"
        if beam_size is None:
            beam_size = self.beam_size if self.training else self.eval_beam_size
        if beam_size is not None and beam_size > 1:
            return "beam search: the scores of all codes are sorted"
        if self.accept_image_fmap and self.has_projections:
            return "projections of a feature map"
        first = self.layers[0]
        if not isinstance(first, FusedVectorQuantize):
            return "its layers are not patched ones"
        return first.own_code_of_options(sample_codebook_temp)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple:
        arguments: dict[str, Any] = {
            "mask": mask,
            "indices": indices,
            "return_all_codes": return_all_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "freeze_codebook": freeze_codebook,
            "beam_size": beam_size,
            "rand_quantize_dropout_fixed_seed": rand_quantize_dropout_fixed_seed,
        }
        if (reason := self.own_code(x, **arguments)) is not None:
            run_own_code("ResidualVQ", reason)
            return super().forward(x, **arguments)
        inputs = residual = self.project_in(x)
        quantized = torch.zeros_like(inputs)
        stages = self._stages(x.device, rand_quantize_dropout_fixed_seed)
        residuals, found, losses = [], [], []
        for layer in self.layers[:stages]:
            if self.shared_codebook:
                residuals.append(residual)
            step, its_indices, loss = layer(
                residual,
                mask=mask,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
            )
            residual = residual - residual_vq.frac_gradient(step, self.quant_grad_frac)
            quantized = quantized + step
            found.append(its_indices)
            losses.append(loss.reshape(1))
        if self.training and self.shared_codebook:
            self._update_shared_codebook(residuals)
        if self.diveq:
            quantized = library.directional_reparam(inputs, quantized)
        quantized = self.project_out(quantized)
        if mask is not None:
            other = 0 if self.return_zeros_for_masked_padding else x
            quantized = torch.where(mask[..., None], quantized, other)
        result = (quantized, *self._stacked(found, losses))
        return (*result, self.get_codes_from_indices(result[1])) if return_all_codes else result

    def _stages(self, device: torch.device, seed: int | None) -> int:
        """How many quantizers this step uses."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        if seed is None:
            seed = residual_vq.get_maybe_sync_seed(device)
        last = random.Random(seed).randrange(
            self.quantize_dropout_cutoff_index, self.num_quantizers
        )
        multiple = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // multiple) * multiple, self.num_quantizers)

    def _update_shared_codebook(self, residuals: list[Tensor]) -> None:
        layer = self.layers[0]
        if self.vq_is_ema_updating:
            layer._codebook.update_ema()
            layer.update_in_place_optimizer()
        if layer._codebook.has_dead_code_replacement:
            layer.expire_codes_(torch.stack(residuals, -2).flatten(-3, -2))

    def _stacked(self, found: list[Tensor], losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Indices (..., Q) and losses (Q,); -1 and 0 for the quantizers that were dropped."""
        dropped = self.num_quantizers - len(found)
        found = found + [torch.full_like(found[0], -1)] * dropped
        none = torch.empty(0, dtype=torch.float32, device=losses[0].device)
        return torch.stack(found, -1), F.pad(torch.cat((none, *losses)), (0, dropped))


LIBRARY = Library(
    name="vector_quantize_pytorch",
    distribution="vector-quantize-pytorch",
    tested=("1.32.0",),
    swaps=(
        Swap(Codebook, FusedCodebook, "5211a0ac8496adff", relies_on=_CODEBOOK),
        Swap(VectorQuantize, FusedVectorQuantize, "4a345a1193d1ea84", relies_on=_LAYER),
        Swap(ResidualVQ, FusedResidualVQ, "de7748cbd959331e", relies_on=_RESIDUAL),
    ),
)
