"""Adaptive instance normalisation: each plane to mean 0 and variance 1, then its own affine map.

    y = scale * xhat + shift,  xhat = (x - mean) / sqrt(var + eps)

with mean and biased variance over the spatial dimensions of each (sample, channel), scale and shift
from a style (Huang & Belongie 2017, eq. 8; StyleGAN: Karras et al. 2019, eq. 1).

Shapes: x (B, C, *spatial), at least one spatial dimension, of float32, float64, float16 or
bfloat16; scale, shift (B, C) of x's dtype, or float32 for half inputs; y as x. Everything else,
numerics and gradients included, is as for `instance_norm`, whose kernels run it. Backends: triton,
cpu, reference.
"""

from __future__ import annotations

from torch import Tensor

from fastgen import backends
from fastgen.ops import _library
from fastgen.ops._autograd import autocast_promote
from fastgen.ops.instance_norm import check_input, check_parameter, fused, normalise

__all__ = ["adain"]


def adain_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The op in plain PyTorch; arguments as :func:`adain`, all positional."""
    xhat, _, _, _ = normalise(x, eps)
    return (xhat * scale[:, :, None] + shift[:, :, None]).to(x.dtype).reshape(x.shape)


def _fused(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return fused(x, scale, shift, eps)[0]


def _prepare(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-5) -> tuple:
    x, scale, shift = autocast_promote(x, scale, shift)
    check_input(x, eps)
    for value, name in ((scale, "scale"), (shift, "shift")):
        check_parameter(value, name, x, tuple(x.shape[:2]), "one for each plane of x, (B, C)")
    return x, scale, shift, float(eps)


_OP = backends.Op("adain", _prepare)
_OP.implement(
    "triton", _fused, device=_library.triton_device, unavailable=_library.triton_unavailable
)
_OP.implement("cpu", _fused, device="cpu", unavailable=_library.cpu_unavailable_beside_triton)
_OP.implement("reference", adain_reference)


def adain(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    """Normalises each plane of each sample, then scales and shifts it as a style says.

    Args:
        x: (B, C, *spatial).
        scale: (B, C), the factor itself: pass 1 + s where a network predicts s around zero.
        shift: (B, C).
        eps: added to the variance, positive.
        backend: force "triton", "cpu" or "reference".

    Returns:
        (B, C, *spatial), dtype of x; channels_last where x is, else contiguous.

    Raises:
        TypeError: not tensors, not floating, or scale or shift neither of x's dtype nor float32
            beside a half x.
        ValueError: x has fewer than three dimensions; scale or shift is not (B, C) or on another
            device; eps is not positive; unknown `backend`.

    Autocast: mixed dtypes become the widest of them.
    """
    return _OP(_prepare(x, scale, shift, eps=eps), backend)
