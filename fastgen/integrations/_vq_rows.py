"""What vector-quantize-pytorch computes for rows and codes, without a matrix of all their pairs.

H codebooks of K codes, R rows each: rows (H, R, D), codes (H, K, D), indices and mask (H, R).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from vector_quantize_pytorch import vector_quantize_pytorch as library

from fastgen import ops
from fastgen.ops._autograd import Fused, accumulate_dtype, run, without_autocast

__all__ = [
    "assign",
    "cross_entropy",
    "in_table",
    "nearest",
    "negative_entropy",
    "statistics",
]

#: Routes of the gradient of quantized rows: to the code, to the row as it is, to the row rotated.
PLAIN, STRAIGHT_THROUGH, ROTATION = "plain", "straight-through", "rotation"

#: The library divides by no length below this.
LEAST_LENGTH = 1e-6

#: Index of a row that the cross entropy skips.
IGNORED = -1

#: Most scores that the losses over all codes hold at once.
SCORES = 1 << 22
#: Elements of the rows worked on at once: on a CPU few enough to stay in L2 from pass to pass.
CPU_ELEMENTS, GPU_ELEMENTS = 1 << 17, 1 << 26


def nearest(rows: Tensor, codes: Tensor, inner_product: bool) -> Tensor:
    """Index (H, R) of the code with the least distance, or with the greatest inner product."""
    rows, codes = rows.detach(), codes.detach()
    if not inner_product:
        return ops.vq_nearest(rows, codes)
    # With one more coordinate all codes are as long as the longest: the angle decides.
    squares = codes.double().square().sum(-1, keepdim=True)
    squares = torch.where(squares.isfinite(), squares, 0)
    rest = (squares.amax(-2, keepdim=True) - squares).sqrt().to(codes.dtype)
    return ops.vq_nearest(F.pad(rows, (0, 1)), torch.cat((codes, rest), -1), metric="cosine")


def in_table(indices: Tensor, num_codes: int) -> Tensor:
    """Indices (H, R) as rows of the codes of all heads, (H * K, D): (H * R,)."""
    if len(indices) > 1:
        first = torch.arange(len(indices), device=indices.device) * num_codes
        indices = indices + first[:, None]
    return indices.reshape(-1)


def statistics(
    rows: Tensor, indices: Tensor, mask: Tensor | None, num_codes: int
) -> tuple[Tensor, Tensor]:
    """How many rows chose each code, (H, K), and their sums, (H, K, D); rows masked out not."""
    heads, dim = rows.shape[0], rows.shape[-1]
    total = heads * num_codes
    flat = in_table(indices, num_codes)
    if mask is None:
        counts, sums = ops.vq_codebook_stats(rows.reshape(-1, dim), flat, total)
    else:
        flat = torch.where(mask.reshape(-1), flat, total)
        counts, sums = ops.vq_codebook_stats(rows.reshape(-1, dim), flat, total + 1)
    return counts[:total].view(heads, num_codes), sums[:total].view(heads, num_codes, dim)


def _scores(rows: Tensor, codes: Tensor, inner_product: bool) -> Tensor:
    with without_autocast(rows.device):
        return rows @ codes.mT if inner_product else -library.cdist(rows, codes)


def _again(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args); backward computes it again, so that it keeps the arguments alone."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def cross_entropy(rows: Tensor, codes: Tensor, targets: Tensor, inner_product: bool) -> Tensor:
    """Mean cross entropy of softmax(scores) with the targets (H, R), where they are not IGNORED."""
    step = max(1, SCORES // (len(codes) * codes.shape[1]))
    total = rows.new_zeros(())
    for some, of_them in zip(rows.split(step, 1), targets.split(step, 1), strict=True):
        total = total + _again(_sum_of_cross_entropies, some, codes, of_them, inner_product)
    return total / (targets != IGNORED).sum()


def _sum_of_cross_entropies(
    rows: Tensor, codes: Tensor, targets: Tensor, inner_product: bool
) -> Tensor:
    logits = _scores(rows, codes, inner_product).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def negative_entropy(
    rows: Tensor, codes: Tensor, temperature: float, inner_product: bool
) -> Tensor:
    """Minus the entropy of softmax(temperature * scores), averaged over heads and batch.

    rows: (H, B, n, D); the mean of the entropies of the n positions.
    """
    total = rows.new_zeros(())
    for some in rows.split(max(1, SCORES // codes.shape[1]), 2):
        total = total + _again(_sum_of_entropies, some, codes, temperature, inner_product)
    return -total / rows.shape[2]


def _sum_of_entropies(
    rows: Tensor, codes: Tensor, temperature: float, inner_product: bool
) -> Tensor:
    heads, batch, positions, _ = rows.shape
    step = max(1, SCORES // (heads * positions * codes.shape[1]))
    total = rows.new_zeros(positions, codes.shape[1])
    for some in rows.split(step, 1):
        total = total + _again(_probabilities, some, codes, temperature, inner_product)
    return library.entropy(total / (heads * batch)).sum()


def _probabilities(rows: Tensor, codes: Tensor, temperature: float, inner_product: bool) -> Tensor:
    scores = _scores(rows.flatten(1, 2), codes, inner_product)
    return (scores * temperature).softmax(-1).unflatten(1, rows.shape[1:3]).sum((0, 1))


def assign(
    rows: Tensor, table: Tensor, flat: Tensor, mask: Tensor | None, route: str, pull_codes: bool
) -> tuple[Tensor, Tensor]:
    """The codes that rows were assigned to, in place of the rows, and how far they are.

    Args:
        rows: (N, D).
        table: (K, D), dtype of `rows`; not to be changed before backward.
        flat: (N,) index of each row's code.
        mask: (N,) bool, False where the distance does not count.
        route: where the gradient of `quantized` goes: PLAIN, STRAIGHT_THROUGH or ROTATION (Fifty
            et al. 2024, section 4.2).
        pull_codes: whether the distance has a gradient in the table too, not in the rows alone.

    Returns:
        quantized: (N, D).
        squares: scalar, sum of squared distances; float32, or float64 for float64 rows.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _composed(rows, table, flat, mask, route, pull_codes)
    return run(_Assign, _forward, (rows, table), flat, mask, route, pull_codes)


