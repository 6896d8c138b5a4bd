"""RealNVP: exact densities of vectors and images, both ways, with every option."""

import math
from itertools import pairwise

import pytest
import torch

from fastgen.models import ImageRealNVP, RealNVP
from fastgen.models.flow_layers import FlowBatchNorm

each_coupling = pytest.mark.parametrize("coupling", ("affine", "spline"))
each_mode = pytest.mark.parametrize("reversible", (False, True), ids=("plain", "reversible"))


def vector(dim=2, **options):
    """A flow of vectors whose conditioners do something, in float64."""
    torch.manual_seed(0)
    model = RealNVP(dim, **{"layers": 4, "hidden": 16, "blocks": 1} | options).double()
    return stir(model, torch.randn(64, dim, dtype=torch.float64))


def image(shape=(1, 8, 8), **options):
    torch.manual_seed(0)
    model = ImageRealNVP(shape, **{"levels": 16, "hidden": 8, "blocks": 1} | options).double()
    return stir(model, grey(8, shape))


def grey(count, shape=(1, 8, 8)):
    return torch.randint(16, (count, *shape)).double() / 15


def stir(model, x):
    """Random last layers, and running averages that are not those of the start."""
    for name, parameter in model.named_parameters():
        if ".leave." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    with torch.no_grad():
        model(x)
    return model.eval()


@each_coupling
@pytest.mark.parametrize("dim", (2, 5))
@pytest.mark.parametrize("batch_norm", (False, True))
def test_log_det_is_that_of_the_jacobian_both_ways(coupling, dim, batch_norm):
    model = vector(dim, coupling=coupling, batch_norm=batch_norm)
    model.standardize.fit(3 * torch.randn(100, dim) + 1)
    x = 2 * torch.randn(4, dim, dtype=torch.float64)
    z, log_det = model.encode(x)
    for sample, latent, found in zip(x, z, log_det, strict=True):
        there = torch.func.jacrev(lambda x: model.encode(x[None])[0][0])(sample)
        torch.testing.assert_close(torch.linalg.slogdet(there)[1], found, rtol=0, atol=1e-9)
        back = torch.func.jacrev(lambda z: model.decode(z[None])[0])(latent)
        torch.testing.assert_close(back @ there, torch.eye(dim).double(), rtol=0, atol=1e-7)
        torch.testing.assert_close(torch.linalg.slogdet(back)[1], -found, rtol=0, atol=1e-7)
    torch.testing.assert_close(model.decode(z), x, rtol=0, atol=1e-9)
    energy = 0.5 * z.square().sum(1) + dim / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(model.log_prob(x), log_det - energy)


@each_coupling
def test_density_of_the_plane_integrates_to_one(coupling):
    model = vector(coupling=coupling)
    side = torch.linspace(-20, 20, 600, dtype=torch.float64)
    with torch.no_grad():
        density = model.log_prob(torch.cartesian_prod(side, side)).exp()
    assert density.sum().item() * (40 / 599) ** 2 == pytest.approx(1, abs=1e-3)


@each_coupling
@pytest.mark.parametrize("shape", ((1, 4, 4), (3, 4, 8)))
def test_image_log_det_is_that_of_the_jacobian_both_ways(coupling, shape):
    model = image(shape, coupling=coupling)
    x, noise = grey(2, shape), torch.rand(2, *shape, dtype=torch.float64)
    z, log_det = model.encode(x, noise)
    size = math.prod(shape)
    assert z.shape == (2, size)
    for i in range(2):
        one = x[i : i + 1]
        there = torch.func.jacrev(lambda u, one=one: model.encode(one, u[None])[0][0])(noise[i])
        # encode counts the grey value's mass: as a map of the noise its volume is that
        expected = torch.linalg.slogdet(there.reshape(size, size))[1]
        torch.testing.assert_close(log_det[i], expected, rtol=0, atol=1e-8)

    def to_logits(z):
        """`decode` as far as it is continuous."""
        seen = []
        model.dequantize.inverse = lambda y: seen.append(y) or y
        model.decode(z[None])
        del model.dequantize.inverse
        return seen[0][0]

    y, logit_log_det = model.dequantize(x, noise)
    torch.testing.assert_close(to_logits(z[0]), y[0], rtol=0, atol=1e-8)
    back = torch.func.jacrev(to_logits)(z[0]).reshape(size, size)
    flow_log_det = log_det[0] - logit_log_det[0]
    torch.testing.assert_close(torch.linalg.slogdet(back)[1], -flow_log_det, rtol=0, atol=1e-7)


