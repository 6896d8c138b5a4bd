"""nflows' splines, coupling and autoregressive transforms on fastgen's ops.

Two conventions differ from :func:`fastgen.ops.rq_spline` and are mapped exactly:

- nflows takes softplus of a raw derivative as it is, so fastgen's raw derivatives are nflows' less
  the shift log(exp(1 - min_derivative) - 1).
- Without tails nflows has K + 1 free derivatives, those at the ends of the interval too. Such a
  spline is the middle third of one with linear tails and a bin more on each side, whose inner
  knots are all K + 1 knots.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, NamedTuple

import torch
from nflows.transforms import autoregressive, coupling, nonlinearities
from nflows.transforms.base import InputOutsideDomain
from nflows.transforms.splines import rational_quadratic as rq
from nflows.utils import torchutils
from torch import Tensor

from fastgen import ops
from fastgen.integrations._calls import (
    common_dtype,
    derivative_shift,
    is_number,
    log_det_as,
    reason_against,
    reason_against_minima,
)
from fastgen.integrations._coupling import affine
from fastgen.integrations._library import Function, Library, Swap, run_own_code

# Before they are replaced.
_own_constrained = rq.rational_quadratic_spline
_own_unconstrained = rq.unconstrained_rational_quadratic_spline

__all__ = [
    "LIBRARY",
    "FusedAdditiveCouplingTransform",
    "FusedAffineCouplingTransform",
    "FusedMaskedAffineAutoregressiveTransform",
    "FusedMaskedPiecewiseRationalQuadraticAutoregressiveTransform",
    "FusedPiecewiseRationalQuadraticCDF",
    "FusedPiecewiseRationalQuadraticCouplingTransform",
    "rational_quadratic_spline",
    "unconstrained_rational_quadratic_spline",
]


class _Spline(NamedTuple):
    """A spline over [low, high], the same in x and y; outside it the identity, or an error."""

    low: float
    high: float
    linear_tails: bool
    min_bin_width: float
    min_bin_height: float
    min_derivative: float

    @classmethod
    def of(cls, module: Any) -> _Spline:
        """That of a module; the defaults of nflows without tails."""
        linear = module.tails == "linear"
        low, high = (-module.tail_bound, module.tail_bound) if linear else (0.0, 1.0)
        minima = module.min_bin_width, module.min_bin_height, module.min_derivative
        return cls(low, high, linear, *minima)

    def reason_against(self, bins: int) -> str | None:
        """Why fastgen has no such spline of that many bins, or None."""
        for name, value in self._asdict().items():
            if name != "linear_tails" and not is_number(value):
                return f"{name} is no plain number"
        if not -math.inf < self.low < self.high < math.inf:
            return f"the interval [{self.low}, {self.high}]"
        minima = self.min_bin_width, self.min_bin_height, self.min_derivative
        return reason_against_minima(bins, *minima)

    def __call__(
        self,
        inputs: Tensor,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        inverse: bool,
        sum_log_det: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """nflows' raw parameters (..., K), (..., K) and (..., K - 1), or (..., K + 1) without
        tails."""
        dtype = common_dtype(inputs, widths, heights, derivatives)
        x, widths, heights = (t.to(dtype) for t in (inputs, widths, heights))
        derivatives = derivatives.to(dtype) - derivative_shift(self.min_derivative)
        run = self._with_tails if self.linear_tails else self._without_tails
        y, log_det = run(x, widths, heights, derivatives, inverse, sum_log_det)
        return y.to(inputs.dtype), log_det_as(log_det, inputs.dtype)

    def _with_tails(
        self,
        x: Tensor,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        inverse: bool,
        sum_log_det: bool,
    ) -> tuple[Tensor, Tensor]:
        return ops.rq_spline(
            x,
            widths,
            heights,
            derivatives,
            tail_bound=self.high,
            inverse=inverse,
            sum_log_det=sum_log_det,
            min_bin_width=self.min_bin_width,
            min_bin_height=self.min_bin_height,
            min_derivative=self.min_derivative,
        )

    def _without_tails(
        self, x: Tensor, widths: Tensor, heights: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor]:
        least, greatest = torch.aminmax(x)
        if least < self.low or greatest > self.high:
            raise InputOutsideDomain
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        minima = self.min_bin_width / 3, self.min_bin_height / 3, self.min_derivative
        wide = _Spline(-3 * half, 3 * half, True, *minima)
        # On its edge a point could fall into the added bin, whose gradients are not the spline's.
        edge = half * (1 - 8 * torch.finfo(x.dtype).eps)
        y, log_det = wide._with_tails(
            _moved_into(x - middle, -edge, edge),
            _third(widths, self.min_bin_width),
            _third(heights, self.min_bin_height),
            *args,
        )
        return _moved_into(y + middle, self.low, self.high), log_det


def _third(raw: Tensor, minimum: float) -> Tensor:
    """(..., K) raw sizes -> (..., K + 2), of bins of a third of these sizes between two thirds.

    With shares m / 3 + (1 - m (K + 2) / 3) softmax(.), the outer ones are 1 / 3 where their logits
    exceed the logsumexp of the others by log((1 - m) / (1 - m K)).
    """
    outer = torch.logsumexp(raw, -1, keepdim=True)
    outer = outer + math.log((1 - minimum) / (1 - minimum * raw.shape[-1]))
    return torch.cat((outer, raw, outer), -1)


def _moved_into(x: Tensor, low: float, high: float) -> Tensor:
    """x moved by its rounding error into [low, high], where clamp would drop its gradient."""
    return x + (x.clamp(low, high) - x).detach()


def _reason_against_call(
    spline: _Spline, inputs: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor
) -> str | None:
    if (reason := reason_against(inputs, widths, heights, derivatives)) is not None:
        return reason
    bins = widths.shape[-1] if widths.dim() else 0
    knots = bins - 1 if spline.linear_tails else bins + 1
    sized = ((widths, bins), (heights, bins), (derivatives, knots))
    if bins == 0 or any(t.shape != (*inputs.shape, size) for t, size in sized):
        return "parameters of other shapes than the inputs'"
    if inputs.numel() == 0 and not spline.linear_tails:
        return "no inputs"
    return spline.reason_against(bins)


@functools.wraps(rq.rational_quadratic_spline)
def rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = rq.DEFAULT_MIN_BIN_WIDTH,
    min_bin_height: float = rq.DEFAULT_MIN_BIN_HEIGHT,
    min_derivative: float = rq.DEFAULT_MIN_DERIVATIVE,
) -> tuple[Tensor, Tensor]:
    tensors = inputs, unnormalized_widths, unnormalized_heights, unnormalized_derivatives
    minima = min_bin_width, min_bin_height, min_derivative
    spline = _Spline(left, right, False, *minima)
    reason = _reason_against_call(spline, *tensors)
    if reason is None and (left, right) != (bottom, top):
        reason = "intervals of x and y that differ"
    if reason is None:
        return spline(*tensors, inverse)
    run_own_code("rational_quadratic_spline", reason)
    return _own_constrained(*tensors, inverse, left, right, bottom, top, *minima)


@functools.wraps(rq.unconstrained_rational_quadratic_spline)
def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    min_bin_width: float = rq.DEFAULT_MIN_BIN_WIDTH,
    min_bin_height: float = rq.DEFAULT_MIN_BIN_HEIGHT,
    min_derivative: float = rq.DEFAULT_MIN_DERIVATIVE,
) -> tuple[Tensor, Tensor]:
    tensors = inputs, unnormalized_widths, unnormalized_heights, unnormalized_derivatives
    minima = min_bin_width, min_bin_height, min_derivative
    spline = _Spline(-tail_bound, tail_bound, True, *minima)
    reason = f"tails={tails!r}" if tails != "linear" else _reason_against_call(spline, *tensors)
    if reason is None:
        return spline(*tensors, inverse)
    run_own_code("unconstrained_rational_quadratic_spline", reason)
    return _own_unconstrained(*tensors, inverse, tails, tail_bound, *minima)


class _OnSpline:
    """What the modules with a spline share; their attributes are nflows'."""

    def own_code(self, inputs: Tensor, context: Tensor | None = None) -> str | None:
        """Why this call runs nflows' code, or None."""
        return _reason_against_module(self) or reason_against(inputs)

    def _run_spline(
        self, inputs: Tensor, parameters: tuple[Tensor, Tensor, Tensor], inverse: bool
    ) -> tuple[Tensor, Tensor] | None:
        """None, and a line in the log, where nflows' code has to run."""
        reason = self.own_code(inputs)
        if reason is None:
            spline = _Spline.of(self)
            reason = _reason_against_call(spline, inputs, *parameters)
            if reason is None:
                return spline(inputs, *parameters, inverse, sum_log_det=True)
        _log(self, reason)
        return None


