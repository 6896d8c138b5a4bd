"""Gaussian reparameterisation and KL divergence to the standard normal, in one pass.

    z = mu + exp(logvar / 2) * noise,  kl = 1/2 * sum(mu^2 + exp(logvar) - 1 - logvar)

(Kingma and Welling 2014, "Auto-encoding variational Bayes", section 2.4 and appendix B). Noise is
given, or made from a key (`fastgen.random`); then it is never stored: the backward makes it again.
The fused kernels avoid the cancellation of exp(logvar) - 1 - logvar near logvar = 0, in the value
and in the gradient.

Shapes: mu, logvar, noise (B, ...), one dtype of float32, float64, float16, bfloat16; key (2,) int64
[seed, offset]; z as mu; kl (B,) float32, float64 for float64 inputs, summed over all dimensions but
the first. Half inputs are computed in float32, with float32 noise if it is made. Gradients: first
order fused, second and higher by the reference. Backends: cuda, cpu, reference.

Under torch.vmap each sample equals the op on that sample: samples that share a key share the noise,
and a batched key gives each its own. Without a key, vmap's `randomness` decides, as for
torch.randn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import backends, random
from fastgen.ops import _check, _library
from fastgen.ops._autograd import (
    Fused,
    accumulate_dtype,
    apply,
    autocast_promote,
    needs_grad,
    reference_vjp,
    run,
)

__all__ = ["reparam_kl"]

_fwd = _library.define(
    "reparam_kl_fwd(Tensor mu, Tensor logvar, Tensor? noise, Tensor? key) -> (Tensor, Tensor)"
)
_bwd = _library.define(
    "reparam_kl_bwd(Tensor grad_z, Tensor grad_kl, Tensor mu, Tensor logvar, Tensor? noise, "
    "Tensor? key, bool noise_grad) -> (Tensor, Tensor, Tensor)"
)


@_library.register_fake("reparam_kl_fwd")
def _(
    mu: Tensor, logvar: Tensor, noise: Tensor | None, key: Tensor | None
) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape[:1], dtype=accumulate_dtype(mu.dtype))


@_library.register_fake("reparam_kl_bwd")
def _(
    grad_z: Tensor,
    grad_kl: Tensor,
    mu: Tensor,
    logvar: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    noise_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_noise = mu.new_empty(mu.shape if noise_grad else (0,))
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape), grad_noise


# Folding would give samples that share a key different noise.
_library.register_vmap_loop("reparam_kl_fwd")
_library.register_vmap_loop("reparam_kl_bwd")


def reparam_kl_reference(
    mu: Tensor,
    logvar: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch; arguments as :func:`reparam_kl`, all positional."""
    dtype = accumulate_dtype(mu.dtype)
    if noise is None:
        key = _drawn(key, mu, generator)
        noise = random.normal_reference(key, mu.shape, dtype)
    m, lv = mu.to(dtype), logvar.to(dtype)
    z = (m + torch.exp(0.5 * lv) * noise.to(dtype)).to(mu.dtype)
    kl = 0.5 * (m.square() + torch.expm1(lv) - lv)
    return z, kl.unsqueeze(-1).flatten(1).sum(1)


def _drawn(key: Tensor | None, mu: Tensor, generator: torch.Generator | None) -> Tensor:
    return random.draw_key(device=mu.device, generator=generator) if key is None else key


class _ReparamKL(Fused):
    @staticmethod
    def forward(
        mu: Tensor, logvar: Tensor, noise: Tensor | None, key: Tensor | None, noise_grad: bool
    ) -> tuple[Tensor, Tensor]:
        return _fwd(mu, logvar, noise, key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.noise_grad = inputs[4]

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple:
        tensors = (grad_z, grad_kl, *ctx.saved_tensors)
        grad_mu, grad_logvar, grad_noise = run(_ReparamKLBackward, _bwd, tensors, ctx.noise_grad)
        return grad_mu, grad_logvar, grad_noise if ctx.noise_grad else None, None, None


class _ReparamKLBackward(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _bwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.noise_grad = inputs[6]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        grad_z, grad_kl, mu, logvar, noise, key = ctx.saved_tensors
        if noise is None:
            noise = torch.ops.fastgen.normal(key, mu.shape, accumulate_dtype(mu.dtype))

        def reference(mu: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            return reparam_kl_reference(mu, logvar, noise, None)

        wanted = (*grads[:2], grads[2] if ctx.noise_grad else None)
        g_mu, g_logvar, g_noise, g_grad_z, g_grad_kl = reference_vjp(
            reference, (mu, logvar, noise), (grad_z, grad_kl), wanted
        )
        return g_grad_z, g_grad_kl, g_mu, g_logvar, g_noise if ctx.noise_grad else None, None, None


def _fused(
    mu: Tensor,
    logvar: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    if noise is None:
        key = _drawn(key, mu, generator)
    if needs_grad(mu, logvar, noise):
        noise_grad = noise is not None and needs_grad(noise)
        return apply(_ReparamKL, mu, logvar, noise, key, noise_grad)
    return _fwd(mu, logvar, noise, key)


def _prepare(
    mu: Tensor,
    logvar: Tensor,
    noise: Tensor | None = None,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple:
    alike = _check.alike(mu, logvar, mu if noise is None else noise)
    if not alike:
        mu, logvar, noise = autocast_promote(mu, logvar, noise)
        _check.floating(mu, "mu")
    _check.rank(mu, "mu", 1, "at least one dimension, (B, ...)")
    if not alike:
        _check.like(logvar, "logvar", mu, "mu")
        if noise is not None:
            _check.like(noise, "noise", mu, "mu")
    if (noise is not None) + (key is not None) + (generator is not None) > 1:
        raise ValueError("noise: expected at most one of noise, key and generator, got several")
    if key is not None:
        random.check_key(key, device=mu.device)
    random.check_generator(generator)
    return mu, logvar, noise, key, generator


_OP = backends.Op("reparam_kl", _prepare)
_OP.implement("cuda", _fused, device="cuda", unavailable=_library.cuda_unavailable)
_OP.implement("cpu", _fused, device="cpu", unavailable=_library.cpu_unavailable)
_OP.implement("reference", reparam_kl_reference)


def reparam_kl(
    mu: Tensor,
    logvar: Tensor,
    noise: Tensor | None = None,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A sample of N(mu, exp(logvar)) and the divergence KL(N(mu, exp(logvar)) || N(0, I)).

    Args:
        mu: (B, ...), means.
        logvar: (B, ...), logarithms of the variances.
        noise: (B, ...), the standard normal values to use. The default is to make them.
        key: int64 (2,) [seed, offset] that the noise is made from; see `fastgen.random`.
        generator: what to draw the key from if there is neither noise nor key; the default is
            torch's own generator of the device, which torch.manual_seed governs.
        backend: force "cuda", "cpu" or "reference".

    Returns:
        z: (B, ...), dtype of mu.
        kl: (B,) in nats, float32 (float64 for float64 inputs), summed over all other dimensions.

    Raises:
        TypeError: not tensors, not floating, mixed dtypes outside autocast, or a key that is not
            int64.
        ValueError: shapes or devices differ; more than one of `noise`, `key` and `generator`;
            unknown `backend`.

    Autocast: mixed dtypes become the widest of them.
    """
    args = _prepare(mu, logvar, noise, key=key, generator=generator)
    return _OP(args, backend)
