"""Vector quantization with the straight-through gradient and the codebook and commitment losses, in
one pass.

    e = codebook[argmin_k |x - e_k|^2]
    quantized = e                       with the gradient of the identity in x (straight-through)
    loss = codebook_weight * mean |sg(x) - e|^2 + commitment_weight * mean |x - sg(e)|^2

(van den Oord, Vinyals & Kavukcuoglu 2017, eq. 2 and 3; sg stops the gradient; means are over all
elements of x, zero where x is empty.) The search is that of vq_nearest: exact, lowest index on
ties.

Shapes: x (..., N, D) with codebook (K, D), or x (H, N, D) with codebook (H, K, D), one dtype of
float32, float64, float16, bfloat16; quantized as x; indices (..., N) int64; loss a scalar, float32
(float64 for float64 inputs). Half inputs are computed in float32. Elements of x that are not finite
make the same elements of `quantized` NaN. Gradients: first order fused and deterministic (rows are
added to their code in row order), second and higher by the reference; that of the codebook is None
where the loss is not used or `codebook_weight` is 0. Backends: cuda, cpu, reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops import _check, _library
from fastgen.ops._autograd import (
    Fused,
    accumulate_dtype,
    autocast_promote,
    reference_vjp,
    run,
)
from fastgen.ops.vq_nearest import check_codebook, vq_nearest_reference

__all__ = ["VQResult", "vq_quantize"]


class VQResult(NamedTuple):
    """What :func:`vq_quantize` returns.

    Attributes:
        quantized: shape and dtype of x; the gradient passes straight through to x.
        indices: (..., N) int64.
        loss: scalar.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor


_fwd = _library.define(
    "vq_quantize_fwd(Tensor x, Tensor codebook, float commitment_weight, float codebook_weight) "
    "-> (Tensor, Tensor, Tensor)"
)
_bwd = _library.define(
    "vq_quantize_bwd(Tensor grad_quantized, Tensor grad_loss, Tensor x, Tensor codebook, "
    "Tensor indices, float commitment_weight, float codebook_weight, bool codebook_grad) "
    "-> (Tensor, Tensor)"
)


