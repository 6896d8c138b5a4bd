"""vector-quantize-pytorch, patched and as it is: a layer alone, a residual quantizer, and the
convolutional autoencoder of the library's own example."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ, VectorQuantize

from benchmarks.integrations.case import patched_case
from benchmarks.models.case import ModelCase, Training


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


def _training(model: nn.Module, *shape: int) -> Training:
    batch = torch.randn(shape)

    def objective(batch: Tensor) -> Tensor:
        output, loss = model(batch)
        return (output - batch).abs().mean() + loss

    return Training(model, (batch,), objective)


def _vector_quantize(rows: int, codes: int, dim: int) -> Training:
    return _training(_Layer(VectorQuantize(dim, codes), dim), 1, rows, dim)


def _residual_vq(rows: int, codes: int, dim: int, stages: int) -> Training:
    quantizer = ResidualVQ(dim=dim, num_quantizers=stages, codebook_size=codes)
    return _training(_Layer(quantizer, dim), 1, rows, dim)


def _autoencoder(batch: int, codes: int, dim: int) -> Training:
    quantizer = VectorQuantize(dim, codes, accept_image_fmap=True)
    return _training(_Autoencoder(quantizer, dim), batch, 1, 28, 28)


_case = partial(patched_case, "vector_quantize_pytorch", "vector-quantize-pytorch")


def layer(rows: int, codes: int, dim: int) -> ModelCase:
    size = f"VectorQuantize {rows} rows, {codes} codes of {dim}"
    return _case(size, partial(_vector_quantize, rows, codes, dim))


def residual(rows: int, codes: int, dim: int, stages: int) -> ModelCase:
    size = f"ResidualVQ {rows} rows, {stages} stages of {codes} codes of {dim}"
    return _case(size, partial(_residual_vq, rows, codes, dim, stages))


def autoencoder(batch: int, codes: int, dim: int) -> ModelCase:
    size = f"autoencoder 28x28, {codes} codes of {dim}, B={batch}"
    return _case(size, partial(_autoencoder, batch, codes, dim))


CASES = [layer(65536, 1024, 64), residual(8192, 1024, 128, 8), autoencoder(256, 256, 32)]
