import pytest
import torch

from fastgen.losses import make_likelihood
from fastgen.models import VQVAE


@pytest.mark.parametrize(
    ("shape", "downsamplings", "grid"),
    [
        ((1, 8, 8), 1, (4, 4)),
        ((1, 28, 28), 2, (7, 7)),
        ((3, 32, 32), 2, (8, 8)),
        ((3, 4, 6), 0, (4, 6)),
    ],
)
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_shapes(shape, downsamplings, grid, codebook):
    torch.manual_seed(0)
    model = VQVAE(
        shape, num_codes=9, code_dim=5, channels=4, downsamplings=downsamplings, codebook=codebook
    )
    images = torch.rand(2, *shape)
    output = model(images)
    assert output.reconstruction.shape == images.shape
    assert output.codes.shape == (2, *grid) and output.codes.dtype == torch.int64
    assert output.vq_loss.shape == ()
    model.eval()
    output = model(images)
    codes = model.encode(images)
    assert torch.equal(codes, output.codes)
    torch.testing.assert_close(model.decode(codes), output.reconstruction)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_several_quantizers_come_nearer(codebook):
    torch.manual_seed(0)
    options = {"num_codes": 16, "code_dim": 4, "channels": 8, "kmeans_init": True}
    model = VQVAE((3, 32, 32), quantizers=3, codebook=codebook, **options)
    images = torch.rand(4, 3, 32, 32)
    output = model(images)
    assert model.grid_shape == (8, 8, 3) and output.codes.shape == (4, 8, 8, 3)
    model.eval()
    codes = model.encode(images)
    assert torch.equal(codes, model(images).codes)
    torch.testing.assert_close(model.decode(codes), model(images).reconstruction)
    latents = model.encoder(2 * images - 1)
    errors = [
        (model.quantizer.decode(codes[..., :n]) - latents).square().mean().item() for n in (1, 2, 3)
    ]
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]


@pytest.mark.parametrize(
    ("likelihood", "scale", "channels"),
    [("bernoulli", "pixel", 1), ("gaussian", "shared", 3), ("discretized-logistic", "pixel", 3)],
)
def test_likelihoods(likelihood, scale, channels):
    torch.manual_seed(0)
    shape = (channels, 8, 8)
    options = {"num_codes": 8, "code_dim": 4, "channels": 8, "downsamplings": 1}
    model = VQVAE(shape, likelihood=likelihood, scale=scale, levels=2, **options).eval()
    images = torch.randint(2, (3, *shape)).float()
    output = model(images)
    assert output.reconstruction.shape == images.shape
    torch.testing.assert_close(model.decode(output.codes), output.reconstruction)
    assert output.log_likelihood.shape == (3,)
    torch.testing.assert_close(model.log_prob(images, output.codes), output.log_likelihood)
    likelihoods = [make_likelihood(likelihood, channels, scale=scale, levels=2)]
    parameters = model.decoder(model.quantizer.decode(output.codes))
    torch.testing.assert_close(likelihoods[0].log_prob(parameters, images), output.log_likelihood)
    (-output.log_likelihood.mean()).backward()
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_gradient_passes_straight_through():
    torch.manual_seed(0)
    model = VQVAE((1, 8, 8), num_codes=8, code_dim=4, channels=8, downsamplings=1)
    images = torch.rand(3, 1, 8, 8)
    model(images).reconstruction.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "encoder" in name}
    assert gradients and all(g is not None and g.abs().max() > 0 for g in gradients.values())


def test_encode_leaves_the_codebook():
    torch.manual_seed(0)
    model = VQVAE((1, 8, 8), num_codes=8, code_dim=4, channels=8, downsamplings=1)
    images = torch.rand(3, 1, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.encode(images)
    model.decode(torch.zeros(1, 4, 4, dtype=torch.int64))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model(images)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_interpolation_ends_at_the_reconstructions():
    torch.manual_seed(0)
    model = VQVAE((1, 8, 8), num_codes=32, code_dim=4, channels=8, downsamplings=1).eval()
    first, second = torch.rand(2, 3, 1, 8, 8)
    path = model.interpolate(first, second, 5)
    assert path.shape == (5, 3, 1, 8, 8)
    torch.testing.assert_close(path[0], model(first).reconstruction)
    torch.testing.assert_close(path[-1], model(second).reconstruction)


def test_bad_arguments():
    with pytest.raises(ValueError, match="likelihood must be one of bernoulli, .*, got 'poisson'"):
        VQVAE((1, 8, 8), channels=4, likelihood="poisson")
    with pytest.raises(ValueError, match="scale must be one of shared, pixel, got 'row'"):
        VQVAE((1, 8, 8), channels=4, likelihood="discretized-logistic", scale="row")
    with pytest.raises(ValueError, match="num_quantizers"):
        VQVAE((1, 8, 8), channels=4, quantizers=0)
    with pytest.raises(ValueError, match="commitment_weight"):
        VQVAE((1, 8, 8), channels=4, commitment_weight=-0.25)
    with pytest.raises(ValueError, match="must not be 'mse' for log_prob"):
        model = VQVAE((1, 8, 8), channels=4)
        model.log_prob(torch.rand(1, 1, 8, 8), torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="halve the sides of a 28x28 image evenly, got 3"):
        VQVAE((1, 28, 28), downsamplings=3)
    with pytest.raises(ValueError, match="channels must be at least 2, got 1"):
        VQVAE((1, 8, 8), channels=1)
    with pytest.raises(
        ValueError, match=r"images must be \(B, \*\(1, 8, 8\)\), got \(2, 3, 8, 8\)"
    ):
        VQVAE((1, 8, 8), channels=4)(torch.rand(2, 3, 8, 8))
