"""nflows, normflows and zuko doing what `affine_coupling` and `rq_spline` do.

Each library has its own parameters. They are converted beforehand, outside the timing, so that all
compute the same map from as many numbers; the harness compares them before it times them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Provider

#: float64 against float64; what is left are the libraries' own guards (1e-6 beside a knot).
TOLERANCE = 1e-5
LEAST = 1e-3
#: Of zuko's soft clamp: p / (1 + |p / log 1e-3|).
ZUKO_BOUND = -math.log(1e-3)


def _unclamped(value: Tensor, factor: float = 1.0) -> Tensor:
    """What zuko's soft clamp p / (1 + factor |p| / ZUKO_BOUND) takes to `value`."""
    return value / (1 - factor * value.abs() / ZUKO_BOUND)


def _least_free(softmax_of: Tensor) -> Tensor:
    """log of the bin shares that fastgen and nflows make: none is under LEAST."""
    bins = softmax_of.shape[-1]
    shares = LEAST + (1 - LEAST * bins) * torch.softmax(softmax_of, dim=-1)
    log = shares.log()
    # A softmax does not feel a shift; centred, the logs are within the reach of the soft clamp.
    return log - (log.amax(-1, keepdim=True) + log.amin(-1, keepdim=True)) / 2


def _slopes_shifted(derivatives: Tensor) -> Tensor:
    """fastgen's derivatives for nflows: softplus is of these, so that zero is no slope of 1."""
    return derivatives + math.log(math.expm1(1 - LEAST))


def _nflows_spline(inverse: bool, bound: float, *inputs: Tensor) -> Any:
    from nflows.transforms.splines import rational_quadratic as rq

    return rq.unconstrained_rational_quadratic_spline(*inputs, inverse=inverse, tail_bound=bound)


def _normflows_spline(inverse: bool, bound: float, *inputs: Tensor) -> Any:
    from normflows.utils import splines

    return splines.unconstrained_rational_quadratic_spline(
        *inputs, inverse=inverse, tail_bound=bound
    )


def _zuko_spline(inverse: bool, bound: float, x: Tensor, *parameters: Tensor) -> Any:
    from zuko.transforms import MonotonicRQSTransform

    transform = MonotonicRQSTransform(*parameters, bound=bound)
    return (transform.inv if inverse else transform).call_and_ladj(x)


def _for_nflows(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple:
    return x, widths, heights, _slopes_shifted(derivatives)


def _for_zuko(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple:
    slopes = LEAST + torch.nn.functional.softplus(_slopes_shifted(derivatives))
    shares = [_unclamped(_least_free(p), factor=2) for p in (widths, heights)]
    return x, *shares, _unclamped(slopes.log())


def spline_peers(inverse: bool, bound: float = 3.0) -> Mapping[str, Provider]:
    """Peers of rq_spline(x, widths, heights, derivatives)."""
    functions = {"nflows": _nflows_spline, "normflows": _normflows_spline, "zuko": _zuko_spline}
    return {
        name: Provider(
            partial(function, inverse, bound),
            _for_zuko if name == "zuko" else _for_nflows,
            tolerance=TOLERANCE,
            package=name,
        )
        for name, function in functions.items()
    }


def _nflows_affine(x: Tensor, parameters: Tensor, coupling: Any) -> Any:
    # Below the public forward, which would also split and join the halves.
    return coupling._coupling_transform_forward(x, parameters)


def _normflows_affine(x: Tensor, parameters: Tensor, coupling: Any) -> Any:
    (_, y), log_det = coupling.forward((parameters, x))
    return y, log_det


def _zuko_affine(x: Tensor, raw_scale: Tensor, shift: Tensor) -> Any:
    from zuko.transforms import MonotonicAffineTransform

    y, log_slope = MonotonicAffineTransform(shift, raw_scale).call_and_ladj(x)
    return y, log_slope.sum(-1)


def _affine_for_nflows(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple:
    from nflows.transforms.coupling import AffineCouplingTransform

    mask = torch.arange(2 * x.shape[1]) % 2
    coupling = AffineCouplingTransform(mask, lambda *_: torch.nn.Identity())
    # nflows adds 1e-3 to its sigmoid.
    scale = torch.logit(torch.sigmoid(raw_scale + 2) - LEAST) - 2
    return x, torch.cat([shift, scale], dim=1), coupling


def _affine_for_normflows(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple:
    from normflows.flows import AffineCoupling

    coupling = AffineCoupling(torch.nn.Identity(), scale_map="sigmoid_inv")
    return x, torch.stack([shift, raw_scale], dim=2).flatten(1), coupling


def _affine_for_zuko(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple:
    return x, _unclamped(torch.nn.functional.logsigmoid(raw_scale + 2)), shift


def affine_peers() -> Mapping[str, Provider]:
    """Peers of affine_coupling(x, raw_scale, shift, scale="sigmoid"), tensors (B, D)."""
    return {
        "nflows": Provider(_nflows_affine, _affine_for_nflows, (0, 1), TOLERANCE, "nflows"),
        "normflows": Provider(
            _normflows_affine, _affine_for_normflows, (0, 1), TOLERANCE, "normflows"
        ),
        "zuko": Provider(_zuko_affine, _affine_for_zuko, None, TOLERANCE, "zuko"),
    }


def _nflows_coupling(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple:
    *_, coupling = _affine_for_nflows(x, raw_scale, shift)
    return x, torch.cat([shift, raw_scale], dim=1), coupling


def _autoregressive(x: Tensor, parameters: Tensor, transform: Any) -> Any:
    # Below the public forward, which would also run the network.
    return transform._elementwise_forward(x, parameters)


def _as_pairs(raw_scale: Tensor, shift: Tensor) -> Tensor:
    return torch.stack([raw_scale, shift], dim=2).flatten(1)


def _nflows_autoregressive(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple:
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    transform = MaskedAffineAutoregressiveTransform(x.shape[1], 1)
    return x, _as_pairs(raw_scale, shift), transform


def _normflows_autoregressive(x: Tensor, raw_scale: Tensor, shift: Tensor) -> tuple:
    from normflows.flows import MaskedAffineAutoregressive

    return x, _as_pairs(raw_scale, shift), MaskedAffineAutoregressive(x.shape[1], 1)


def floored_affine_peers(scale: str) -> Mapping[str, Provider]:
    """Peers of affine_coupling(x, raw_scale, shift, scale=scale, min_scale=LEAST), as (B, D)."""
    peers = {
        "sigmoid": (
            ("nflows", _nflows_affine, _nflows_coupling),
            ("normflows", _autoregressive, _normflows_autoregressive),
        ),
        "softplus": (("nflows", _autoregressive, _nflows_autoregressive),),
    }
    return {
        name: Provider(call, prepare, (0, 1), TOLERANCE, name)
        for name, call, prepare in peers[scale]
    }
