"""AdaGroupNorm of diffusers on :func:`fastgen.ops.adain` and :func:`fastgen.ops.instance_norm`.

A group norm is an instance norm of the groups taken as channels; with one channel a group, the
scale and the shift of each channel are AdaIN's.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.normalization import AdaGroupNorm
from torch import Tensor

from fastgen import ops
from fastgen.integrations import _library
from fastgen.integrations._calls import reason_against_tracer
from fastgen.integrations._library import Library, Swap

__all__ = ["LIBRARY", "FusedAdaGroupNorm"]


class FusedAdaGroupNorm(AdaGroupNorm):
    """A patched diffusers AdaGroupNorm."""

    def own_code(self, x: Tensor, emb: Tensor) -> str | None:
        """Why this call runs diffusers' code, or None."""
        if (reason := reason_against_tracer(x, emb)) is not None:
            return reason
        if x.dim() != 4:
            return f"an input of {x.dim()} dimensions"
        if self.num_groups != x.shape[1] and not x.is_contiguous():
            return "groups of several channels that are not contiguous (channels_last)"
        return None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        reason = self.own_code(x, emb)
        if reason is not None:
            _library.run_own_code("AdaGroupNorm", reason)
            return super().forward(x, emb)
        if self.act:
            emb = self.act(emb)
        scale, shift = self.linear(emb).chunk(2, dim=1)
        if self.num_groups == x.shape[1]:
            return ops.adain(x, 1 + scale, shift, eps=self.eps)
        groups = x.reshape(len(x), self.num_groups, math.prod(x.shape[1:]) // self.num_groups)
        xhat = ops.instance_norm(groups, eps=self.eps).reshape(x.shape)
        return torch.addcmul(shift[:, :, None, None], xhat, 1 + scale[:, :, None, None])


LIBRARY = Library(
    name="diffusers",
    distribution="diffusers",
    tested=("0.42.1",),
    swaps=(Swap(AdaGroupNorm, FusedAdaGroupNorm, "be7d11f385e05ee8", relies_on=()),),
)
