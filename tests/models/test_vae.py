import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import fastgen
from fastgen.models import VAE
from fastgen.random import make_key

SHAPE = (3, 8, 4)
BOUNDS = [{}, {"beta": 0.5}, {"free_bits": 0.3}, {"samples": 4}]


def build(**options):
    options = {"latent_dim": 5, "width": 16} | options
    return VAE(SHAPE, **options)


def binary_images(count=6, shape=SHAPE):
    return torch.bernoulli(torch.full((count, *shape), 0.4))


def wide(model):
    """Encoder outputs of size about one, as a trained model has them."""
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "discretized-logistic"])
@pytest.mark.parametrize("scale", ["shared", "pixel"])
def test_shapes_and_gradients(network, likelihood, scale):
    model = build(network=network, likelihood=likelihood, scale=scale, dropout=0.1, width=128)
    images = binary_images()
    for options, kl in itertools.product(BOUNDS, ("analytic", "mc")):
        model.kl = kl
        model.zero_grad()
        terms = model(images, **options)
        assert [t.shape for t in terms] == [(6,)] * 3
        terms.bound.mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, (name, options)
    mu, logvar = model.encode(images)
    assert mu.shape == logvar.shape == (6, 5)
    assert model.decode(mu).shape == images.shape
    assert model.log_prob(images, 7, max_decoded=13).shape == (6,)
    assert model.sample(3).shape == (3, *SHAPE)


@pytest.mark.parametrize("options", [*BOUNDS, {"kl": "mc"}, {"kl": "mc", "free_bits": 0.3}])
def test_fused_equals_reference(options):
    model = wide(build(kl=options.get("kl", "analytic")))
    options = {name: value for name, value in options.items() if name != "kl"}
    images, key = binary_images(), make_key(3)

    def values():
        terms = model(images, key=key, **options)
        return *terms, *torch.autograd.grad(terms.bound.sum(), list(model.parameters()))

    fused = values()
    with fastgen.use_backend("reference"):
        torch.testing.assert_close(fused, values(), rtol=1e-4, atol=1e-5)


def test_analytic_kl_is_that_of_torch_and_the_estimate_has_it_as_its_mean():
    model = wide(build())
    images = binary_images(2)
    mu, logvar = model.encode(images)
    posterior = Normal(mu, torch.exp(logvar / 2))
    exact = kl_divergence(posterior, Normal(torch.zeros_like(mu), 1.0)).sum(1)
    torch.testing.assert_close(model.elbo(images).kl, exact)
    assert exact.min() > 0.5
    model.kl = "mc"
    repeated = images.repeat_interleave(4000, 0)
    estimates = model.elbo(repeated).kl.view(2, -1)
    error = 5 * estimates.std(1) / math.sqrt(4000)
    assert ((estimates.mean(1) - exact).abs() < error).all() and error.max() < 1


def test_the_estimate_is_the_ratio_of_the_densities():
    model = wide(build(kl="mc"))
    images, key = binary_images(), make_key(1)
    mu, logvar = model.encode(images)
    z, _ = fastgen.ops.reparam_kl(mu, logvar, key=key)
    ratio = Normal(mu, torch.exp(logvar / 2)).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    for free_bits in (0.0, 1e-6):
        terms = model.elbo(images, key=key, free_bits=free_bits)
        torch.testing.assert_close(terms.kl, ratio.sum(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            terms.log_likelihood, model.likelihood.log_prob(model.decoder(z), images)
        )


def exact_model():
    """p(x) is Gaussian and the encoder gives the true posterior: every bound is log p(x)."""
    model = VAE((1, 2, 3), latent_dim=1, layers=0, likelihood="gaussian", kl="mc").double()
    weight = torch.randn(6, 1, dtype=torch.float64)
    variance = math.exp(-3.0)  # of the pixels: log_scale is -1.5
    precision = 1 + weight.square().sum() / variance
    decoder = next(m for m in model.decoder if isinstance(m, nn.Linear))
    encoder = next(m for m in model.encoder if isinstance(m, nn.Linear))
    row = weight[:, 0] / variance / precision
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.zero_()
        # the encoder sees 2 x - 1, the likelihood's mean is 1/2 more than the decoder's output
        encoder.weight.copy_(torch.stack([row / 2, torch.zeros(6)]))
        encoder.bias.copy_(torch.tensor([0.0, -precision.log()]))
    covariance = weight @ weight.T + variance * torch.eye(6)
    marginal = MultivariateNormal(torch.full((6,), 0.5, dtype=torch.float64), covariance)
    images = marginal.sample((50,))
    return model, images.view(50, 1, 2, 3), marginal.log_prob(images)


def test_with_the_true_posterior_every_bound_is_the_likelihood():
    model, images, expected = exact_model()
    torch.testing.assert_close(model.elbo(images).bound, expected)
    torch.testing.assert_close(model.iwae(images, 7).bound, expected)
    torch.testing.assert_close(model.log_prob(images, 30, max_decoded=120), expected)


def test_more_samples_come_closer_to_the_likelihood():
    model, images, expected = exact_model()
    encoder = next(m for m in model.encoder if isinstance(m, nn.Linear))
    with torch.no_grad():
        encoder.bias[0] += 0.1
        encoder.bias[1] += 1.0
    gaps = [(expected - model.elbo(images).bound).mean().item()]
    gaps += [(expected - model.log_prob(images, k)).mean().item() for k in (5, 50, 5000)]
    assert gaps[0] > 0.5 > gaps[1] > 0.05 > abs(gaps[2]) and abs(gaps[3]) < 0.01


@pytest.mark.parametrize("max_decoded", [1, 7, 10_000])
def test_parts_of_the_samples_make_up_the_whole(max_decoded):
    model, images, expected = exact_model()
    encoder = next(m for m in model.encoder if isinstance(m, nn.Linear))
    with torch.no_grad():
        encoder.bias[1] += 0.5
    found = model.log_prob(images[:3], 2000, max_decoded=max_decoded)
    torch.testing.assert_close(found, expected[:3], rtol=0, atol=0.1)


def test_autocast_keeps_the_terms_in_float32():
    model, images, key = wide(build(kl="mc")), binary_images(), make_key(2)
    exact = model(images, key=key)
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(images, key=key)
        weighted = model(images, samples=3, key=key)
    for term, expected in zip(terms, exact, strict=True):
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, expected, rtol=0.03, atol=0.3)
    assert weighted.bound.dtype == torch.float32


