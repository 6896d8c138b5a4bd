import math

import pytest
import torch
from torch.nn import functional as F

import fastgen
from fastgen.losses import gradient_penalty, nonsaturating_discriminator_loss, r1_penalty
from fastgen.models import StyleGANDiscriminator, StyleGANGenerator
from fastgen.models.stylegan import channels_at, fade_images, level_of, to_unit
from fastgen.models.stylegan_layers import (
    Blur,
    EqualConv2d,
    EqualLinear,
    MinibatchStd,
    StyledLayer,
)
from fastgen.random import make_key

WIDTHS = {"channel_base": 64, "channel_max": 12}


def generator(resolution=16, channels=3, **options):
    options = {"latent_dim": 8, "mapping_layers": 3} | WIDTHS | options
    return StyleGANGenerator(resolution, channels, **options)


def discriminator(resolution=16, channels=3, **options):
    return StyleGANDiscriminator(resolution, channels, **WIDTHS, **options)


def trained(model):
    """No parameter is zero, so that nothing is left out of a comparison."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# --- layers


@pytest.mark.parametrize("resample", ["up", "down"])
@pytest.mark.parametrize("side", [1, 4, 6])
def test_resampling_convolutions_are_the_two_steps(resample, side):
    conv = EqualConv2d(3, 5, 3, resample=resample).double()
    side = 2 * side if resample == "down" else side
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    weight = conv.weight * conv.scale
    if resample == "up":
        expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)
    else:
        expected = F.avg_pool2d(F.conv2d(x, weight, padding=1), 2)
    torch.testing.assert_close(conv(x), expected)


def test_blur_is_binomial():
    x = torch.zeros(1, 2, 5, 5)
    x[0, 0, 2, 2], x[0, 1, 0, 0] = 16, 16
    blurred = Blur()(x)
    window = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert torch.equal(blurred[0, 0, 1:4, 1:4], window)
    assert torch.equal(blurred[0, 1, :2, :2], window[1:, 1:])  # zeros outside
    assert blurred[0, 0].sum() == 16


@pytest.mark.parametrize("lr_multiplier", [1.0, 0.01])
def test_equal_layers_keep_the_variance_and_learn_at_one_speed(lr_multiplier):
    layer = EqualLinear(400, 300, lr_multiplier=lr_multiplier)
    x = torch.randn(200, 400)
    y = layer(x)
    assert y.std().item() == pytest.approx(1, abs=0.02)
    assert layer.weight.std().item() == pytest.approx(1 / lr_multiplier, rel=0.02)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, betas=(0.0, 0.99))
    before = layer.weight.detach().clone()
    y.square().sum().backward()
    optimizer.step()
    moved = (layer.weight - before) * layer.weight_scale
    expected = 1e-3 * lr_multiplier / math.sqrt(400)
    assert moved.abs().median().item() == pytest.approx(expected, rel=0.05)
    wide = EqualConv2d(64, 64, 3, gain=1.0)
    images = torch.randn(4, 64, 12, 12)
    assert wide(images)[..., 1:-1, 1:-1].std().item() == pytest.approx(1, abs=0.05)


def test_the_bias_of_a_slow_layer_starts_where_it_should():
    layer = EqualLinear(3, 2, lr_multiplier=0.1, bias=1.5)
    torch.testing.assert_close(layer(torch.zeros(1, 3)), torch.full((1, 2), 1.5))


@pytest.mark.parametrize(("count", "group"), [(8, 4), (4, 4), (3, 4), (6, 2), (5, 1)])
def test_minibatch_std_by_hand(count, group):
    x = torch.randn(count, 3, 4, 2)
    found = MinibatchStd(group)(x)
    assert found.shape == (count, 4, 4, 2) and torch.equal(found[:, :3], x)
    for i in range(count):
        members = x[[j for j in range(count) if j // group == i // group]]
        expected = (members.var(0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(found[i, 3], expected.expand(4, 2))


def test_minibatch_std_of_equal_images_has_a_gradient():
    x = torch.ones(4, 2, 3, 3, requires_grad=True)
    (first,) = torch.autograd.grad(MinibatchStd(4)(x)[:, 2].sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert first.isfinite().all() and second.isfinite().all()
    with pytest.raises(ValueError, match="a multiple of the group size 4, got 6"):
        MinibatchStd(4)(torch.zeros(6, 2, 3, 3))


def test_a_styled_layer_by_hand():
    layer = trained(StyledLayer(3, 5))
    x, w, key = torch.randn(2, 3, 4, 4), torch.randn(2, 5), make_key(3)
    noise = fastgen.ops.normal(key, (2, 1, 4, 4))
    h = x + noise * layer.noise_strength.view(1, 3, 1, 1) + layer.bias.view(1, 3, 1, 1)
    h = F.leaky_relu(h, 0.2)
    scale, shift = (t[:, :, None, None] for t in layer.style(w).chunk(2, 1))
    expected = F.instance_norm(h, eps=1e-8) * (1 + scale) + shift
    torch.testing.assert_close(layer(x, w, noise), expected, rtol=1e-4, atol=1e-4)
    silent = layer(x, w, None)
    layer.noise_strength.data.zero_()
    torch.testing.assert_close(layer(x, w, noise), silent)


# --- networks


def test_shapes_and_gradients_at_each_level():
    g, d = generator(), discriminator()
    for level in range(3):
        g.zero_grad(), d.zero_grad()
        alpha = torch.tensor(0.5)
        images = g(torch.randn(4, 8), level=level, alpha=alpha)
        assert images.shape == (4, 3, 4 << level, 4 << level)
        scores = d(images, alpha=alpha)
        assert scores.shape == (4,)
        scores.sum().backward()
        for model in (g, d):
            used = {id(p) for p in model.parameters_at(level)}
            for name, parameter in model.named_parameters():
                assert (parameter.grad is not None) == (id(parameter) in used), (name, level)
        unfaded = {id(p) for p in g.parameters_at(level, fading=False)}
        g.zero_grad()
        g(torch.randn(4, 8), level=level, alpha=1.0).sum().backward()
        assert unfaded == {id(p) for p in g.parameters() if p.grad is not None}


def test_fade_in_begins_with_the_old_level_and_ends_with_the_new_one():
    g, d, key = trained(generator()).eval(), trained(discriminator()), make_key(5)
    z = torch.randn(4, 8)
    for level in (1, 2):

        def at(level, alpha):
            return g(z, level=level, alpha=alpha, key=key)  # noqa: B023

        old, new = at(level - 1, 1.0), at(level, 1.0)
        enlarged = old.repeat_interleave(2, 2).repeat_interleave(2, 3)
        for start, end, half in ((0.0, 1.0, 0.5), map(torch.tensor, (0.0, 1.0, 0.5))):
            torch.testing.assert_close(at(level, start), enlarged)
            torch.testing.assert_close(at(level, end), new)
            torch.testing.assert_close(at(level, half), (enlarged + new) / 2)
            torch.testing.assert_close(d(new, alpha=start), d(F.avg_pool2d(new, 2)))
            torch.testing.assert_close(d(new, alpha=end), d(new))
            between = d(new, alpha=half)
            assert not torch.allclose(between, d(new)) and not torch.allclose(
                between, d(new, alpha=start)
            )
    torch.testing.assert_close(fade_images(enlarged, 0.0), enlarged)
    assert fade_images(new, 1.0) is new
    torch.testing.assert_close(fade_images(new, torch.tensor(1.0)), new)


def test_mixing_takes_the_finer_layers_from_the_other():
    g, key = trained(generator()).eval(), make_key(1)
    z, other = torch.randn(2, 3, 8)
    crossover = torch.tensor([0, 2, 6])
    mixed = g(z, other=other, crossover=crossover, key=key)
    torch.testing.assert_close(mixed[2], g(z, key=key)[2])
    torch.testing.assert_close(mixed[0], g(other, key=key)[0])
    w, w_other = g.mapping(z), g.mapping(other)
    ws = torch.stack([w[1]] * 2 + [w_other[1]] * 4)
    alone = g.synthesize(ws.expand(3, 6, 8), key=key)[1]
    torch.testing.assert_close(mixed[1], alone)


def test_truncation():
    g, key = trained(generator()).eval(), make_key(1)
    g.w_mean.copy_(torch.randn(8))
    z = torch.randn(3, 8)
    ws = g.mapping(z)[:, None].expand(-1, 6, -1)
    half = g.truncate(ws, 0.5)
    torch.testing.assert_close(half, (ws + g.w_mean) / 2)
    some = g.truncate(ws, 0.5, layers=2)
    assert torch.equal(some[:, :2], half[:, :2]) and torch.equal(some[:, 2:], ws[:, 2:])
    torch.testing.assert_close(g(z, psi=0.5, key=key), g.synthesize(half, key=key))
    mean_alone = g(z, psi=0.0, noise=False)
    torch.testing.assert_close(mean_alone[0], mean_alone[2])


def follow(g, z, batches):
    for _ in range(batches):
        g._follow(g.mapping(z[torch.randint(len(z), (64,))]))


def test_a_few_batches_are_enough_for_the_mean_of_w():
    """A slow average that starts from zeros would have come a tenth of the way."""
    g = trained(generator())
    z = torch.randn(5000, 8)
    follow(g, z, 20)
    torch.testing.assert_close(g.w_mean, g.mapping(z).mean(0), rtol=0.1, atol=0.1)
    assert g.w_count == 20


def test_the_mean_of_w_follows_in_training_alone():
    g = trained(generator())
    z = torch.randn(5000, 8)
    g.eval()(z[:4])
    assert torch.equal(g.w_mean, torch.zeros(8))
    g.train()
    w = g.mapping(z).mean(0)
    follow(g, z, 600)
    torch.testing.assert_close(g.w_mean, w, rtol=0.05, atol=0.02)
    before = g.w_mean.clone()
    g(z[:2])
    assert not torch.equal(before, g.w_mean)


def test_samples_follow_their_generator_and_the_growth():
    g = trained(generator()).eval()

    def draw(seed, **options):
        return g.sample(2, generator=torch.Generator().manual_seed(seed), **options)

    before = torch.get_rng_state()
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert not torch.equal(draw(0), draw(0, psi=0.5))
    assert torch.equal(before, torch.get_rng_state())
    assert draw(0).shape == (2, 3, 16, 16)
    assert draw(0).min() >= 0 and draw(0).max() <= 1
    g.grow(1, 0.25)
    again = generator()
    again.load_state_dict(g.state_dict())
    small = again.eval().sample(2, generator=torch.Generator().manual_seed(0))
    assert small.shape == (2, 3, 8, 8) and torch.equal(small, draw(0))
    torch.testing.assert_close(to_unit(torch.tensor([-1.0, 0, 1, 9])), torch.tensor([0, 0.5, 1, 1]))


def test_style_mixing_table():
    g = trained(generator()).eval()
    z, others = torch.randn(2, 8), torch.randn(3, 8)
    table = g.style_mixing(z, others, 2)
    assert table.shape == (3, 2, 3, 16, 16)
    at = torch.tensor([2])
    one = g(z[1:], other=others[2:], crossover=at, noise=False)
    torch.testing.assert_close(table[2, 1], to_unit(one.detach())[0])


# --- the second order of the fused ops


def small_synthesis():
    g = trained(generator(8, 1, latent_dim=3, channel_base=16, channel_max=3)).double().eval()

    def images(ws):
        return g.synthesize(ws, key=make_key(2), level=1, alpha=0.7)

    return images, torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)


def test_synthesis_has_two_derivatives():
    images, ws = small_synthesis()
    assert torch.autograd.gradcheck(images, (ws,))
    assert torch.autograd.gradgradcheck(images, (ws,))


def path_length_penalty(images, ws, direction):
    """The spread of |J^T y| over the batch, to be differentiated by weights (Karras et al. 2020,
    eq. 4)."""
    (gradient,) = torch.autograd.grad((images * direction).sum(), ws, create_graph=True)
    lengths = gradient.square().sum((1, 2)).sqrt()
    return (lengths - lengths.mean().detach()).square().mean()


def test_path_length_penalty_through_the_fused_ops():
    g = trained(generator())
    ws, direction, key = torch.randn(4, 6, 8, requires_grad=True), torch.randn(4, 3, 16, 16), 7

    def gradients():
        images = g.synthesize(ws, key=make_key(key))
        penalty = path_length_penalty(images, ws, direction)
        wanted = [p for n, p in g.named_parameters() if "styled" in n or "conv" in n]
        return penalty, torch.autograd.grad(penalty, wanted, allow_unused=True)

    fastgen.backends.reset_calls()
    penalty, fused = gradients()
    assert ("adain", "cpu") in fastgen.backends.calls()
    with fastgen.use_backend("reference"):
        expected, reference = gradients()
    torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=1e-6)
    assert any(f is not None and f.abs().max() > 0 for f in fused)
    for one, other in zip(fused, reference, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4 * other.abs().max().item())


@pytest.mark.parametrize("kind", ["r1", "gp"])
def test_penalties_of_the_networks_equal_those_on_references(kind):
    """The gradient's own gradient, by the discriminator and, through fakes, by the generator."""
    g, d = trained(generator()), trained(discriminator())
    z, real, mix = torch.randn(4, 8), torch.randn(4, 3, 16, 16), torch.rand(4)

    def values():
        fake = g(z, key=make_key(4))
        if kind == "r1":
            # at fakes, whose gradient by z goes through the ops of both networks
            latents = z.clone().requires_grad_()
            penalty = r1_penalty(d(g(latents, key=make_key(4))), latents)
            penalty = penalty + r1_penalty(d(x := real.clone().requires_grad_()), x)
        else:
            penalty = gradient_penalty(d, real, fake, mix)
        loss = nonsaturating_discriminator_loss(d(real), d(fake)) + penalty
        wanted = [*d.parameters_at(2, fading=False), *g.mapping.parameters()]
        return penalty, torch.autograd.grad(loss, wanted)

    penalty, fused = values()
    with fastgen.use_backend("reference"):
        expected, reference = values()
    assert penalty > 1e-3
    torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=0)
    for one, other in zip(fused, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4 * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype):
    g, d, key = generator().eval(), discriminator(), make_key(1)
    z = torch.randn(4, 8)
    exact = g(z, key=key)
    with torch.autocast("cpu", dtype):
        images = g(z, key=key)
        images.retain_grad()
        scores = d(images)
    assert (images - exact).abs().mean() < 0.05 * exact.abs().mean()
    r1_penalty(scores, images).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in g.parameters())


