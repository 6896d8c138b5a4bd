"""vector-quantize-pytorch, patched and as it is: a layer alone, a residual quantizer, and the
convolutional autoencoder of the library's own example."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import fastgen
from benchmarks.models.case import ModelCase, Peer, Training


class _Autoencoder(nn.Module):
    """Grey images of 28x28 to 7x7 codes and back."""

    def __init__(self, quantizer: nn.Module, dim: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.MaxPool2d(2),
            nn.GELU(),
            nn.Conv2d(16, dim, 3, padding=1),
            nn.MaxPool2d(2),
        )
        self.quantizer = quantizer
        self.decoder = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(dim, 16, 3, padding=1),
            nn.GELU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(16, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = self.quantizer(self.encoder(images))
        return self.decoder(quantized).clamp(-1, 1), loss


class _Layer(nn.Module):
    """A quantizer alone, behind one trained scale a dimension so that its input has a gradient."""

    def __init__(self, quantizer: nn.Module, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = self.quantizer(x * self.scale)
        return quantized, loss.sum()


def _training(model: nn.Module, batch: Tensor) -> Training:
    def objective(batch: Tensor) -> Tensor:
        output, loss = model(batch)
        return (output - batch).abs().mean() + loss

    return Training(model, (batch,), objective)


def _make(model: Callable[[], nn.Module], shape: tuple[int, ...]) -> Training:
    patched = model()
    fastgen.patch(patched)
    return _training(patched, torch.randn(shape))


def _unpatched(ours: Training) -> Training:
    model = copy.deepcopy(ours.model)
    fastgen.unpatch(model)
    return _training(model, *ours.batch)


def _case(size: str, model: Callable[[], nn.Module], shape: tuple[int, ...]) -> ModelCase:
    package = "vector-quantize-pytorch"
    return ModelCase(
        op="vector_quantize_pytorch",
        size=size,
        make=partial(_make, model, shape),
        peers={"before": Peer(_unpatched, package, tolerance=1e-4)},
        compiled=False,
    )


def _vector_quantize(codes: int, dim: int) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize

    return _Layer(VectorQuantize(dim, codes), dim)


def _residual(codes: int, dim: int, stages: int) -> nn.Module:
    from vector_quantize_pytorch import ResidualVQ

    return _Layer(ResidualVQ(dim=dim, num_quantizers=stages, codebook_size=codes), dim)


def _autoencoder(codes: int, dim: int) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(dim, codes, accept_image_fmap=True)
    return _Autoencoder(quantizer, dim)


def layer(rows: int, codes: int, dim: int) -> ModelCase:
    size = f"VectorQuantize {rows} rows, {codes} codes of {dim}"
    return _case(size, partial(_vector_quantize, codes, dim), (1, rows, dim))


def residual(rows: int, codes: int, dim: int, stages: int) -> ModelCase:
    size = f"ResidualVQ {rows} rows, {stages} stages of {codes} codes of {dim}"
    return _case(size, partial(_residual, codes, dim, stages), (1, rows, dim))


def autoencoder(batch: int, codes: int, dim: int) -> ModelCase:
    size = f"autoencoder 28x28, {codes} codes of {dim}, B={batch}"
    return _case(size, partial(_autoencoder, codes, dim), (batch, 1, 28, 28))


CASES = [layer(65536, 1024, 64), residual(8192, 1024, 128, 8), autoencoder(256, 256, 32)]