def test_log_prob_follows_its_generator():
    model, images = build(), binary_images()
    before = torch.get_rng_state()
    first, again, other = (
        model.log_prob(images, 3, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_beta_weighs_the_kl():
    model, images, key = wide(build()), binary_images(), make_key(5)
    for beta in (0.0, 4.0, torch.tensor(0.25)):
        terms = model(images, beta=beta, key=key)
        torch.testing.assert_close(terms.bound, terms.log_likelihood - beta * terms.kl)


def test_free_bits_are_free():
    model, images, key = wide(build()), binary_images(), make_key(5)
    plain = model.elbo(images, key=key)
    free = model.elbo(images, key=key, free_bits=100.0)
    torch.testing.assert_close(free.log_likelihood, plain.log_likelihood)
    torch.testing.assert_close(free.kl, plain.kl)
    torch.testing.assert_close(free.bound, plain.log_likelihood - 5 * 100)
    little = model.elbo(images, key=key, free_bits=1e-9)
    torch.testing.assert_close(little.bound.mean(), plain.bound.mean())
    mu, logvar = model.encode(images)
    per_latent = kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(0.0, 1.0)).mean(0)
    floor = per_latent.median().item()
    some = model.elbo(images, key=key, free_bits=floor)
    torch.testing.assert_close(
        (some.log_likelihood - some.bound).mean(), per_latent.clamp(min=floor).sum()
    )


def test_interpolations_and_traversals():
    model = build().eval()
    first, second = binary_images().split(3)
    path = model.interpolate(first, second, 5)
    assert path.shape == (5, 3, *SHAPE)
    for images, end in ((first, path[0]), (second, path[-1])):
        torch.testing.assert_close(end, model.decode(model.encode(images)[0]))
    moved = model.traverse(first[0], torch.tensor([4, 1]), 3, span=2.0)
    assert moved.shape == (2, 3, *SHAPE)
    z = model.encode(first[:1])[0].detach().clone()
    z[0, 1] = -2.0
    torch.testing.assert_close(moved[1, 0], model.decode(z)[0])


def test_temperature_narrows_the_samples():
    model = build()
    spread = [
        model.sample(50, temperature=t, generator=torch.Generator().manual_seed(0)).var(0).mean()
        for t in (0.1, 1.0)
    ]
    assert 0 < spread[0] < 0.1 * spread[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "poisson"}, "likelihood must be one of bernoulli, gaussian, discr.* got"),
        ({"network": "transformer"}, "network must be one of mlp, conv, got 'transformer'"),
        ({"kl": "none"}, "kl must be one of analytic, mc, got 'none'"),
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"network": "conv", "layers": 3}, "layers must halve the sides of a 8x4 image evenly"),
        ({"network": "conv", "width": 15}, "width must be at least 16, got 15"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_other_images_are_refused():
    with pytest.raises(
        ValueError, match=r"images must be \(B, \*\(3, 8, 4\)\), got \(2, 1, 8, 4\)"
    ):
        build()(torch.zeros(2, 1, 8, 4))
