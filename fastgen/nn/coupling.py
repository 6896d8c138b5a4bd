"""Coupling layers: one half of x parametrises an invertible elementwise map of the other half.

Dinh et al. 2017, "Density estimation using Real NVP"; Durkan et al. 2019, "Neural Spline Flows".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.nn.reversible import Cotangents, Invertible, Memory, Unwound, pull_back
from fastgen.ops import _check
from fastgen.ops.affine_coupling import check_scale

__all__ = ["AffineCoupling", "RQSplineCoupling"]


class _Coupling(Invertible):
    """Splits x in halves along dimension 1 and transforms one by parameters from the other.

    The first half is the larger where the number of channels is odd. The conditioner gives
    `numbers_each` numbers for each element that is transformed.
    """

    def __init__(self, conditioner: nn.Module, numbers_each: int, swap: bool) -> None:
        super().__init__()
        if not callable(conditioner):
            raise TypeError(f"conditioner: expected a module, got {type(conditioner).__name__}")
        self.conditioner = conditioner
        self.numbers_each = numbers_each
        self.swap = swap

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, C, *spatial) -> y, same shape, and log_det (B,) of the Jacobian, in nats."""
        return self._couple(x, context, inverse=False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (B, C, *spatial) -> x, same shape, and log_det (B,) of the inverse's Jacobian."""
        return self._couple(y, context, inverse=True)

    def _couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        kept, moved = self._split(x)
        raw = self._condition(kept, moved, context)
        moved, log_det = self._transform(moved, raw, inverse)
        return self._join(kept, moved), log_det

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The half that is kept and the half that is moved."""
        _check.is_tensor(x, "x")
        if x.dim() < 2 or x.shape[1] < 2:
            raise ValueError(
                f"x: expected (B, C, *spatial) with at least 2 channels, got {tuple(x.shape)}"
            )
        first, second = x.chunk(2, 1)
        return (second, first) if self.swap else (first, second)

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat((moved, kept) if self.swap else (kept, moved), 1)

    def _condition(self, kept: Tensor, moved: Tensor, context: Tensor | None = None) -> Tensor:
        """The raw parameters of the moved half's transform."""
        raw = self.conditioner(kept) if context is None else self.conditioner(kept, context)
        expected = (moved.shape[0], self.numbers_each * moved.shape[1], *moved.shape[2:])
        if raw.shape != expected:
            raise ValueError(
                f"conditioner: expected output of shape {expected}, got {tuple(raw.shape)}"
            )
        return raw

    def unwind(
        self, y: Tensor, memory: Memory, cotangents: Cotangents, parameters: Sequence[Tensor]
    ) -> Unwound:
        grad_y, grad_log_det = cotangents
        kept, moved = self._split(y)
        kept = kept.detach().requires_grad_()
        with torch.enable_grad():
            raw = self._condition(kept, moved)
        if memory:
            (moved,) = memory
        else:
            moved, _ = self._transform(moved, raw.detach(), inverse=True)
        moved = moved.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self._transform(moved, raw, inverse=False)
        grad_kept, grad_moved = self._split(grad_y)
        through_raw, through_moved, *grads = pull_back(
            outputs, (grad_moved, grad_log_det), (kept, moved, *parameters)
        )
        assert through_moved is not None
        if through_raw is not None:
            grad_kept = grad_kept + through_raw
        x = self._join(kept.detach(), moved.detach())
        return Unwound(x, self._join(grad_kept, through_moved), grads)

    def _transform(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class AffineCoupling(_Coupling):
    """Affine coupling layer: y2 = s(x1) * x2 + t(x1), y1 = x1.

    x is (B, C, *spatial), split in halves along dimension 1 (masks of other patterns, such as
    the checkerboard, are a permutation of their own before the layer). With a conditioner whose
    last layer is zero, "exp", "tanh" and "atan" start as the identity; "sigmoid" starts at
    s = 0.88, as Glow does, "softplus" at 0.69; `min_scale` adds to these.

    Args:
        conditioner: module that maps the kept half (B, C1, *spatial) to the raw scales and then
            the shifts of the other, (B, 2 * C2, *spatial); called with the context as second
            argument where there is one.
        swap: transform the first half by the second instead.
        scale: how s comes from its raw value: "exp" | "tanh" | "sigmoid" | "atan" |
            "softplus" (:func:`fastgen.ops.affine_coupling`).
        scale_factor: bound of log s for "tanh" and "atan".
        min_scale: floor under the s of "sigmoid" and "softplus".

    State dict: that of the conditioner, under "conditioner.".

    Raises:
        TypeError, ValueError: `conditioner` not callable, unknown `scale`, `scale_factor` not
            positive, `min_scale` negative or with a scale that has no floor; at the call, x no
            tensor or with fewer than 2 dimensions or channels, or a conditioner whose output has
            the wrong shape.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        swap: bool = False,
        scale: str = "tanh",
        scale_factor: float = 1.0,
        min_scale: float = 0.0,
    ) -> None:
        super().__init__(conditioner, 2, swap)
        check_scale(scale, scale_factor, min_scale)
        self.scale = scale
        self.scale_factor = scale_factor
        self.min_scale = min_scale

    def _transform(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raw_scale, shift = raw.chunk(2, 1)
        return ops.affine_coupling(
            x,
            raw_scale,
            shift,
            scale=self.scale,
            inverse=inverse,
            scale_factor=self.scale_factor,
            min_scale=self.min_scale,
        )

    def extra_repr(self) -> str:
        return (
            f"swap={self.swap}, scale={self.scale!r}, scale_factor={self.scale_factor}, "
            f"min_scale={self.min_scale}"
        )


class RQSplineCoupling(_Coupling):
    """Rational-quadratic spline coupling layer (RQ-NSF (C)): y2 = spline(x2; x1), y1 = x1.

    x is (B, C, *spatial), split in halves along dimension 1. Outside [-tail_bound, tail_bound] an
    element passes unchanged. With a conditioner whose last layer is zero the layer starts as the
    identity.

    Args:
        conditioner: module that maps the kept half (B, C1, *spatial) to
            (B, C2 * (3 * num_bins - 1), *spatial), the parameters of a channel together: raw
            widths, heights and inner derivatives (:func:`fastgen.ops.rq_spline`); called with the
            context as second argument where there is one.
        num_bins: K, bins of a spline.
        tail_bound: half the width of the interval that the spline covers.
        swap: transform the first half by the second instead.

    State dict: that of the conditioner, under "conditioner.".

    Raises:
        TypeError, ValueError: `conditioner` not callable, `num_bins` or `tail_bound` is not
            positive; at the call, x no tensor or with fewer than 2 dimensions or channels, or a
            conditioner whose output has the wrong shape.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        num_bins: int = 8,
        tail_bound: float = 3.0,
        swap: bool = False,
    ) -> None:
        _check.positive_int(num_bins, "num_bins")
        _check.positive(tail_bound, "tail_bound")
        super().__init__(conditioner, 3 * num_bins - 1, swap)
        self.num_bins = num_bins
        self.tail_bound = tail_bound

    def remember(self, x: Tensor) -> tuple[Tensor, Tensor, Memory]:
        """The moved half is kept: where a spline is nearly flat its inverse loses digits."""
        _, moved = self._split(x)
        return *self(x), (moved.clone(),)

    def replay(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        return self(x)

    def _transform(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        bins = self.num_bins
        theta = raw.unflatten(1, (x.shape[1], self.numbers_each)).movedim(2, -1)
        widths, heights, derivatives = theta.split((bins, bins, bins - 1), -1)
        return ops.rq_spline(
            x,
            widths,
            heights,
            derivatives,
            tail_bound=self.tail_bound,
            inverse=inverse,
            sum_log_det=True,
        )

    def extra_repr(self) -> str:
        return f"swap={self.swap}, num_bins={self.num_bins}, tail_bound={self.tail_bound}"
