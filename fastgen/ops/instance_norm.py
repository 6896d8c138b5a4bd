"""Instance normalisation: each plane of each sample to mean 0 and variance 1, then an affine map.

    y = weight * xhat + bias,  xhat = (x - mean) / sqrt(var + eps)

with mean and biased variance over the spatial dimensions of each (sample, channel) (Ulyanov et al.
2016, eq. 3). `adain` is the same op with an affine map for each plane, and shares everything here
but its reference and its checks.

Shapes: x (B, C, *spatial), at least one spatial dimension, of float32, float64, float16 or
bfloat16; weight, bias (C,) of x's dtype, or float32 for half inputs; y as x, channels_last where x
is. A single spatial element has variance 0 and gives y = bias (torch.nn.functional.instance_norm
refuses it, and so do the layers of fastgen.nn); no spatial elements give an empty y. A plane with a
NaN or an infinity becomes NaN. Statistics are summed in float64, so that they are right to the last
bits for any ratio of mean to standard deviation; on GPUs about an origin near the mean, half inputs
in float32, where squares of deviations beyond 1e18 overflow and below 1e-19 vanish. Gradients:
first order fused, second fused on GPUs and a closed formula of torch ops elsewhere, which third and
higher differentiate. Backends: triton, cpu, reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops import _check, _library
from fastgen.ops._autograd import Fused, accumulate_dtype, autocast_promote, run

__all__ = ["instance_norm", "instance_norm_with_stats"]

_fwd = _library.define(
    "instance_norm_fwd(Tensor x, Tensor? scale, Tensor? shift, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    any_layout=True,
)
# scale and shift are (B, C) or (C,); their gradients have the shape of scale, (B, C) where there is
# none, and the dtype of the arithmetic.
_bwd = _library.define(
    "instance_norm_bwd(Tensor grad_y, Tensor x, Tensor mean, Tensor var, Tensor? scale, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    any_layout=True,
)
# u, p and q are the gradients by the three results of instance_norm_bwd, None for zero; the results
# are those by grad_y, x and scale, the last of the shape and dtype of the gradients of scale.
_bwd_bwd = _library.define(
    "instance_norm_bwd_bwd(Tensor grad_y, Tensor x, Tensor mean, Tensor var, Tensor? scale, "
    "Tensor? u, Tensor? p, Tensor? q, float eps) -> (Tensor, Tensor, Tensor)",
    any_layout=True,
)


def _layout(x: Tensor) -> torch.memory_format:
    """How the kernels lay out what is like x: channels_last where x is, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


@_library.register_fake("instance_norm_fwd")
def _(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=torch.float64)
    return _dense_like(x), mean, torch.empty_like(mean)


