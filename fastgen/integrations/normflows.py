"""Couplings, masked affine autoregression and rational-quadratic splines of normflows on
:func:`fastgen.ops.affine_coupling` and :func:`fastgen.ops.rq_spline`.

GlowBlock and the neural spline layers (CoupledRationalQuadraticSpline and its kin) are made of the
classes covered here. The library's raw derivatives are ours plus log(exp(1 - min_derivative) - 1).
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from normflows.flows.affine.autoregressive import Autoregressive, MaskedAffineAutoregressive
from normflows.flows.affine.coupling import AffineCoupling, AffineCouplingBlock, MaskedAffineFlow
from normflows.flows.neural_spline.autoregressive import (
    MaskedPiecewiseRationalQuadraticAutoregressive,
)
from normflows.flows.neural_spline.coupling import (
    Coupling,
    PiecewiseCoupling,
    PiecewiseRationalQuadraticCDF,
    PiecewiseRationalQuadraticCoupling,
)
from normflows.flows.reshape import Merge, Split
from normflows.utils import splines
from normflows.utils.nn import sum_except_batch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen import ops
from fastgen.integrations import _library
from fastgen.integrations._calls import (
    derivative_shift,
    reason_against_dtypes,
    reason_against_minima,
    reason_against_tracer,
)
from fastgen.integrations._coupling import (
    Given,
    affine,
    reason_against,
    reason_against_cpu,
    slower_on_cpu,
)
from fastgen.integrations._library import Function, Library, Swap

__all__ = [
    "LIBRARY",
    "FusedAffineCoupling",
    "FusedAffineCouplingBlock",
    "FusedMaskedAffineAutoregressive",
    "FusedMaskedAffineFlow",
    "FusedMaskedPiecewiseRationalQuadraticAutoregressive",
    "FusedPiecewiseRationalQuadraticCDF",
    "FusedPiecewiseRationalQuadraticCoupling",
    "unconstrained_rational_quadratic_spline",
]

_SCALE_MAPS = ("exp", "sigmoid", "sigmoid_inv")
_library_spline = splines.unconstrained_rational_quadratic_spline


class FusedAffineCoupling(AffineCoupling):
    """A patched normflows AffineCoupling."""

    def own_code(self, z: Any) -> str | None:
        x = z[1]
        return reason_against(x) or reason_against_cpu("AffineCoupling", x)

    def forward(self, z: Any) -> tuple[list[Tensor], Tensor]:
        return self._couple(z, inverse=False)

    def inverse(self, z: Any) -> tuple[list[Tensor], Tensor]:
        return self._couple(z, inverse=True)

    def _couple(self, z: Any, inverse: bool) -> tuple[list[Tensor], Tensor]:
        if (reason := self.own_code(z)) is not None:
            _library.run_own_code("AffineCoupling", reason)
            return super().inverse(z) if inverse else super().forward(z)
        z1, z2 = z
        param = self.param_map(z1)
        reason = _against_pairs(z2, param)
        if reason is not None:
            _library.run_own_code("AffineCoupling", reason)
            run = AffineCoupling.inverse if inverse else AffineCoupling.forward
            return run(Given(self, param_map=param), z)
        # not two slices, whose gradients would be two tensors of param's size to add
        shift, raw_scale = param.unflatten(1, (-1, 2)).unbind(2)
        return self._transform(z1, z2, raw_scale, shift, inverse)

    def _transform(
        self, z1: Tensor, z2: Tensor, raw_scale: Tensor, shift: Tensor, inverse: bool
    ) -> tuple[list[Tensor], Tensor]:
        if self.scale_map != "sigmoid":
            scale = "exp" if self.scale_map == "exp" else "sigmoid"
            y, log_det = affine(z2, raw_scale, shift, scale=scale, inverse=inverse)
            return [z1, y], log_det
        # z2 / s + shift forward: the scale is the op's inverse, the shift is not.
        none = shift.new_zeros(()).expand_as(shift)
        if inverse:
            y, log_det = affine(z2 - shift, raw_scale, none, scale="sigmoid")
        else:
            y, log_det = affine(z2, raw_scale, none, scale="sigmoid", inverse=True)
            y = y + shift
        return [z1, y], log_det


def _against_pairs(x: Tensor, param: Tensor) -> str | None:
    """Why param is not a shift and a raw scale, by turns along dimension 1, for each of x."""
    if (reason := reason_against_dtypes(x, param)) is not None:
        return reason
    if x.dim() < 2 or param.shape != (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        return f"parameters of shape {tuple(param.shape)} for an input of shape {tuple(x.shape)}"
    return None


def _against_coupling(coupling: AffineCoupling) -> str | None:
    if not coupling.scale:
        return "without a scale it is one addition"
    if coupling.scale_map not in _SCALE_MAPS:
        return f"scale_map={coupling.scale_map!r}"
    return None


class FusedAffineCouplingBlock(AffineCouplingBlock):
    """A patched normflows AffineCouplingBlock: no host lists and no gathers for a checkerboard."""

    def own_code(self, z: Tensor) -> str | None:
        if (reason := reason_against_tracer(z)) is not None:
            return reason
        if self._checkerboard and z.shape[-1] % 2:
            return f"a checkerboard of {z.shape[-1]} columns, an odd number"
        for flow in (self.flows[0], self.flows[2]):
            if flow._forward_hooks or flow._forward_pre_hooks:
                return f"a hook on its {type(flow).__name__}"
        return None

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._couple(z, inverse=False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._couple(z, inverse=True)

    @property
    def _checkerboard(self) -> bool:
        return "checkerboard" in self.flows[0].mode

    def _couple(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        reason = self.own_code(z)
        if reason is not None:
            _library.run_own_code("AffineCouplingBlock", reason)
            return super().inverse(z) if inverse else super().forward(z)
        coupling = self.flows[1]
        halves = self._split(z)
        halves, log_det = coupling.inverse(halves) if inverse else coupling(halves)
        return self._merge(halves), log_det.to(z.dtype)

    def _split(self, z: Tensor) -> list[Tensor]:
        if self._checkerboard:
            even, odd = z.unflatten(-1, (-1, 2)).unbind(-1)
            odd_rows = _odd_rows(z)
            halves = [torch.where(odd_rows, even, odd), torch.where(odd_rows, odd, even)]
        else:
            halves = list(z.chunk(2, 1))
        return halves[::-1] if self.flows[0].mode.endswith("_inv") else halves

    def _merge(self, halves: list[Tensor]) -> Tensor:
        first, second = halves[::-1] if self.flows[0].mode.endswith("_inv") else halves
        if not self._checkerboard:
            return torch.cat([first, second], 1)
        odd_rows = _odd_rows(first)
        even, odd = torch.where(odd_rows, first, second), torch.where(odd_rows, second, first)
        return torch.stack([even, odd], -1).flatten(-2)


def _odd_rows(z: Tensor) -> Tensor:
    """Whether a row's indices, the batch's aside, have an odd sum: (C, H, 1) for (B, C, H, W)."""
    rows = torch.zeros(1, dtype=torch.int64, device=z.device)
    for i, size in enumerate(z.shape[1:-1]):
        rows = rows + torch.arange(size, device=z.device).view(size, *[1] * (z.dim() - 2 - i))
    return rows % 2 == 1


_MODES = ("channel", "channel_inv", "checkerboard", "checkerboard_inv")


def _against_block(block: AffineCouplingBlock) -> str | None:
    kinds = (Split, AffineCoupling, Merge)
    if len(block.flows) != 3 or not all(map(isinstance, block.flows, kinds)):
        return "its flows are not a Split, an AffineCoupling and a Merge"
    split, _, merge = block.flows
    if split.mode != merge.mode or split.mode not in _MODES:
        return f"split mode {split.mode!r}, merge mode {merge.mode!r}"
    return None


class FusedMaskedAffineFlow(MaskedAffineFlow):
    """A patched normflows MaskedAffineFlow: masked-out elements are moved by a zero log scale."""

    # What torch.jit.script compiles.
    _own_forward = _library.own_method(MaskedAffineFlow.forward, "_own_forward")

    def own_code(self, z: Tensor) -> str | None:
        if (reason := reason_against_tracer(z)) is not None:
            return reason
        if z.shape[1:] != self.b.shape[1:]:
            return f"an input of shape {tuple(z.shape)} for a mask of {tuple(self.b.shape[1:])}"
        return reason_against(z)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if torch.jit.is_scripting():
            return self._own_forward(z)
        else:
            return self._couple(z, inverse=False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._couple(z, inverse=True)

    def _couple(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        kept = self.b * z
        scale, shift = self.s(kept), self.t(kept)
        reason = self.own_code(z) or reason_against(z, scale, shift)
        if reason is not None:
            _library.run_own_code("MaskedAffineFlow", reason)
            run = MaskedAffineFlow.inverse if inverse else MaskedAffineFlow.forward
            return run(Given(self, s=scale, t=shift), z)
        moved = 1 - self.b
        if self.t is torch.zeros_like:
            shift = shift.new_zeros(()).expand_as(shift)
        else:
            shift = _masked(shift, moved)
        return affine(z, _masked(scale, moved), shift, scale="exp", inverse=inverse)


def _masked(parameter: Tensor, moved: Tensor) -> Tensor:
    """parameter * moved; what is infinite becomes NaN everywhere, as it does in the library."""
    return torch.addcmul(parameter.detach() * 0, parameter, moved)


def _against_mask(flow: MaskedAffineFlow) -> str | None:
    if flow.s is torch.zeros_like:
        return "without a scale it is one addition"
    if not ((flow.b == 0) | (flow.b == 1)).all():
        return "a mask that is not of zeros and ones"
    return None


class FusedMaskedAffineAutoregressive(MaskedAffineAutoregressive):
    """A patched normflows MaskedAffineAutoregressive."""

    def own_code(self, inputs: Tensor, context: Any = None) -> str | None:
        return _against_rank(inputs) or reason_against(inputs)

    def _elementwise_forward(
        self, inputs: Tensor, autoregressive_params: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self._takes(inputs, autoregressive_params):
            return self._elementwise(inputs, autoregressive_params, inverse=False)
        return super()._elementwise_forward(inputs, autoregressive_params)

    def _elementwise_inverse(
        self, inputs: Tensor, autoregressive_params: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self._takes(inputs, autoregressive_params):
            return self._elementwise(inputs, autoregressive_params, inverse=True)
        return super()._elementwise_inverse(inputs, autoregressive_params)

    def _takes(self, inputs: Tensor, params: Tensor) -> bool:
        reason = _against_rank(inputs) or _against_pairs(inputs, params)
        if reason is not None:
            _library.run_own_code("MaskedAffineAutoregressive", reason)
        return reason is None

    def _elementwise(self, inputs: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raw_scale, shift = params.unflatten(1, (-1, 2)).unbind(2)
        return affine(inputs, raw_scale, shift, scale="sigmoid", min_scale=1e-3, inverse=inverse)


def _against_rank(inputs: Tensor) -> str | None:
    """Why an autoregressive network does not take this input, or None."""
    return None if inputs.dim() == 2 else f"an input of {inputs.dim()} dimensions"


def _against_spline(
    tails: Any, tail_bound: Any, bins: int, min_width: float, min_height: float, min_slope: float
) -> str | None:
    """Why our op has no spline of these options, or None."""
    if not isinstance(tails, str) or tails != "linear":
        return f"tails={tails!r}: the fused spline has linear tails"
    if isinstance(tail_bound, Tensor):
        return "a tail_bound for each feature"
    if not 0 < tail_bound < math.inf:
        return f"tail_bound={tail_bound}"
    return reason_against_minima(bins, min_width, min_height, min_slope)


def _spline(
    x: Tensor,
    raw: tuple[Tensor, ...],
    *,
    tail_bound: float,
    inverse: bool,
    minima: tuple[float, float, float],
    sum_log_det: bool,
) -> tuple[Tensor, Tensor]:
    """ops.rq_spline with raw parameters of ours; both results in the dtype of x."""
    dtype = torch.promote_types(x.dtype, raw[0].dtype)
    y, log_det = ops.rq_spline(
        x.to(dtype),
        *(t.to(dtype) for t in raw),
        tail_bound=tail_bound,
        inverse=inverse,
        sum_log_det=sum_log_det,
        min_bin_width=minima[0],
        min_bin_height=minima[1],
        min_derivative=minima[2],
    )
    return y.to(x.dtype), log_det.to(x.dtype)


def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: Any = "linear",
    tail_bound: Any = 1.0,
    min_bin_width: float = splines.DEFAULT_MIN_BIN_WIDTH,
    min_bin_height: float = splines.DEFAULT_MIN_BIN_HEIGHT,
    min_derivative: float = splines.DEFAULT_MIN_DERIVATIVE,
) -> tuple[Tensor, Tensor]:
    """Takes the place of normflows.utils.splines.unconstrained_rational_quadratic_spline."""
    widths, heights, derivatives = (
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
    )
    minima = (min_bin_width, min_bin_height, min_derivative)
    bins = widths.shape[-1]
    reason = _against_spline(tails, tail_bound, bins, *minima)
    reason = reason or _against_parameters(inputs, bins, widths, heights, derivatives)
    if reason is not None:
        _library.run_own_code("unconstrained_rational_quadratic_spline", reason)
        return _library_spline(
            inputs, widths, heights, derivatives, inverse, tails, tail_bound, *minima
        )
    raw = (widths, heights, derivatives - derivative_shift(min_derivative))
    return _spline(
        inputs,
        raw,
        tail_bound=float(tail_bound),
        inverse=inverse,
        minima=minima,
        sum_log_det=False,
    )


def _against_parameters(x: Tensor, bins: int, *raw: Tensor) -> str | None:
    """Why tensors of parameters (..., K), (..., K), (..., K - 1) do not fit x, or None."""
    if (reason := reason_against_dtypes(x, raw[0])) is not None:
        return reason
    for t, last in zip(raw, (bins, bins, bins - 1), strict=True):
        if t.dtype != raw[0].dtype:
            return f"parameters of dtype {raw[0].dtype} and {t.dtype}"
        if t.shape != (*x.shape, last):
            return f"parameters of shape {tuple(t.shape)} for {bins} bins of {tuple(x.shape)}"
    return None


def _transform(
    module: Any, inputs: Tensor, params: Tensor, inverse: bool, softmax_divisor: float
) -> tuple[Tensor, Tensor]:
    """The spline of (B, C, *spatial) by a conditioner's output (B, C (3 K - 1), *spatial)."""
    bins, features = module.num_bins, inputs.shape[1]
    minima = (module.min_bin_width, module.min_bin_height, module.min_derivative)
    shape = (-1, *[1] * (params.dim() - 2))
    # one pass over all parameters, and one gradient of them
    offset = F.pad(inputs.new_zeros(2 * bins), (0, bins - 1), value=-derivative_shift(minima[2]))
    offset = offset.repeat(features).view(shape)
    if softmax_divisor == 1:
        params = params + offset
    else:
        factor = F.pad(inputs.new_full((2 * bins,), 1 / softmax_divisor), (0, bins - 1), value=1.0)
        params = torch.addcmul(offset, params, factor.repeat(features).view(shape))
    params = params.unflatten(1, (features, 3 * bins - 1)).movedim(2, -1)
    return _spline(
        inputs,
        params.split((bins, bins, bins - 1), -1),
        tail_bound=float(module.tail_bound),
        inverse=inverse,
        minima=minima,
        sum_log_det=True,
    )