@each_coupling
@pytest.mark.parametrize(
    ("shape", "scales"), (((1, 8, 8), 1), ((1, 8, 8), 3), ((3, 8, 16), 2), ((1, 28, 28), 2))
)
def test_images_come_back(coupling, shape, scales):
    model = image(shape, coupling=coupling, scales=scales).float()
    x = grey(3, shape).float()
    z, _ = model.encode(x, torch.rand_like(x).clamp(0.05, 0.95))
    assert z.shape == (3, math.prod(shape))
    torch.testing.assert_close(model.decode(z), x)
    assert len(model.latent_shapes) == scales


def test_latents_of_a_scale_are_half_of_what_it_saw():
    model = ImageRealNVP((3, 32, 32), scales=3, hidden=4, blocks=1)
    assert model.latent_shapes == [(6, 16, 16), (12, 8, 8), (12, 8, 8)]


def test_architecture_is_that_of_the_paper():
    """3 checkerboard and 3 channel couplings a scale, 4 checkerboard couplings at the last."""
    from fastgen.nn import AffineCoupling

    model = ImageRealNVP((1, 8, 8), scales=2, hidden=4, blocks=1)
    found = [
        [(m.conditioner.colour, m.swap) for m in chain.layers if isinstance(m, AffineCoupling)]
        for chain in model.scales
    ]
    board = [(0, False), (1, True)]
    channels = [(None, False), (None, True), (None, False)]
    assert found == [[*board, board[0], *channels], board * 2]
    norms = [sum(isinstance(m, FlowBatchNorm) for m in chain.layers) for chain in model.scales]
    assert norms == [6, 4]
    for earlier, later in pairwise(m for c in found for m in c):
        if (earlier[0] is None) == (later[0] is None):
            assert earlier[1] != later[1] or (earlier, later) == (board[0], board[0])


def test_nothing_is_moved_at_the_start():
    """Zero last layers: the flow is the standardisation, so log_prob is known."""
    model = RealNVP(3, layers=3, hidden=8, blocks=1, coupling="spline", permute=False)
    model.standardize.fit(2 * torch.randn(500, 3) + 1)
    x = torch.randn(6, 3)
    mean, std = model.standardize.mean, model.standardize.std
    expected = torch.distributions.Normal(mean, std).log_prob(x).sum(1)
    torch.testing.assert_close(model.log_prob(x), expected, rtol=1e-5, atol=1e-5)


@each_coupling
@pytest.mark.parametrize("make", (vector, image))
def test_reversible_mode_trains_the_same(coupling, make):
    """Loss, gradients and running averages of a step, in training mode."""
    results = []
    for reversible in (False, True):
        model = make(coupling=coupling, batch_norm=True, reversible=reversible).train()
        torch.manual_seed(1)
        x = torch.randn(16, 2).double() if make is vector else grey(4)
        loss = -model(x).mean()
        loss.backward()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}, state))
    (loss, grads, state), (again, rebuilt, after) = results
    torch.testing.assert_close(again, loss)
    assert max(g.abs().max() for g in grads.values()) > 1e-3
    for name, grad in grads.items():
        torch.testing.assert_close(rebuilt[name], grad, rtol=1e-6, atol=1e-8, msg=name)
    for name, value in state.items():
        torch.testing.assert_close(after[name], value, msg=name)