def _composed(
    rows: Tensor, table: Tensor, flat: Tensor, mask: Tensor | None, route: str, pull_codes: bool
) -> tuple[Tensor, Tensor]:
    codes = F.embedding(flat, table)
    quantized = codes
    if route == STRAIGHT_THROUGH:
        quantized = library.straight_through(rows, codes)
    elif route == ROTATION:
        quantized = library.rotate_to(rows, codes)
    wide = accumulate_dtype(rows.dtype)
    gap = (codes if pull_codes else codes.detach()).to(wide) - rows.to(wide)
    if mask is not None:
        gap = gap.masked_fill(~mask[:, None], 0)
    return quantized, gap.square().sum()


def _parts(rows: Tensor) -> Iterator[slice]:
    elements = CPU_ELEMENTS if rows.device.type == "cpu" else GPU_ELEMENTS
    step = max(1, elements // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def _forward(
    rows: Tensor, table: Tensor, flat: Tensor, mask: Tensor | None, route: str, pull_codes: bool
) -> tuple[Tensor, Tensor]:
    quantized = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    wide = accumulate_dtype(rows.dtype)
    squares = torch.zeros((), dtype=wide, device=rows.device)
    plain_code = _has_direction(table) if route == ROTATION else None
    for part in _parts(rows):
        out = quantized[part]
        torch.index_select(table, 0, flat[part], out=out)
        x = rows[part].to(wide)
        gap = out.to(wide) - x
        if mask is not None:
            squares += gap.masked_fill(~mask[part, None], 0).square().sum()
        else:
            squares += gap.square().sum()
        if route == STRAIGHT_THROUGH:
            out.copy_(gap.add_(x))
        elif plain_code is not None:
            _rotate(out, x, plain_code[flat[part]])
    return quantized, squares


