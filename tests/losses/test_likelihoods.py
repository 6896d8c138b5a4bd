import pytest
import torch
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal

from fastgen.losses import LIKELIHOODS, Bernoulli, DiscretizedLogistic, Gaussian


def test_bernoulli_is_that_of_torch():
    logits = 5 * torch.randn(3, 2, 1, 4, 5, dtype=torch.float64)
    images = torch.bernoulli(torch.full((2, 1, 4, 5), 0.5, dtype=torch.float64))
    expected = TorchBernoulli(logits=logits).log_prob(images).sum((-3, -2, -1))
    torch.testing.assert_close(Bernoulli().log_prob(logits, images), expected)
    torch.testing.assert_close(Bernoulli().mean(logits), torch.sigmoid(logits))


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_bernoulli_far_out(logit):
    logits = torch.full((1, 1, 1, 1), logit, requires_grad=True)
    for pixel in (0.0, 1.0):
        value = Bernoulli().log_prob(logits, torch.full((1, 1, 1, 1), pixel))
        assert value == (0 if (logit > 0) == pixel else -1e4)
        (gradient,) = torch.autograd.grad(value, logits)
        assert gradient == pixel - (logit > 0)


@pytest.mark.parametrize("scale", ["shared", "pixel"])
def test_gaussian_is_that_of_torch(scale):
    likelihood = Gaussian(2, scale).double()
    parameters = torch.randn(3, 5, 2 if scale == "shared" else 4, 4, 6, dtype=torch.float64)
    images = torch.rand(5, 2, 4, 6, dtype=torch.float64)
    log_scale = likelihood.log_scale + (parameters[:, :, 2:] if scale == "pixel" else 0)
    normal = Normal(parameters[:, :, :2] + 0.5, log_scale.exp())
    expected = normal.log_prob(images).sum((-3, -2, -1))
    torch.testing.assert_close(likelihood.log_prob(parameters, images), expected)


@pytest.mark.parametrize("log_scale", [-6.5, -3.0, 0.0, 2.0])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_masses_of_all_levels_sum_to_one(levels, log_scale):
    likelihood = DiscretizedLogistic(1, levels=levels).double()
    torch.nn.init.constant_(likelihood.log_scale, log_scale)
    parameters = torch.tensor([-0.7, 0.0, 0.31, 3.0], dtype=torch.float64).view(-1, 1, 1, 1)
    images = torch.linspace(0, 1, levels, dtype=torch.float64).view(-1, 1, 1, 1, 1)
    mass = likelihood.log_prob(parameters, images).exp()
    assert mass.shape == (levels, 4)
    torch.testing.assert_close(mass.sum(0), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("scale", ["shared", "pixel"])
def test_discretized_logistic_is_the_difference_of_the_distribution_function(scale):
    likelihood = DiscretizedLogistic(3, scale)
    per_pixel = 3 if scale == "shared" else 6
    parameters = 0.2 * torch.randn(2, per_pixel, 4, 4, dtype=torch.float64)
    images = torch.randint(0, 256, (2, 3, 4, 4)).double() / 255
    log_scale = likelihood.log_scale.double() + (parameters[:, 3:] if scale == "pixel" else 0)
    distance, half = images - parameters[:, :3] - 0.5, 0.5 / 255
    upper, lower = (torch.sigmoid((distance + sign * half) / log_scale.exp()) for sign in (1, -1))
    upper[images == 1], lower[images == 0] = 1.0, 0.0
    expected = (upper - lower).log().sum((1, 2, 3))
    torch.testing.assert_close(likelihood.log_prob(parameters, images), expected)
    single = likelihood.log_prob(parameters.float(), images.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=0)


def test_discretized_logistic_far_from_the_data_is_finite():
    likelihood = DiscretizedLogistic(1)
    torch.nn.init.constant_(likelihood.log_scale, -20.0)
    parameters = torch.tensor([-1e3, 0.0, 1e3]).view(3, 1, 1, 1).requires_grad_()
    for pixel in (0.0, 128 / 255, 1.0):
        value = likelihood.log_prob(parameters, torch.full((1, 1, 1, 1), pixel))
        (gradient,) = torch.autograd.grad(value.sum(), parameters)
        assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_have_the_mean_and_are_in_the_support(name):
    options = {"levels": 17} if name == "discretized-logistic" else {}
    likelihood = LIKELIHOODS[name](*([1] if name != "bernoulli" else []), **options)
    if name != "bernoulli":
        torch.nn.init.constant_(likelihood.log_scale, -3.0)
    parameters = torch.tensor([-0.2, 0.0, 0.15]).view(3, 1, 1).expand(20_000, 3, 1, 1)
    parameters = parameters.flatten(0, 1).unsqueeze(1)
    draws = likelihood.sample(parameters, torch.Generator().manual_seed(0))
    again = likelihood.sample(parameters, torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    assert draws.unique().numel() > (1 if name == "bernoulli" else 10)
    if name != "gaussian":
        likelihood.check(draws)
    means, expected = (t.view(-1, 3).mean(0) for t in (draws, likelihood.mean(parameters)))
    torch.testing.assert_close(means, expected, atol=0.02, rtol=0)


def test_what_is_shown_of_end_values_is_within_the_range():
    """Black pixels are likeliest with a location far below 0."""
    likelihood = DiscretizedLogistic(1)
    parameters = torch.tensor([-9.0, 0.2, 7.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(likelihood.mean(parameters).flatten(), torch.tensor([0, 0.7, 1.0]))


def test_half_parameters_are_summed_in_float32():
    logits = torch.randn(1, 3, 32, 32).bfloat16()
    images = torch.ones(1, 3, 32, 32)
    value = Bernoulli().log_prob(logits, images)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, Bernoulli().log_prob(logits.float(), images))


@pytest.mark.parametrize(
    ("likelihood", "value", "message"),
    [
        (Bernoulli(), 0.5, "must be 0 or 1 for the Bernoulli likelihood"),
        (Bernoulli(), float("nan"), "must be finite"),
        (Gaussian(1), float("inf"), "must be finite"),
        (Gaussian(1), 1.5, r"must be in \[0, 1\], got \[0, 1.5\]"),
        (DiscretizedLogistic(1), 0.5, "must be multiples of 1/255"),
        (DiscretizedLogistic(1, levels=18), 0.5, "with 18 levels"),
    ],
)
def test_images_without_mass(likelihood, value, message):
    images = torch.zeros(2, 1, 2, 2)
    likelihood.check(images, "test images")
    images[1, 0, 1, 0] = value
    with pytest.raises(ValueError, match=f"test images {message}|{message}"):
        likelihood.check(images, "test images")


def test_levels_that_fit_pass():
    DiscretizedLogistic(1, levels=17).check(torch.arange(17.0).view(-1, 1, 1, 1) / 16)
    DiscretizedLogistic(1).check(torch.arange(256).view(-1, 1, 1, 1).float() / 255)


def test_bad_arguments():
    with pytest.raises(ValueError, match="scale must be one of shared, pixel, got 'image'"):
        Gaussian(1, "image")
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        DiscretizedLogistic(1, levels=1)