@_library.register_fake("vq_quantize_fwd")
def _(
    x: Tensor, codebook: Tensor, commitment_weight: float, codebook_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    return x.new_empty(x.shape), indices, x.new_empty((), dtype=accumulate_dtype(x.dtype))


@_library.register_fake("vq_quantize_bwd")
def _(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    commitment_weight: float,
    codebook_weight: float,
    codebook_grad: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(codebook.shape if codebook_grad else (0,))


_library.register_vmap_loop("vq_quantize_fwd")
_library.register_vmap_loop("vq_quantize_bwd")


def _straight_through(
    x: Tensor, codebook: Tensor, indices: Tensor, commitment_weight: float, codebook_weight: float
) -> tuple[Tensor, Tensor]:
    """quantized and loss, for given indices."""
    dtype = accumulate_dtype(x.dtype)
    codes = codebook.to(dtype)
    if codebook.dim() == 3:
        e = codes.gather(1, indices.unsqueeze(-1).expand(*indices.shape, codes.shape[-1]))
    else:
        e = codes[indices]
    if codebook_weight == 0:
        e = e.detach()  # no loss reaches the codebook: its gradient is None, not zeros
    quantized = e.detach().to(x.dtype) + (x - x.detach())
    x = x.to(dtype)
    # With a dimension: vmap over no slices cannot multiply a scalar by a number.
    to_code = (x.detach() - e).square().sum().unsqueeze(0)
    to_x = (x - e.detach()).square().sum().unsqueeze(0)
    loss = (codebook_weight * to_code + commitment_weight * to_x) / max(x.numel(), 1)
    return quantized, loss.squeeze(0)


def vq_quantize_reference(
    x: Tensor, codebook: Tensor, commitment_weight: float, codebook_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain PyTorch; arguments as :func:`vq_quantize`, all positional."""
    indices, _ = vq_nearest_reference(x, codebook, "euclidean", False)
    quantized, loss = _straight_through(x, codebook, indices, commitment_weight, codebook_weight)
    return quantized, indices, loss


class _VQQuantize(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        x, codebook, *ctx.weights = inputs
        quantized, indices, _ = output
        # Straight-through: the codebook gets no gradient from `quantized`.
        constants = (indices,) if ctx.needs_input_grad[0] else (quantized, indices)
        ctx.mark_non_differentiable(*constants)
        ctx.save_for_backward(x, codebook, indices)
        # Undefined gradients would be filled in for the indices too.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_quantized: Tensor | None, _: Any, grad_loss: Tensor | None
    ) -> tuple:
        x, codebook, indices = ctx.saved_tensors
        if grad_quantized is None:
            grad_quantized = torch.zeros_like(x)
        # None where no loss reaches it: an optimizer would let zeros decay the codes
        codebook_grad = ctx.needs_input_grad[1] and grad_loss is not None and ctx.weights[1] > 0
        if grad_loss is None:
            grad_loss = x.new_zeros((), dtype=accumulate_dtype(x.dtype))
        tensors = (grad_quantized, grad_loss, x, codebook, indices)
        grad_x, grad_codebook = run(_VQQuantizeBackward, _bwd, tensors, *ctx.weights, codebook_grad)
        return grad_x, grad_codebook if codebook_grad else None, None, None


class _VQQuantizeBackward(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _bwd(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        *ctx.weights, ctx.codebook_grad = inputs[5:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_grad_x: Tensor | None, grad_grad_codebook: Tensor | None) -> tuple:
        grad_quantized, grad_loss, x, codebook, indices = ctx.saved_tensors

        def reference(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
            return _straight_through(x, codebook, indices, *ctx.weights)

        to_codebook = ctx.codebook_grad and grad_grad_codebook is not None
        grads = (grad_grad_x, grad_grad_codebook if to_codebook else None)
        gx, gcodebook, ggq, ggl = reference_vjp(
            reference, (x, codebook), (grad_quantized, grad_loss), grads
        )
        # that of x has the codes behind a stopped gradient
        return ggq, ggl, gx, gcodebook if to_codebook else None, None, None, None, None


def _fused(
    x: Tensor, codebook: Tensor, commitment_weight: float, codebook_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    return run(_VQQuantize, _fwd, (x, codebook), commitment_weight, codebook_weight)


def _prepare(
    x: Tensor, codebook: Tensor, *, commitment_weight: float = 0.25, codebook_weight: float = 1.0
) -> tuple:
    x, codebook = autocast_promote(x, codebook)
    check_codebook(x, codebook)
    _check.non_negative(commitment_weight, "commitment_weight")
    _check.non_negative(codebook_weight, "codebook_weight")
    return x, codebook, float(commitment_weight), float(codebook_weight)


_OP = backends.Op("vq_quantize", _prepare)
_OP.implement("cuda", _fused, device="cuda", unavailable=_library.cuda_unavailable)
_OP.implement("cpu", _fused, device="cpu", unavailable=_library.cpu_unavailable)
_OP.implement("reference", vq_quantize_reference)


def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    backend: str | None = None,
) -> VQResult:
    """Replaces every row of x by its nearest code, straight-through, and gives the VQ-VAE loss.

    Args:
        x: (..., N, D), or (H, N, D) where the codebook has heads.
        codebook: (K, D), or (H, K, D): one codebook a head. K is at least 1. It is kept for the
            backward pass: one that is changed in place before that (EMA updates) must be passed as
            a copy.
        commitment_weight: beta, weight of the term that pulls x to its code.
        codebook_weight: weight of the term that pulls the code to x; 0 for codebooks learned
            otherwise.
        backend: force "cuda", "cpu" or "reference".

    Returns:
        VQResult(quantized, indices, loss): quantized has the shape and dtype of x; indices are
        (..., N) int64; loss is a scalar, float32 (float64 for float64 inputs), the mean over all
        elements.

    Raises:
        TypeError: not tensors, not floating, or mixed dtypes outside autocast; weights not numbers.
        ValueError: ranks, sizes or devices do not fit; empty codebook; a weight negative or not
            finite; unknown `backend`.

    Autocast: mixed dtypes become the wider of them.
    """
    args = _prepare(
        x, codebook, commitment_weight=commitment_weight, codebook_weight=codebook_weight
    )
    return VQResult(*_OP(args, backend))