def _reason_against_module(module: Any) -> str | None:
    if module.tails not in (None, "linear"):
        return f"tails={module.tails!r}"
    if isinstance(module, nonlinearities.PiecewiseRationalQuadraticCDF):
        bins = module.unnormalized_widths.shape[-1]
    else:
        bins = module.num_bins
    return _Spline.of(module).reason_against(bins)


def _log(module: Any, reason: str) -> None:
    run_own_code(type(module).__name__.removeprefix("Fused"), reason)


def _parameters(theta: Tensor, bins: int, hidden: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(..., P), the parameters of a spline together -> raw widths, heights and derivatives.

    What goes to the softmaxes is divided by the root of `hidden`, the width of the network that
    made them.
    """
    logits, derivatives = theta.tensor_split((2 * bins,), -1)
    if hidden is not None:
        logits = logits * hidden**-0.5
    widths, heights = logits.tensor_split(2, -1)
    return widths, heights, derivatives


class FusedPiecewiseRationalQuadraticCouplingTransform(
    _OnSpline, coupling.PiecewiseRationalQuadraticCouplingTransform
):
    """A patched nflows.transforms.PiecewiseRationalQuadraticCouplingTransform."""

    def _coupling_transform(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        theta = transform_params.unflatten(1, (inputs.shape[1], -1)).movedim(2, -1)
        parameters = _parameters(theta, self.num_bins, self._hidden())
        result = self._run_spline(inputs, parameters, inverse)
        if result is None:
            return super()._coupling_transform(inputs, transform_params, inverse)
        return result

    def _hidden(self) -> int | None:
        for name in ("hidden_features", "hidden_channels"):
            if hasattr(self.transform_net, name):
                return getattr(self.transform_net, name)
        warnings.warn(
            "Inputs to the softmax are not scaled down: initialization might be bad.", stacklevel=2
        )
        return None


class FusedMaskedPiecewiseRationalQuadraticAutoregressiveTransform(
    _OnSpline, autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
):
    """A patched nflows.transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform."""

    def _elementwise(
        self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        theta = autoregressive_params.unflatten(1, (inputs.shape[1], -1))
        hidden = getattr(self.autoregressive_net, "hidden_features", None)
        result = self._run_spline(inputs, _parameters(theta, self.num_bins, hidden), inverse)
        if result is None:
            return super()._elementwise(inputs, autoregressive_params, inverse)
        return result


class FusedPiecewiseRationalQuadraticCDF(_OnSpline, nonlinearities.PiecewiseRationalQuadraticCDF):
    """A patched nflows.transforms.PiecewiseRationalQuadraticCDF."""

    def _spline(self, inputs: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        raw = self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives
        widths, heights, derivatives = (t.expand(inputs.shape[0], *t.shape) for t in raw)
        result = self._run_spline(inputs, (widths, heights, derivatives), inverse)
        return super()._spline(inputs, inverse) if result is None else result


def _affine(inputs: Tensor, raw: Tensor, shift: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The coupling with y in the dtype of the inputs, from which that of the rest differs under
    autocast alone."""
    y, log_det = affine(inputs, raw, shift, **options)
    return y.to(inputs.dtype), log_det


class _OnAffine:
    """What the affine transforms share."""

    #: What nflows adds to the scale.
    _floor: float

    def own_code(self, inputs: Tensor, context: Tensor | None = None) -> str | None:
        """Why this call runs nflows' code, or None."""
        return self._reason_against(inputs)

    def _reason_against(self, *tensors: Tensor) -> str | None:
        floor = self._floor
        if not is_number(floor) or not torch.finfo(torch.float32).tiny <= floor < math.inf:
            return f"a scale of at least {floor!r}"
        return reason_against(*tensors)

    def _takes(self, inputs: Tensor, parameters: Tensor) -> bool:
        """Whether these are (B, C, ...) and (B, 2 C, ...), and a line in the log where not."""
        reason = self._reason_against(inputs, parameters)
        if reason is None:
            batch, channels, *others = inputs.shape
            if parameters.shape == (batch, 2 * channels, *others):
                return True
            reason = "parameters of other shapes than the inputs'"
        _log(self, reason)
        return False


class FusedAffineCouplingTransform(_OnAffine, coupling.AffineCouplingTransform):
    """A patched nflows.transforms.AffineCouplingTransform."""

    _floor = 1e-3

    def _coupling_transform_forward(
        self, inputs: Tensor, transform_params: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = self._couple(inputs, transform_params, inverse=False)
        if result is None:
            return super()._coupling_transform_forward(inputs, transform_params)
        return result

    def _coupling_transform_inverse(
        self, inputs: Tensor, transform_params: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = self._couple(inputs, transform_params, inverse=True)
        if result is None:
            return super()._coupling_transform_inverse(inputs, transform_params)
        return result

    def _couple(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor] | None:
        if not self._takes(inputs, transform_params):
            return None
        shift, raw = transform_params.chunk(2, 1)
        return _affine(inputs, raw, shift, scale="sigmoid", min_scale=self._floor, inverse=inverse)


class FusedAdditiveCouplingTransform(coupling.AdditiveCouplingTransform):
    """A patched nflows.transforms.AdditiveCouplingTransform: without its scale of ones."""

    def _coupling_transform_forward(
        self, inputs: Tensor, transform_params: Tensor
    ) -> tuple[Tensor, Tensor]:
        return inputs + transform_params, inputs.new_zeros(inputs.shape[0])

    def _coupling_transform_inverse(
        self, inputs: Tensor, transform_params: Tensor
    ) -> tuple[Tensor, Tensor]:
        return inputs - transform_params, inputs.new_zeros(inputs.shape[0])


class FusedMaskedAffineAutoregressiveTransform(
    _OnAffine, autoregressive.MaskedAffineAutoregressiveTransform
):
    """A patched nflows.transforms.MaskedAffineAutoregressiveTransform."""

    @property
    def _floor(self) -> float:  # type: ignore[override]
        return self._epsilon

    def _elementwise_forward(
        self, inputs: Tensor, autoregressive_params: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = self._elementwise(inputs, autoregressive_params, inverse=False)
        if result is None:
            return super()._elementwise_forward(inputs, autoregressive_params)
        return result

    def _elementwise_inverse(
        self, inputs: Tensor, autoregressive_params: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = self._elementwise(inputs, autoregressive_params, inverse=True)
        if result is None:
            return super()._elementwise_inverse(inputs, autoregressive_params)
        return result

    def _elementwise(
        self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor] | None:
        if not self._takes(inputs, autoregressive_params):
            return None
        raw, shift = autoregressive_params.unflatten(1, (-1, 2)).unbind(-1)
        return _affine(inputs, raw, shift, scale="softplus", min_scale=self._floor, inverse=inverse)


_SPLINE = (
    _own_constrained,
    _own_unconstrained,
    torchutils.searchsorted,
    torchutils.sum_except_batch,
)
_COUPLING = (coupling.CouplingTransform, torchutils.sum_except_batch)
_AUTOREGRESSIVE = (autoregressive.AutoregressiveTransform, torchutils.sum_except_batch)

LIBRARY = Library(
    name="nflows",
    distribution="nflows",
    tested=("0.14",),
    swaps=(
        Swap(
            coupling.AdditiveCouplingTransform,
            FusedAdditiveCouplingTransform,
            "9d76a82116667400",
            (*_COUPLING, coupling.AffineCouplingTransform),
        ),
        Swap(
            coupling.AffineCouplingTransform,
            FusedAffineCouplingTransform,
            "05c5e5502d17dcb7",
            _COUPLING,
        ),
        Swap(
            autoregressive.MaskedAffineAutoregressiveTransform,
            FusedMaskedAffineAutoregressiveTransform,
            "0ba2ea500abc197f",
            _AUTOREGRESSIVE,
        ),
        Swap(
            autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
            FusedMaskedPiecewiseRationalQuadraticAutoregressiveTransform,
            "6be9405bf8b58211",
            (*_AUTOREGRESSIVE, *_SPLINE),
            _reason_against_module,
        ),
        Swap(
            nonlinearities.PiecewiseRationalQuadraticCDF,
            FusedPiecewiseRationalQuadraticCDF,
            "a6a591fef95ce6f5",
            (nonlinearities._share_across_batch, *_SPLINE),
            _reason_against_module,
        ),
        Swap(
            coupling.PiecewiseRationalQuadraticCouplingTransform,
            FusedPiecewiseRationalQuadraticCouplingTransform,
            "c781d812d6c5481e",
            (*_COUPLING, coupling.PiecewiseCouplingTransform, *_SPLINE),
            _reason_against_module,
        ),
    ),
    functions=(
        Function(_own_constrained, rational_quadratic_spline, "ccf595b94ef520c5", _SPLINE[2:3]),
        Function(
            _own_unconstrained,
            unconstrained_rational_quadratic_spline,
            "c4d25fa3907b16a1",
            (_own_constrained, *_SPLINE[2:3]),
        ),
    ),
)