@each_mode
def test_every_parameter_gets_a_gradient(reversible):
    for model, x in (
        (vector(5, reversible=reversible), torch.randn(32, 5).double()),
        (image(reversible=reversible), grey(4)),
    ):
        model.train()(x).mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@each_coupling
def test_samples_follow_generator_and_temperature(coupling):
    for model, shape in ((vector(coupling=coupling), (2,)), (image(coupling=coupling), (1, 8, 8))):
        with torch.no_grad():
            first, again, other = (
                model.sample(5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
            )
            cold = model.sample(5, temperature=1e-6)
        assert first.shape == (5, *shape)
        assert torch.equal(first, again) and not torch.equal(first, other)
        torch.testing.assert_close(cold, cold[:1].expand_as(cold), rtol=0, atol=1e-4)
    drawn = image().sample(3).detach()
    assert ((drawn >= 0) & (drawn <= 1)).all()
    torch.testing.assert_close(drawn * 15, (drawn * 15).round())


def test_samples_have_the_density_of_the_model():
    """The mean of -log p over samples is the integral of -p log p over the plane."""
    model = vector(coupling="spline")
    side = torch.linspace(-9, 9, 400, dtype=torch.float64)
    with torch.no_grad():
        log_p = model.log_prob(torch.cartesian_prod(side, side))
        entropy = -(log_p.exp() * log_p).sum().item() * (18 / 399) ** 2
        drawn = model.sample(20_000, generator=torch.Generator().manual_seed(0))
        found = -model.log_prob(drawn)
    assert found.mean().item() == pytest.approx(entropy, abs=4 * found.std().item() / 141)


def test_interpolation_starts_and_ends_at_its_images():
    model = vector()
    first, second = torch.randn(2, 3, 2, dtype=torch.float64)
    path = model.interpolate(first, second, 5)
    assert path.shape == (5, 3, 2)
    torch.testing.assert_close(path[0], first)
    torch.testing.assert_close(path[-1], second)


def test_bits_per_dim():
    model = image()
    uniform = torch.full((3,), -64 * math.log(16))
    torch.testing.assert_close(model.bits_per_dim(uniform), torch.full((3,), 4.0))


@each_mode
@each_coupling
def test_autocast(coupling, reversible):
    torch.manual_seed(0)
    model = ImageRealNVP((1, 8, 8), levels=16, hidden=8, coupling=coupling, reversible=reversible)
    x, noise = grey(4).float(), torch.rand(4, 1, 8, 8)
    stir(model, x)
    exact = model(x, noise)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, noise)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=1.0)
    found.mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@each_coupling
def test_vectors_compile_whole(coupling):
    torch._dynamo.reset()
    model = vector(4, coupling=coupling)
    x = torch.randn(6, 4, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: RealNVP(1), "dim must be at least 2, got 1"),
        (lambda: RealNVP(2, layers=0), "layers: expected a positive int"),
        (lambda: RealNVP(2, hidden=0), "hidden: expected a positive int"),
        (lambda: RealNVP(2, coupling="cubic"), "coupling: expected one of affine, spline"),
        (lambda: RealNVP(2, coupling="spline", num_bins=0), "num_bins: expected"),
        (lambda: ImageRealNVP((1, 28, 28), scales=3), "sides of a 28x28 image evenly, got 3"),
        (lambda: ImageRealNVP((1, 8, 8), scales=0), "scales: expected a positive int"),
        (lambda: RealNVP(2)(torch.zeros(3, 3)), r"x must be \(B, 2\), got \(3, 3\)"),
        (
            lambda: ImageRealNVP((1, 8, 8), hidden=4)(torch.zeros(2, 3, 8, 8)),
            r"images must be \(B, \*\(1, 8, 8\)\), got \(2, 3, 8, 8\)",
        ),
        (lambda: RealNVP(2).sample(2, temperature=0.0), "temperature: expected a positive"),
        (lambda: RealNVP(2).sample(-1), "num must not be negative, got -1"),
    ),
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
