"""vq_quantize: search, straight-through output and loss; backward to x and codebook.

A training step adds the EMA statistics: `fastgen.nn.VectorQuantizer` against the layer of
vector-quantize-pytorch, from the same codes, with the same decay and weight.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, mse_loss

from benchmarks.case import Case, Provider
from fastgen import ops, use_backend
from fastgen.nn import VectorQuantizer


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


def training_step(x: Tensor, layer: VectorQuantizer, backend: str | None = None) -> tuple:
    """Forward of the layer in training; what it returns, and the codes it has moved."""
    if backend is None:
        return *layer(x), layer.codebook
    with use_backend(backend):
        return *layer(x), layer.codebook


def _vector_quantize_pytorch(x: Tensor, layer: VectorQuantizer) -> tuple[Tensor, Any]:
    from vector_quantize_pytorch import VectorQuantize

    other = VectorQuantize(
        layer.dim,
        layer.num_codes,
        decay=layer.decay,
        eps=layer.epsilon,
        commitment_weight=layer.commitment_weight,
        rotation_trick=False,
    )
    other.codebook = layer.codebook.clone()
    other._codebook.embed_avg.copy_(layer.codebook)
    return x, other.train()


def _step_of_other(x: Tensor, layer: Any) -> tuple[Tensor, ...]:
    quantized, indices, loss = layer(x)
    return quantized, indices, loss.reshape(()), layer.codebook


def _training_case(rows: int, codes: int, size: int) -> Case:
    def make(rows: int, codes: int, size: int) -> tuple[Tensor, VectorQuantizer]:
        return torch.randn(rows, size), VectorQuantizer(codes, size, decay=0.99)

    peer = Provider(
        _step_of_other,
        _vector_quantize_pytorch,
        tolerance=1e-5,
        package="vector-quantize-pytorch",
    )
    return Case(
        op="vq_quantize",
        size=f"{rows}x{codes}x{size} training step",
        make=functools.partial(make, rows, codes, size),
        call=training_step,
        grad=(0,),
        # Forward: x in, the output and the indices out; the statistics and the codes are K D.
        bytes=4 * size * (2 * rows + 4 * codes) + 8 * rows,
        flops=2 * rows * codes * size,
        bytes_backward=4 * size * (3 * rows + codes) + 8 * rows,
        flops_backward=4 * rows * size,
        peers={"vector-quantize-pytorch": peer},
        small=functools.partial(make, 64, 16, 8),
        forward=False,
    )


def _case(rows: int, codes: int, size: int) -> Case:
    return Case(
        op="vq_quantize",
        size=f"{rows}x{codes}x{size}",
        make=lambda: (torch.randn(rows, size), torch.randn(codes, size)),
        call=ops.vq_quantize,
        grad=(0, 1),
        bytes=4 * size * (2 * rows + codes) + 8 * rows,
        flops=2 * rows * codes * size,
        # x, the cotangent, the indices and the codes in, both gradients out.
        bytes_backward=4 * size * (3 * rows + 2 * codes) + 8 * rows,
        flops_backward=5 * rows * size,
        peers={"expanded": expanded, "expanded compiled": compiled},
    )


CASES = [
    _case(65536, 1024, 64),
    _training_case(65536, 1024, 64),
    _case(65536, 512, 64),
    _case(16, 512, 64),
]

GPU_CASES = [_training_case(65536, 8192, 64), _case(65536, 8192, 64), _case(65536, 1024, 256)]