def _against_output(module: Any, inputs: Tensor, params: Tensor) -> str | None:
    """Why a conditioner's output is not the parameters of a spline for each input, or None."""
    if (reason := reason_against_dtypes(inputs, params)) is not None:
        return reason
    expected = (len(inputs), inputs.shape[1] * (3 * module.num_bins - 1), *inputs.shape[2:])
    if params.shape != expected:
        return f"parameters of shape {tuple(params.shape)} for an input of {tuple(inputs.shape)}"
    return None


class FusedPiecewiseRationalQuadraticCoupling(PiecewiseRationalQuadraticCoupling):
    """A patched normflows PiecewiseRationalQuadraticCoupling."""

    def own_code(self, inputs: Tensor, context: Any = None) -> str | None:
        return reason_against(inputs)

    def _coupling_transform(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        reason = _against_output(self, inputs, transform_params)
        if reason is not None:
            _library.run_own_code("PiecewiseRationalQuadraticCoupling", reason)
            return super()._coupling_transform(inputs, transform_params, inverse)
        return _transform(self, inputs, transform_params, inverse, self._softmax_divisor)

    @property
    def _softmax_divisor(self) -> float:
        for name in ("hidden_features", "hidden_channels"):
            if hasattr(self.transform_net, name):
                return math.sqrt(getattr(self.transform_net, name))
        warnings.warn(
            "PiecewiseRationalQuadraticCoupling: expected a transform_net with hidden_features or "
            f"hidden_channels, got a {type(self.transform_net).__name__} without: the widths and "
            "heights that it gives enter their softmax as they are",
            stacklevel=4,
        )
        return 1.0


class FusedPiecewiseRationalQuadraticCDF(PiecewiseRationalQuadraticCDF):
    """A patched normflows PiecewiseRationalQuadraticCDF."""

    def own_code(self, inputs: Tensor, context: Any = None) -> str | None:
        if (reason := reason_against_dtypes(inputs, self.unnormalized_widths)) is not None:
            return reason
        features = self.unnormalized_widths.shape[:-1]
        if inputs.shape[1:] != features:
            return f"an input of shape {tuple(inputs.shape)} for features {tuple(features)}"
        return None

    def _spline(self, inputs: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        reason = self.own_code(inputs)
        if reason is not None:
            _library.run_own_code("PiecewiseRationalQuadraticCDF", reason)
            return super()._spline(inputs, inverse)
        derivatives = self.unnormalized_derivatives - derivative_shift(self.min_derivative)
        raw = (self.unnormalized_widths, self.unnormalized_heights, derivatives)
        return _spline(
            inputs,
            tuple(t.expand(len(inputs), *t.shape) for t in raw),
            tail_bound=float(self.tail_bound),
            inverse=inverse,
            minima=(self.min_bin_width, self.min_bin_height, self.min_derivative),
            sum_log_det=True,
        )


class FusedMaskedPiecewiseRationalQuadraticAutoregressive(
    MaskedPiecewiseRationalQuadraticAutoregressive
):
    """A patched normflows MaskedPiecewiseRationalQuadraticAutoregressive."""

    def own_code(self, inputs: Tensor, context: Any = None) -> str | None:
        return _against_rank(inputs) or reason_against(inputs)

    def _elementwise(
        self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        params = autoregressive_params
        reason = self.own_code(inputs) or _against_output(self, inputs, params)
        if reason is not None:
            _library.run_own_code("MaskedPiecewiseRationalQuadraticAutoregressive", reason)
            return super()._elementwise(inputs, params, inverse)
        hidden = getattr(self.autoregressive_net, "hidden_features", 1)
        return _transform(self, inputs, params, inverse, math.sqrt(hidden))


def _against_layer(layer: Any) -> str | None:
    bins = layer.num_bins if hasattr(layer, "num_bins") else layer.unnormalized_widths.shape[-1]
    minima = (layer.min_bin_width, layer.min_bin_height, layer.min_derivative)
    return _against_spline(layer.tails, layer.tail_bound, bins, *minima)


def _spline_swap(
    original: type[nn.Module], fused: type[nn.Module], fingerprint: str, *relies_on: Any
) -> Swap:
    pieces = (*relies_on, sum_except_batch, _library_spline, splines.rational_quadratic_spline)
    return Swap(original, fused, fingerprint, pieces, _against_layer)


LIBRARY = Library(
    name="normflows",
    distribution="normflows",
    tested=("1.7.3",),
    swaps=(
        Swap(
            AffineCoupling,
            FusedAffineCoupling,
            "d42fd8a5d711ca57",
            (),
            _against_coupling,
            partial(slower_on_cpu, "AffineCoupling"),
        ),
        Swap(
            AffineCouplingBlock,
            FusedAffineCouplingBlock,
            "16a622d14d9f2c8c",
            (Split, Merge),
            _against_block,
        ),
        Swap(
            MaskedAffineAutoregressive,
            FusedMaskedAffineAutoregressive,
            "0879b5038868870b",
            (Autoregressive, sum_except_batch),
        ),
        Swap(MaskedAffineFlow, FusedMaskedAffineFlow, "52709bb00e386ac4", (), _against_mask),
        _spline_swap(
            PiecewiseRationalQuadraticCoupling,
            FusedPiecewiseRationalQuadraticCoupling,
            "cd6e426c5036627a",
            Coupling,
            PiecewiseCoupling,
        ),
        _spline_swap(
            PiecewiseRationalQuadraticCDF, FusedPiecewiseRationalQuadraticCDF, "1a7e45c45fd16704"
        ),
        _spline_swap(
            MaskedPiecewiseRationalQuadraticAutoregressive,
            FusedMaskedPiecewiseRationalQuadraticAutoregressive,
            "8ed1f3ce94bf2c00",
            Autoregressive,
        ),
    ),
    functions=(
        Function(
            _library_spline,
            unconstrained_rational_quadratic_spline,
            "15b8eb757e2a893a",
            (splines.rational_quadratic_spline, splines.searchsorted),
        ),
    ),
)