@_library.register_fake("instance_norm_bwd")
def _(
    grad_y: Tensor, x: Tensor, mean: Tensor, var: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[:2] if scale is None else scale.shape
    grad_scale = x.new_empty(shape, dtype=accumulate_dtype(x.dtype))
    return _dense_like(x), grad_scale, torch.empty_like(grad_scale)


@_library.register_fake("instance_norm_bwd_bwd")
def _(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None,
    u: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[:2] if scale is None else scale.shape
    of_scale = x.new_empty(shape, dtype=accumulate_dtype(x.dtype))
    return _dense_like(x), _dense_like(x), of_scale


def _register_vmap(name: str, of_parameters: tuple[int, ...] = ()) -> None:
    """vmap by folding into the batch, where (C,) parameters become (B, C) and differ by slice.

    Results `of_parameters` are then summed over the batch, as the parameters are shared by it.
    """

    def fold(info: Any, in_dims: tuple, *args: Any) -> tuple:
        sizes = list(args[0].shape)
        if in_dims[0] is not None:
            del sizes[in_dims[0]]
        values, dims, per_channel = list(args), list(in_dims), False
        for i, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
            if not isinstance(arg, Tensor) or arg.dim() - (dim is not None) != 1:
                continue
            per_channel = True
            if dim is None:
                values[i] = arg.expand(sizes[:2])
            else:
                values[i], dims[i] = arg.movedim(dim, 0)[:, None].expand(-1, *sizes[:2]), 0
        out, out_dims = _library.fold_vmap(name, info, tuple(dims), *values)
        if per_channel:
            out = tuple(r.sum(1) if i in of_parameters else r for i, r in enumerate(out))
        return out, out_dims

    torch.library.register_vmap(f"fastgen::{name}", fold, lib=_library.LIBRARY)


_register_vmap("instance_norm_fwd")
_register_vmap("instance_norm_bwd", (1, 2))
_register_vmap("instance_norm_bwd_bwd", (2,))


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """xhat (B, C, N), 1 / sqrt(var + eps), mean and biased variance (B, C, 1), in plain torch and
    arithmetic dtype.

    Deviations are centred twice, for the mean is rounded as the values are. Where powers of them
    could leave the range of the dtype, they are squared in a unit of their size, which cancels.
    """
    flat = x.to(accumulate_dtype(x.dtype)).flatten(2)
    mean = flat.mean(2, keepdim=True)
    centred = flat - mean
    unit = torch.ones_like(mean)
    if x.numel():
        size = centred.detach().abs().amax(2, keepdim=True)
        size = size.clamp(min=max(math.sqrt(eps), torch.finfo(flat.dtype).tiny))
        unit = torch.where((size > 1e-6) & (size < 1e6), unit, size)
    centred = centred / unit
    # Zero but for rounding, and so is its gradient.
    rest = centred.detach().mean(2, keepdim=True)
    centred = centred - rest
    var = centred.square().mean(2, keepdim=True)
    rstd = (var + (math.sqrt(eps) / unit).square()).rsqrt()
    return centred * rstd, rstd / unit, mean + rest * unit, var * unit * unit


def instance_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain PyTorch; arguments and results as :func:`instance_norm_with_stats`."""
    xhat, _, mean, var = normalise(x, eps)
    y = xhat if weight is None else xhat * weight[:, None]
    y = y if bias is None else y + bias[:, None]
    return y.to(x.dtype).reshape(x.shape), mean.detach().flatten(1), var.detach().flatten(1)


class _InstanceNorm(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        x, scale, shift, ctx.eps = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, mean, var, scale)
        ctx.parameters = [None if p is None else (p.dim(), p.dtype) for p in (scale, shift)]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple:
        x, mean, var, scale = ctx.saved_tensors
        tensors = (grad_y, x, mean, var, scale)
        grad_x, *grads = run(_InstanceNormBackward, _bwd, tensors, ctx.eps)
        return grad_x, *map(_gradient_of, grads, ctx.parameters), None


def _gradient_of(parameter_grad: Tensor, parameter: tuple[int, torch.dtype] | None) -> Any:
    """The gradient of a parameter of (dimensions, dtype); None where there is no parameter."""
    if parameter is None:
        return None
    dims, dtype = parameter
    grad = parameter_grad if parameter_grad.dim() == dims else parameter_grad.sum(0)
    return grad.to(dtype)


class _InstanceNormBackward(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _bwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        *tensors, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        grad_y, x, mean, var, scale = ctx.saved_tensors
        tensors = (grad_y, x, mean, var, scale, *grads)
        of_grad_y, of_x, of_scale = run(_InstanceNormSecond, _bwd_bwd, tensors, ctx.eps)
        of_scale = None if scale is None else of_scale.to(scale.dtype)
        return of_grad_y, of_x, None, None, of_scale, None


class _InstanceNormSecond(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _bwd_bwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        tensors = ctx.saved_tensors
        wanted = [i for i in (0, 1, 4, 5, 6, 7) if tensors[i] is not None]

        def formula(*primals: Tensor) -> tuple[Tensor, ...]:
            full = [*tensors, ctx.eps]
            for i, primal in zip(wanted, primals, strict=True):
                full[i] = primal
            return second_order_reference(*full)

        _, pullback, *_ = torch.func.vjp(formula, *(tensors[i] for i in wanted))
        results = dict(zip(wanted, pullback(grads), strict=True))
        return *(results.get(i) for i in range(8)), None


def second_order_reference(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None,
    u: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, by grad_y, x and scale, of <u, grad_x> + <p, grad_scale> + <q, grad_shift>.

    Raw operator instance_norm_bwd_bwd in plain PyTorch, differentiable: mean and var are those of
    x, and not used. scale, p and q are (C,) or (B, C), None for one and zero.
    """
    xhat, rstd, _, _ = normalise(x, eps)
    return _second_order(grad_y, x, xhat, rstd, scale, u, p, q)


def _second_order_cpu(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None,
    u: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`second_order_reference` of the float64 statistics that the forward pass computed."""
    flat = x.to(accumulate_dtype(x.dtype)).flatten(2)
    mean, rstd = mean[..., None], (var + eps).rsqrt()[..., None]
    high = mean.to(flat.dtype)
    # A mean of many digits, as the values have them and then the rest.
    centred = (flat - high).sub_((mean - high).to(flat.dtype))
    return _second_order(grad_y, x, centred.mul_(rstd.to(flat.dtype)), rstd, scale, u, p, q)


def _second_order(
    grad_y: Tensor,
    x: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    u: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`second_order_reference`, of xhat (B, C, N) and r = rstd (B, C, 1).

    With a = r scale, v the deviations of grad_y and w those of u from their means, alpha =
    -a mean(v xhat), beta = p - a mean(w xhat) and c = mean(v w) - mean(v xhat) mean(w xhat), the
    gradients are a w + beta xhat + q, r (alpha w + beta v - (alpha mean(w xhat) + beta mean(v xhat)
    + a c) xhat) and r n c. What there is one of for each plane is of float64: r can be large and
    its powers no float32, where the gradients still are.
    """
    dtype = xhat.dtype
    rstd = rstd.double() if x.numel() else torch.zeros_like(rstd, dtype=torch.float64)
    scale_dims = 2 if scale is None else scale.dim()
    scale, p, q = (None if t is None else t.double()[..., None] for t in (scale, p, q))
    a = rstd if scale is None else rstd * scale

    def mean_of(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return (t.sum(2, keepdim=True, dtype=dtype) / max(1, t.shape[2])).double()

    def deviations(t: Tensor) -> Tensor:
        t = t.to(dtype).flatten(2)
        return t - t.mean(2, keepdim=True)

    v = deviations(grad_y)
    v_xhat = mean_of(v * xhat)
    beta = torch.zeros_like(a) if p is None else p.expand_as(a)
    if u is None:
        shared = torch.zeros_like(a)
        of_grad_y = beta.to(dtype) * xhat
        of_x = beta.to(dtype) * v - (beta * v_xhat).to(dtype) * xhat
    else:
        w = deviations(u)
        w_xhat = mean_of(w * xhat)
        # Summed in float64: it is what cancellation leaves of most planes.
        shared = mean_of(v * w, torch.float64) - v_xhat * w_xhat
        alpha, beta = -a * v_xhat, beta - a * w_xhat
        along = alpha * w_xhat + beta * v_xhat + a * shared
        alpha, beta, along = (t.to(dtype) for t in (alpha, beta, along))
        of_grad_y = a.to(dtype) * w + beta * xhat
        of_x = alpha * w + beta * v - along * xhat
    of_x = rstd.to(dtype) * of_x
    if q is not None:
        of_grad_y = of_grad_y + q.to(dtype)
    of_scale = (rstd * (xhat.shape[2] * shared)).flatten(1)
    if scale_dims == 1:
        of_scale = of_scale.sum(0)

    def like_x(t: Tensor) -> Tensor:
        return t.to(x.dtype).reshape(x.shape).contiguous(memory_format=_layout(x))

    return like_x(of_grad_y), like_x(of_x), of_scale.to(dtype)


_library.LIBRARY.impl("instance_norm_bwd_bwd", _second_order_cpu, "CPU")
_library.register_triton(
    "instance_norm", "instance_norm_fwd", "instance_norm_bwd", "instance_norm_bwd_bwd"
)


def fused(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused op, with scale and shift (C,) or (B, C); gives y, mean, var."""
    return run(_InstanceNorm, _fwd, (x, scale, shift), eps)


def check_input(x: Any, eps: Any) -> None:
    """Raises unless x is a floating (B, C, *spatial) tensor and eps a positive number."""
    _check.floating(x, "x")
    _check.rank(x, "x", 3, "at least three dimensions, (B, C, *spatial)")
    _check.positive(eps, "eps")


def check_parameter(value: Any, name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raises unless `value` is a parameter that x can be scaled or shifted with."""
    _check.floating(value, name)
    if value.dtype != x.dtype and value.dtype != accumulate_dtype(x.dtype):
        _check.matches(value, name, x, "x")
    _check.same_device(value, name, x, "x")
    _check.shape(value, name, shape, meaning)


def _prepare(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple:
    x, weight, bias = autocast_promote(x, weight, bias)
    check_input(x, eps)
    for value, name in ((weight, "weight"), (bias, "bias")):
        if value is not None:
            check_parameter(value, name, x, (x.shape[1],), "one for each channel of x")
    return x, weight, bias, float(eps)


_OP = backends.Op("instance_norm", _prepare)
_OP.implement(
    "triton", fused, device=_library.triton_device, unavailable=_library.triton_unavailable
)
_OP.implement("cpu", fused, device="cpu", unavailable=_library.cpu_unavailable_beside_triton)
_OP.implement("reference", instance_norm_reference)


def instance_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Normalises each plane of each sample, then scales and shifts it by its channel.

    Args:
        x: (B, C, *spatial).
        weight: (C,), the scale; None for 1.
        bias: (C,), the shift; None for 0.
        eps: added to the variance, positive.
        backend: force "triton", "cpu" or "reference".

    Returns:
        (B, C, *spatial), dtype of x; channels_last where x is, else contiguous.

    Raises:
        TypeError: not tensors, not floating, or weight or bias neither of x's dtype nor float32
            beside a half x.
        ValueError: x has fewer than three dimensions; weight or bias is not (C,) or on another
            device; eps is not positive; unknown `backend`.

    Autocast: mixed dtypes become the widest of them.
    """
    return _OP(_prepare(x, weight, bias, eps=eps), backend)[0]


def instance_norm_with_stats(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`instance_norm` together with the statistics that it computes on the way.

    Returns:
        y: (B, C, *spatial), dtype of x.
        mean, var: (B, C), mean and biased variance of each plane of x, float32 or float64, without
            gradients.
    """
    return _OP(_prepare(x, weight, bias, eps=eps), backend)
