"""Adaptive instance normalisation with a learned map from style to scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen import ops
from fastgen.ops import _check

__all__ = ["AdaIN"]


class AdaIN(torch.nn.Module):
    """Normalises each plane, then scales and shifts it by a learned affine map of the style.

        y = scale * (x - mean) / sqrt(var + eps) + shift,  (scale, shift) = A w + b

    (StyleGAN: Karras et al. 2019, eq. 1; after Huang & Belongie 2017, eq. 8.) The bias starts at
    1 for the scales and 0 for the shifts. The state_dict holds `affine.weight` (2 C, style_dim) and
    `affine.bias` (2 C,), scales first.

    Args:
        style_dim: size of the style w.
        num_features: C, channels of x.
        eps: added to the variance.

    Shapes: x (B, C, *spatial), w (B, style_dim); the result is as x, see :func:`fastgen.ops.adain`.

    Raises:
        TypeError: a size is not an int, eps not a number; x or w is not a floating tensor.
        ValueError: one of them is not positive; x does not have C channels, w is not
            (B, style_dim).
    """

    def __init__(
        self,
        style_dim: int,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.positive_int(style_dim, "style_dim")
        _check.positive_int(num_features, "num_features")
        _check.positive(eps, "eps")
        self.style_dim = style_dim
        self.num_features = num_features
        self.eps = eps
        self.affine = torch.nn.Linear(style_dim, 2 * num_features, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A fresh affine map whose biases make the identity of scale and shift."""
        self.affine.reset_parameters()
        with torch.no_grad():
            self.affine.bias[: self.num_features] = 1
            self.affine.bias[self.num_features :] = 0

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Normalises x (B, C, *spatial) and gives it the style w (B, style_dim)."""
        _check.floating(x, "x")
        _check.floating(w, "w")
        if x.dim() < 3 or x.shape[1] != self.num_features:
            raise ValueError(
                f"x: expected shape (B, {self.num_features}, *spatial), got {tuple(x.shape)}"
            )
        _check.shape(w, "w", (x.shape[0], self.style_dim), "batch of x, style_dim")
        scale, shift = self.affine(w).chunk(2, dim=1)
        return ops.adain(x, scale, shift, eps=self.eps)

    def extra_repr(self) -> str:
        """What print() shows."""
        return f"style_dim={self.style_dim}, num_features={self.num_features}, eps={self.eps}"
