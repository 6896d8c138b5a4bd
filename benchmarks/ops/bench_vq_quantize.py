"""vq_quantize: search, straight-through output and loss; backward to x and codebook."""

import functools

import torch
from torch import Tensor
from torch.nn.functional import embedding, mse_loss

from benchmarks.harness import Case
from fastgen import ops


def expanded(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What VQ codebases write: all scores in memory."""
    scores = codebook.detach().square().sum(1) - 2 * (x.detach() @ codebook.detach().T)
    indices = scores.argmin(1)
    e = embedding(indices, codebook)
    loss = mse_loss(e, x.detach()) + 0.25 * mse_loss(x, e.detach())
    return x + (e - x).detach(), indices, loss


@functools.cache
def _compiled():
    return torch.compile(expanded)


def compiled(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _compiled()(x, codebook)


def _case(rows: int, codes: int, size: int) -> Case:
    return Case(
        op="vq_quantize",
        size=f"{rows}x{codes}x{size}",
        make=lambda: (torch.randn(rows, size), torch.randn(codes, size)),
        call=ops.vq_quantize,
        grad=(0, 1),
        bytes=4 * size * (2 * rows + codes) + 8 * rows,
        flops=2 * rows * codes * size,
        peers={"expanded": expanded, "expanded, compiled": compiled},
    )


CASES = [_case(65536, 1024, 64), _case(65536, 512, 64), _case(16, 512, 64)]