# --- errors


@pytest.mark.parametrize("resolution", [0, 2, 12, 100])
def test_sides_are_powers_of_two(resolution):
    for build in (generator, discriminator, lambda r: level_of(r)):
        with pytest.raises(ValueError, match=f"a power of two, at least 4, got {resolution}"):
            build(resolution)


def test_levels_and_channels():
    assert [level_of(s) for s in (4, 8, 1024)] == [0, 1, 8]
    assert [channels_at(i, 512, 64) for i in range(5)] == [64, 64, 32, 16, 8]
    assert channels_at(9, 512, 64) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, d: g(torch.zeros(2, 7)), r"z: expected shape \(2, 8\).* got \(2, 7\)"),
        (lambda g, d: g.synthesize(torch.zeros(2, 5, 8)), r"ws: expected shape \(2, 6, 8\)"),
        (lambda g, d: g(torch.zeros(2, 8), level=3), r"level: expected a number in \[0, 2\]"),
        (lambda g, d: g.grow(1, 1.5), r"alpha: expected a number in \[0, 1\], got 1.5"),
        (lambda g, d: g.sample(2, psi=-1), "psi: expected a finite number >= 0, got -1"),
        (lambda g, d: d(torch.zeros(2, 3, 32, 32)), "level of the images.*got 3"),
        (lambda g, d: d(torch.zeros(2, 1, 16, 16)), r"images: expected shape \(2, 3, 16, 16\)"),
        (lambda g, d: d(torch.zeros(2, 3, 8, 16)), r"images: expected shape \(2, 3, 16, 16\)"),
        (lambda g, d: EqualLinear(2, 2, lr_multiplier=0), "lr_multiplier: expected a positive"),
        (lambda g, d: discriminator(group_size=0), "group_size: expected a positive int, got 0"),
        (lambda g, d: generator(latent_dim=0), "in_features: expected a positive int, got 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(generator(), discriminator())
