"""zuko's rational-quadratic splines and affine transformations on fastgen's ops.

zuko bounds raw parameters p softly, q = p / (1 + |p| / b), and takes them to

- shares softmax(q) of bins, with no least share,
- derivatives exp(q) of splines, so that :func:`fastgen.ops.rq_spline` gets
  log(expm1(exp(q))) - log(expm1(1)): what its softplus takes to the same derivative,
- slopes exp(q) of affine transformations, which are those of "exp" in
  :func:`fastgen.ops.affine_coupling`.

Its transformations are distributions' Transforms, made anew from a network's output for every call.
Their constructors do half of the work, so the faster classes have constructors of their own. What
a model has are modules that make them; these change over to making the faster ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.gaussianization import ElementWiseTransform
from zuko.flows.spline import CircularRQSTransform
from zuko.transforms import (
    CircularShiftTransform,
    ComposedTransform,
    DependentTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
)

from fastgen import ops
from fastgen.integrations._calls import (
    common_dtype,
    is_number,
    log_det_as,
    reason_against,
    reason_against_tracer,
)
from fastgen.integrations._library import Library, Swap, run_own_code
from fastgen.ops._autograd import Fused, run

__all__ = [
    "LIBRARY",
    "FusedDependentTransform",
    "FusedElementWiseTransform",
    "FusedGeneralCouplingTransform",
    "FusedMaskedAutoregressiveTransform",
    "FusedMonotonicAffineTransform",
    "FusedMonotonicRQSTransform",
]

#: zuko has no minima, and the op wants some: too small to be seen, yet no bin is so narrow that the
#: square of its slope overflows.
_LEAST_SHARE = {torch.float32: 1e-12, torch.float64: 1e-30}
_LEAST_DERIVATIVE = 1e-30
#: Narrower bins would vanish between two knots' rounding.
_LEAST_SLOPE = 1e-6


def _softly_bounded(raw: Tensor, bound: float) -> Tensor:
    """zuko's bound of raw parameters, q."""
    if reason_against_tracer() is not None:
        return _soft_bound(raw, bound)
    return run(_SoftBound, _soft_bound, (raw,), bound)


def _soft_bound(raw: Tensor, bound: float) -> Tensor:
    return raw / (1 + (raw / bound).abs())


