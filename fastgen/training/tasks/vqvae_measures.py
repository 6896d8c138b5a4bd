"""What a VQ-VAE and its prior reach on a split: errors, use of the codebook, likelihood."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgen.data import ImageSplit
from fastgen.losses import DiscretizedLogistic
from fastgen.metrics import bits_per_dim, code_histogram, codebook_perplexity, codebook_usage
from fastgen.models import VQVAE, CodePrior

_EVAL_BATCH = 500
_FITTED_IMAGES = 2000


@torch.no_grad()
def encode_all(model: VQVAE, images: Tensor) -> Tensor:
    """Codes (N, *grid_shape) of all images (N, C, H, W), on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model.encode(part.to(device)).cpu() for part in images.split(_EVAL_BATCH)])


def code_histograms(codes: Tensor, model: VQVAE) -> Tensor:
    """Share of each code among codes (B, *grid_shape), in each codebook: (Q, K)."""
    books = codes.unbind(-1) if len(model.grid_shape) == 3 else (codes,)
    return torch.stack([code_histogram(book, model.num_codes) for book in books])


def codebook_measures(histograms: Tensor) -> dict[str, float]:
    """Usage and perplexity from histograms (Q, K): means over the codebooks, and of each."""
    found = {"usage": codebook_usage, "perplexity": codebook_perplexity}
    values = {name: [measure(h).item() for h in histograms] for name, measure in found.items()}
    measures = {name: sum(each) / len(each) for name, each in values.items()}
    if len(histograms) > 1:
        for name, each in values.items():
            measures |= {f"{name}_{i}": value for i, value in enumerate(each, 1)}
    return measures


@torch.no_grad()
def reconstruction_measures(model: VQVAE, split: ImageSplit, variance: float) -> dict[str, float]:
    """Mean squared error, also relative to the data's variance, and the use of the codebook."""
    device = next(model.parameters()).device
    error, histograms = 0.0, torch.zeros(())
    for images in split.images.split(_EVAL_BATCH):
        codes = model.encode(images.to(device))
        error += (model.decode(codes).cpu() - images).square().sum().item()
        histograms = histograms + code_histograms(codes, model).cpu() * len(images)
    mse = error / split.images.numel()
    return {"mse": mse, "relative_mse": mse / variance} | codebook_measures(histograms)


def prior_measures(prior: CodePrior, autoencoder: VQVAE, split: ImageSplit) -> dict[str, float]:
    """Negative log likelihood of the codes, in nats a code, beside that of uniform codes, log K."""
    codes = encode_all(autoencoder, split.images)
    total = -code_log_probs(prior, codes, split.labels).sum().item()
    return {
        "nats_per_code": total / codes.numel(),
        "uniform_nats_per_code": math.log(prior.num_codes),
    }


@torch.no_grad()
def code_log_probs(prior: CodePrior, codes: Tensor, labels: Tensor | None) -> Tensor:
    """log p(z), or log p(z | label) where the prior is conditional: (N, *grid_shape) -> (N,)."""
    device = prior.position.device
    if prior.num_classes is None:
        labels = None
    parts = []
    for i in range(0, len(codes), _EVAL_BATCH):
        part = slice(i, i + _EVAL_BATCH)
        given = None if labels is None else labels[part].to(device)
        parts.append(prior.log_prob(codes[part].to(device), given).double().cpu())
    return torch.cat(parts)


def fit_pixels(model: VQVAE, images: Tensor, levels: int) -> DiscretizedLogistic | None:
    """What gives the mean of a decoder without likelihood a scale: the discretised logistic of one
    scale a channel under which up to 2,000 of these images (N, C, H, W), evenly spaced, are
    likeliest; None where the images have other values than the levels."""
    pixels = DiscretizedLogistic(images.shape[1], "shared", levels)
    try:
        pixels.check(images)
    except ValueError:
        return None
    count = min(len(images), _FITTED_IMAGES)
    images = images[torch.arange(count) * len(images) // count]
    means = _means(model, encode_all(model, images))
    optimizer = torch.optim.LBFGS(pixels.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -pixels.log_prob(means - 0.5, images).mean() / images[0].numel()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return pixels.requires_grad_(False)


@torch.no_grad()
def likelihood_measures(
    model: VQVAE, prior: CodePrior, split: ImageSplit, pixels: DiscretizedLogistic | None
) -> dict[str, float]:
    """The bound -log p(x) <= -log p(x | z_q) - log p(z_q) of van den Oord et al. 2017, section 3.1.

    Under a conditional prior p(z_q) >= p(z_q | label) / classes, all classes alike: log classes is
    part of the bound. `pixels` takes the place of the likelihood that the model has not.

    Returns:
        the bound in nats an image and in bits a dimension, and the codes' and pixels' parts of it;
        nothing where neither gives a probability to pixels.
    """
    if model.likelihood is None and pixels is None:
        return {}
    codes = encode_all(model, split.images)
    code_nats = -code_log_probs(prior, codes, split.labels).mean().item()
    code_nats += math.log(prior.num_classes or 1)
    pixel_nats = -_pixel_log_probs(model, split.images, codes, pixels).mean().item()
    shape = model.image_shape
    return {
        "nll_bound": code_nats + pixel_nats,
        "bits_per_dim": bits_per_dim(code_nats + pixel_nats, shape),
        "code_bits_per_dim": bits_per_dim(code_nats, shape),
        "pixel_bits_per_dim": bits_per_dim(pixel_nats, shape),
    }


def _pixel_log_probs(
    model: VQVAE, images: Tensor, codes: Tensor, pixels: DiscretizedLogistic | None
) -> Tensor:
    device = next(model.parameters()).device
    parts = []
    for some, coded in zip(images.split(_EVAL_BATCH), codes.split(_EVAL_BATCH), strict=True):
        if pixels is None:
            found = model.log_prob(some.to(device), coded.to(device)).cpu()
        else:
            found = pixels.log_prob(_means(model, coded) - 0.5, some)
        parts.append(found.double())
    return torch.cat(parts)


@torch.no_grad()
def _means(model: VQVAE, codes: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return torch.cat([model.decode(part.to(device)).cpu() for part in codes.split(_EVAL_BATCH)])
