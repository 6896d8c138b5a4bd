"""VQ-VAE: the autoencoder's training step, with the quantizer of vector-quantize-pytorch in the
same model as the peer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.models.case import ModelCase, Peer, Training
from fastgen.models import VQVAE

SHAPE = (3, 32, 32)


def _training(model: nn.Module, images: Tensor) -> Training:
    def objective(images: Tensor) -> Tensor:
        output = model(images)
        return (output.reconstruction - images).square().mean() / 0.08 + output.vq_loss

    return Training(model, (images,), objective)


def _make(batch: int, codes: int, downsamplings: int) -> Training:
    model = VQVAE(
        SHAPE,
        num_codes=codes,
        code_dim=64,
        channels=64,
        downsamplings=downsamplings,
        codebook="ema",
        kmeans_init=False,
        revive_after=None,
    )
    return _training(model, torch.rand(batch, *SHAPE))


class _Quantizer(nn.Module):
    """vector-quantize-pytorch's layer with our codes and decay, called as ours."""

    def __init__(self, ours: nn.Module) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__()
        self.layer = VectorQuantize(
            ours.dim,
            ours.num_codes,
            decay=ours.decay,
            eps=ours.epsilon,
            commitment_weight=ours.commitment_weight,
            rotation_trick=False,
            accept_image_fmap=True,
        )
        self.layer.codebook = ours.codebook.clone()
        self.layer._codebook.embed_avg.copy_(ours.codebook)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.layer(x)
        return quantized, indices, loss.reshape(())


def _with_their_quantizer(ours: Training) -> Training:
    model = ours.model
    assert isinstance(model, VQVAE)
    model.quantizer = _Quantizer(model.quantizer)  # type: ignore[assignment]
    return _training(model, *ours.batch)


def _case(batch: int, codes: int, downsamplings: int) -> ModelCase:
    side = SHAPE[1] >> downsamplings
    return ModelCase(
        op="vqvae",
        size=f"3x32x32, {side}x{side} codes of {codes}, B={batch}",
        make=partial(_make, batch, codes, downsamplings),
        peers={
            "vector-quantize-pytorch": Peer(
                _with_their_quantizer, "vector-quantize-pytorch", tolerance=1e-3
            )
        },
    )


CASES = [_case(32, 1024, 2), _case(32, 8192, 2), _case(32, 1024, 1)]