class _SoftBound(Fused):
    """Its gradient needs the result alone, which the ops keep anyway."""

    forward = staticmethod(_soft_bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (bounded,) = ctx.saved_tensors
        return grad * (1 - (bounded / ctx.bound).abs()).square(), None


def _raw_derivatives(log_derivatives: Tensor) -> Tensor:
    """rq_spline's raw derivatives for derivatives exp(log_derivatives)."""
    d = log_derivatives.exp()
    return d + torch.log(-torch.expm1(-d)) - math.log(math.expm1(1))


class _RawDerivatives(Fused):
    """With d / (1 - exp(-d)) for its gradient, where autograd keeps five tensors of its size."""

    forward = staticmethod(_raw_derivatives)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        d = ctx.saved_tensors[0].exp()
        return grad * d / -torch.expm1(-d)


class _OwnRQSTransform(MonotonicRQSTransform):
    """zuko's code, also while zuko is patched."""


class FusedMonotonicRQSTransform(MonotonicRQSTransform):
    """A patched zuko.transforms.MonotonicRQSTransform."""

    def __init__(
        self,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        bound: float = 5.0,
        slope: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        Transform.__init__(self, **kwargs)
        self._raw = widths, heights, derivatives
        self._bound, self._slope = bound, slope
        self._reason = _reason_against_spline(*self._raw, bound, slope)
        if self._reason is None:
            self._parameters = self._for_op()

    def _for_op(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype, bound = common_dtype(*self._raw), -math.log(self._slope)
        widths, heights, derivatives = (t.to(dtype) for t in self._raw)
        return (
            _softly_bounded(widths, bound / 2),
            _softly_bounded(heights, bound / 2),
            run(_RawDerivatives, _raw_derivatives, (_softly_bounded(derivatives, bound),)),
        )

    def _own(self) -> MonotonicRQSTransform:
        return _OwnRQSTransform(*self._raw, bound=self._bound, slope=self._slope)

    @property
    def horizontal(self) -> Tensor:
        return self._own().horizontal

    @property
    def vertical(self) -> Tensor:
        return self._own().vertical

    @property
    def derivatives(self) -> Tensor:
        return self._own().derivatives

    @property
    def bins(self) -> int:
        return self._raw[0].shape[-1]

    def _call(self, x: Tensor) -> Tensor:
        result = self._spline(x)
        return self._own()._call(x) if result is None else result[0]

    def _inverse(self, y: Tensor) -> Tensor:
        result = self._spline(y, inverse=True)
        return self._own()._inverse(y) if result is None else result[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result = self._spline(x)
        return self._own().call_and_ladj(x) if result is None else result

    def _spline(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor] | None:
        """None, and a line in the log, where zuko's code has to run."""
        reason = self._reason or reason_against(x, *self._raw)
        if reason is not None:
            run_own_code("MonotonicRQSTransform", reason)
            return None
        dtype = common_dtype(x, *self._parameters)
        shape = torch.broadcast_shapes(x.shape, *(t.shape[:-1] for t in self._parameters))
        y, log_det = ops.rq_spline(
            x.to(dtype).expand(shape),
            *(t.to(dtype).expand(*shape, t.shape[-1]) for t in self._parameters),
            tail_bound=self._bound,
            inverse=inverse,
            min_bin_width=_LEAST_SHARE[dtype],
            min_bin_height=_LEAST_SHARE[dtype],
            min_derivative=_LEAST_DERIVATIVE,
        )
        out = torch.promote_types(x.dtype, self._raw[0].dtype)
        return y.to(out), log_det_as(log_det, out)


def _reason_against_spline(
    widths: Tensor, heights: Tensor, derivatives: Tensor, bound: Any, slope: Any
) -> str | None:
    if not is_number(bound) or not 0 < bound < math.inf:
        return f"bound={bound!r}"
    if not is_number(slope) or not _LEAST_SLOPE <= slope < 1:
        return f"slope={slope!r}"
    bins = widths.shape[-1]
    if bins == 0 or (heights.shape[-1], derivatives.shape[-1]) != (bins, bins - 1):
        return "parameters that are not K widths, K heights and K - 1 derivatives"
    return reason_against(widths, heights, derivatives)


class FusedMonotonicAffineTransform(MonotonicAffineTransform):
    """zuko's, with a scale where it is asked for; :class:`FusedDependentTransform` needs none."""

    def __init__(self, shift: Tensor, scale: Tensor, slope: float = 1e-3, **kwargs: Any) -> None:
        Transform.__init__(self, **kwargs)
        self.shift = shift
        self.log_scale = _softly_bounded(scale, math.log(slope))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()


class FusedDependentTransform(DependentTransform):
    """zuko's sum over the last dimension, in the op where its base is affine."""

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if type(self.base) not in (MonotonicAffineTransform, FusedMonotonicAffineTransform):
            return super().call_and_ladj(x)
        log_scale, shift = self.base.log_scale, self.base.shift
        if (reason := self._reason_against(x, log_scale, shift)) is not None:
            run_own_code("DependentTransform", reason)
            return super().call_and_ladj(x)
        tensors = x, log_scale, shift
        shape, dtype = torch.broadcast_shapes(*(t.shape for t in tensors)), common_dtype(*tensors)
        rows = math.prod(shape[:-1]), shape[-1]
        y, log_det = ops.affine_coupling(
            *(t.to(dtype).expand(shape).reshape(rows) for t in tensors), scale="exp"
        )
        out = torch.promote_types(torch.promote_types(x.dtype, log_scale.dtype), shift.dtype)
        return y.view(shape).to(out), log_det_as(log_det.view(shape[:-1]), log_scale.dtype)

    def _reason_against(self, x: Tensor, *parameters: Tensor) -> str | None:
        if self.reinterpreted != 1:
            return f"reinterpreted={self.reinterpreted}"
        if self.base._cache_size != 0:
            return "a cache of its base"
        return reason_against(x, *parameters)


def _circular_spline(
    widths: Tensor, heights: Tensor, derivatives: Tensor, slope: float = 1e-3
) -> ComposedTransform:
    spline = FusedMonotonicRQSTransform(widths, heights, derivatives, math.pi, slope)
    return ComposedTransform(CircularShiftTransform(bound=math.pi), spline)


#: What constructs a transformation of one number, and what constructs the faster one.
_UNIVARIATE: tuple[tuple[Callable, Callable], ...] = (
    (CircularRQSTransform, _circular_spline),
    (MonotonicAffineTransform, FusedMonotonicAffineTransform),
    (MonotonicRQSTransform, FusedMonotonicRQSTransform),
)


def _faster(univariate: Any) -> Callable | None:
    """What constructs the faster transformations, or None where there are none."""
    if type(univariate) is functools.partial:
        faster = _faster(univariate.func)
        if faster is None:
            return None
        return functools.partial(faster, *univariate.args, **univariate.keywords)
    return next((faster for known, faster in _UNIVARIATE if known is univariate), None)


def _reason_against_module(module: Any) -> str | None:
    univariate = module.univariate
    if _faster(univariate) is not None:
        return None
    while type(univariate) is functools.partial:
        univariate = univariate.func
    name = getattr(univariate, "__name__", type(univariate).__name__)
    return f"its univariate transformation is {name}"


def _faster_sum(transform: Transform) -> Transform:
    if isinstance(transform, DependentTransform):
        return FusedDependentTransform(transform.base, transform.reinterpreted)
    return transform


class _MakesFaster:
    """What zuko calls `univariate`, a constructor, is that of a faster transformation."""

    @property
    def univariate(self) -> Callable:
        own = vars(self)["univariate"]
        return _faster(own) or own

    @univariate.setter
    def univariate(self, value: Callable) -> None:
        vars(self)["univariate"] = value


class FusedElementWiseTransform(_MakesFaster, ElementWiseTransform):
    """A patched zuko.flows.gaussianization.ElementWiseTransform."""

    def forward(self, c: Tensor | None = None) -> Transform:
        return _faster_sum(super().forward(c))


class FusedGeneralCouplingTransform(_MakesFaster, GeneralCouplingTransform):
    """A patched zuko.flows.coupling.GeneralCouplingTransform."""

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        return _faster_sum(super().meta(c, x))


class FusedMaskedAutoregressiveTransform(_MakesFaster, MaskedAutoregressiveTransform):
    """A patched zuko.flows.autoregressive.MaskedAutoregressiveTransform."""

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        return _faster_sum(super().meta(c, x))


def _module_swap(original: type[Any], fused: type[Any], fingerprint: str) -> Swap:
    made = (
        CircularRQSTransform,
        DependentTransform,
        MonotonicAffineTransform,
        MonotonicRQSTransform,
    )
    return Swap(original, fused, fingerprint, made, _reason_against_module)


LIBRARY = Library(
    name="zuko",
    distribution="zuko",
    tested=("1.6.0",),
    swaps=(
        _module_swap(ElementWiseTransform, FusedElementWiseTransform, "cbfef03037f83449"),
        _module_swap(GeneralCouplingTransform, FusedGeneralCouplingTransform, "ff0c14d11d194a67"),
        _module_swap(
            MaskedAutoregressiveTransform, FusedMaskedAutoregressiveTransform, "13deee74e816b218"
        ),
        Swap(MonotonicRQSTransform, FusedMonotonicRQSTransform, "a64b379cb2fa7c2e", ()),
    ),
)