def _has_direction(vectors: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vectors, dim=-1)
    return (length >= LEAST_LENGTH) & length.isfinite()


def _rotate(codes: Tensor, x: Tensor, plain_code: Tensor) -> None:
    """Puts x, rotated to its code and scaled to the code's length, in the code's place.

    That is the code itself, but where a vector has no direction by the library's measure.
    """
    plain = _has_direction(x) & plain_code
    # Asking costs a GPU more than the arithmetic.
    if codes.device.type != "cpu" or not plain.all():
        rotated = library.rotate_to(x, codes.to(x.dtype))
        codes.copy_(torch.where(plain[:, None], codes, rotated.to(codes.dtype)))


class _Assign(Fused):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        rows, table, flat, mask, ctx.route, ctx.pull_codes = inputs
        ctx.save_for_backward(rows, table, flat, mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_squares: Tensor | None) -> tuple:
        # is_grads_batched gives many gradients at once, which nothing can be put into the place of.
        batched = any(g is not None and is_legacy_batchedtensor(g) for g in (grad, grad_squares))
        composed = batched or torch.is_grad_enabled()
        backward = _differentiable_backward if composed else _backward
        return *backward(ctx, grad, grad_squares), None, None, None, None


def _differentiable_backward(
    ctx: Any, grad: Tensor | None, grad_squares: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    rows, table, flat, mask = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(rows)
    if grad_squares is None:
        grad_squares = rows.new_zeros((), dtype=accumulate_dtype(rows.dtype))

    def function(rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return _composed(rows, table, flat, mask, ctx.route, ctx.pull_codes)

    _, pullback, *_ = torch.func.vjp(function, rows, table)
    return pullback((grad, grad_squares))


def _backward(
    ctx: Any, grad: Tensor | None, grad_squares: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    rows, table, flat, mask = ctx.saved_tensors
    pulls_codes = ctx.pull_codes and grad_squares is not None
    codes_take_part = pulls_codes or (ctx.route == PLAIN and grad is not None)
    grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
    grad_codes = torch.empty_like(rows) if ctx.needs_input_grad[1] and codes_take_part else None
    wide = accumulate_dtype(rows.dtype)
    for part in _parts(rows):
        x, codes = rows[part].to(wide), table.index_select(0, flat[part]).to(wide)
        routed = torch.zeros_like(x) if grad is None else grad[part].to(wide)
        pull = torch.zeros((), dtype=wide, device=x.device)
        if grad_squares is not None:
            pull = (x - codes).mul_(2 * grad_squares)
            if mask is not None:
                pull.masked_fill_(~mask[part, None], 0)
        if grad_codes is not None:
            grad_codes[part] = (routed if ctx.route == PLAIN else 0) - (pull if pulls_codes else 0)
        if grad_rows is not None:
            if ctx.route == ROTATION and grad is not None:
                routed = _rotate_back(routed, x, codes)
            grad_rows[part] = pull if ctx.route == PLAIN else routed + pull
    grad_table = None
    if grad_codes is not None:
        _, sums = ops.vq_codebook_stats(grad_codes, flat, len(table))
        grad_table = sums.to(table.dtype)
    return grad_rows, grad_table


def _rotate_back(grad: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """The gradient in x of rotating x to its code, the rotation being a constant.

    With u, q the directions of x and code and w = (u + q) / |u + q|, the rotation is
    I - 2 w w^T + 2 q u^T, and the scale |code| / |x|.
    """
    x_length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=LEAST_LENGTH)
    code_length = torch.linalg.vector_norm(codes, dim=1, keepdim=True)
    u, q = x / x_length, codes / code_length.clamp(min=LEAST_LENGTH)
    along_q = (q * grad).sum(1, keepdim=True)
    w = q.add_(u)
    w_length = torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp(min=LEAST_LENGTH)
    along_w = (w * grad).sum(1, keepdim=True)
    result = torch.addcmul(grad, w, along_w / w_length.square(), value=-2)
    return result.addcmul_(u, along_q, value=2).mul_(code_length / x_length)
