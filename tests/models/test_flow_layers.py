"""Layers of flows: what goes where, statistics, log-determinants, reversal in backward."""

import math

import pytest
import torch

from fastgen.models.flow_layers import (
    Checkerboard,
    FlowBatchNorm,
    LogitDequantize,
    Permutation,
    ResidualConvNet,
    ResidualMLP,
    Squeeze,
    Standardize,
    Undo,
)
from fastgen.nn import InvertibleChain

REARRANGEMENTS = {
    "permutation": (Permutation(torch.tensor([2, 0, 3, 1])), (3, 4)),
    "squeeze": (Squeeze(), (2, 3, 4, 6)),
    "checkerboard": (Checkerboard(), (2, 3, 4, 6)),
    "undo": (Undo(Checkerboard()), (2, 6, 4, 3)),
}


@pytest.mark.parametrize(("layer", "shape"), REARRANGEMENTS.values(), ids=list(REARRANGEMENTS))
def test_rearrangements(layer, shape):
    """The elements of each sample in other places, and back; log_det is 0."""
    x = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    y, log_det = layer(x)
    assert torch.equal(layer.restore(y), x) and torch.equal(layer.inverse(y)[0], x)
    assert not torch.equal(y.flatten(), x.flatten())
    for before, after in zip(x, y, strict=True):
        assert torch.equal(before.flatten().sort()[0], after.flatten().sort()[0])
    assert torch.equal(log_det, torch.zeros(len(x)))
    gradients = []
    for reversible in (False, True):
        leaf = x.clone().requires_grad_()
        out, _ = InvertibleChain([layer], reversible=reversible)(leaf)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_squeeze_keeps_the_channels_of_a_pixel_together():
    x = torch.arange(48.0).view(1, 3, 4, 4)
    y = Squeeze().rearrange(x)
    assert y.shape == (1, 12, 2, 2)
    assert y[0, :3, 1, 0].tolist() == x[0, :, 2, 0].tolist()
    assert y[0, 3:6, 1, 0].tolist() == x[0, :, 2, 1].tolist()
    assert y[0, 9:, 0, 1].tolist() == x[0, :, 1, 3].tolist()


def test_checkerboard_halves_are_the_colours():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    colour = (rows + columns) % 2
    first, second = Checkerboard().rearrange(torch.stack([colour, rows])[None]).chunk(2, 1)
    assert (first[0, 0] == 0).all() and (second[0, 0] == 1).all()
    for half in (first, second):
        assert torch.equal(half[0, 1], torch.arange(4.0)[:, None].expand(4, 3))


@pytest.mark.parametrize("colour", (0, 1))
def test_checkerboard_conditioner_sees_one_colour_and_answers_for_the_other(colour):
    """An output depends on the pixels of the other colour within reach of its filters."""
    torch.manual_seed(0)
    net = ResidualConvNet(1, 1, 8, 0, colour=colour)
    net.leave.weight.data.normal_()
    board = Checkerboard()
    image = torch.randn(1, 1, 4, 6)

    def answers(image):
        return net(board.rearrange(image).chunk(2, 1)[colour])

    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    for i in range(4):
        for j in range(6):
            moved = image.clone()
            moved[0, 0, i, j] += 1
            halves = [torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4, 3)]
            halves[1 - colour] = (answers(moved) != answers(image)).float()
            changed = board.restore(torch.cat(halves, 1))[0, 0].bool()
            near = ((rows - i).abs() <= 1) & ((columns - j).abs() <= 1)
            other = (rows + columns) % 2 != colour
            seen = near & other if (i + j) % 2 == colour else torch.zeros(4, 6, dtype=torch.bool)
            assert torch.equal(changed, seen)


@pytest.mark.parametrize("shape", ((16, 3), (16, 3, 4, 5)))
def test_batch_norm_statistics_and_log_det(shape):
    torch.manual_seed(0)
    layer = FlowBatchNorm(3, momentum=0.75).double()
    batches = [2 * torch.randn(shape, dtype=torch.float64) + k for k in range(3)]
    axes = [0, *range(2, len(shape))]
    view = (1, 3, *(1,) * (len(shape) - 2))
    mean, var = None, None
    for x in batches:
        m, v = x.mean(axes), x.var(axes, correction=0)
        mean = m if mean is None else 0.75 * mean + 0.25 * m
        var = v if var is None else 0.75 * var + 0.25 * v
        y, log_det = layer(x)
        torch.testing.assert_close(y, (x - mean.view(view)) / (var.view(view) + 1e-5).sqrt())
        each = -0.5 * (var + 1e-5).log().sum() * math.prod(shape[2:])
        torch.testing.assert_close(log_det, each.expand(16))
    torch.testing.assert_close(layer.mean, mean)
    torch.testing.assert_close(layer.var, var)
    layer.eval()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    y, log_det = layer(batches[0])
    back, undone = layer.inverse(y)
    torch.testing.assert_close(back, batches[0])
    torch.testing.assert_close(undone, -log_det)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_batch_norm_in_eval_mode_has_the_log_det_of_its_jacobian():
    layer = FlowBatchNorm(2).double()
    layer(torch.randn(32, 2, 2, 2, dtype=torch.float64))
    layer.eval()
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: layer(x)[0])(x).reshape(8, 8)
    torch.testing.assert_close(layer(x)[1][0], torch.linalg.slogdet(jacobian)[1])


@pytest.mark.parametrize("steps", (1, 3))
def test_batch_norm_in_a_reversible_chain(steps):
    """The same gradients, through the batch's statistics too, and the same running averages."""
    results = []
    for reversible in (False, True):
        torch.manual_seed(0)
        layers = [FlowBatchNorm(3), FlowBatchNorm(3, momentum=0.5)]
        chain = InvertibleChain(layers, reversible=reversible).double()
        for _ in range(steps):
            x = (3 * torch.randn(8, 3, 2, 2, dtype=torch.float64) + 1).requires_grad_()
            y, log_det = chain(x)
            ((y.square() * torch.arange(3.0).view(3, 1, 1)).sum() - log_det.sum()).backward()
        results.append([y, log_det, x.grad, *chain.state_dict().values()])
    for plain, reversible in zip(*results, strict=True):
        torch.testing.assert_close(reversible, plain)
    assert results[0][2].abs().max() > 0.1


def test_standardize():
    points = torch.randn(1000, 2) * torch.tensor([3.0, 0.1]) + torch.tensor([5.0, -2.0])
    layer = Standardize(2)
    layer.fit(points)
    y, log_det = layer(points)
    torch.testing.assert_close(y.mean(0), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(log_det, -points.std(0, correction=0).log().sum().expand(1000))
    torch.testing.assert_close(layer.inverse(y)[0], points)
    for bad in (torch.ones(5, 2), torch.tensor([[0.0, 1], [float("nan"), 2]])):
        with pytest.raises(ValueError, match="finite values that vary in every dimension"):
            layer.fit(bad)


@pytest.mark.parametrize("levels", (2, 17, 256))
def test_dequantized_grey_values_come_back(levels):
    grey = torch.arange(levels).repeat(3).view(3, 1, 1, levels)
    images = grey / (levels - 1)
    layer = LogitDequantize(levels)
    for noise in (torch.rand(images.shape), torch.zeros_like(images), images * 0 + 0.999):
        inner = noise.clamp(1e-3)
        y, _ = layer(images, inner)
        torch.testing.assert_close(layer.inverse(y), images)
        assert y.isfinite().all()


def test_dequantisation_is_a_density():
    """Its log_det: a density over y, times the slope, summed over u, is the grey value's mass."""
    layer = LogitDequantize(4, alpha=0.1)
    noise = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    total = 0.0
    for grey in range(4):
        images = torch.full((2000, 1, 1, 1), grey / 3, dtype=torch.float64)
        y, log_det = layer(images, noise.view(-1, 1, 1, 1))
        log_p = -y.flatten().square() / 2 - math.log(2 * math.pi) / 2
        total += (log_p + log_det).exp().mean().item()
    edge = math.log(0.9 / 0.1)
    assert total == pytest.approx(math.erf(edge / math.sqrt(2)), abs=1e-5)


def test_logit_log_det_is_that_of_the_jacobian():
    layer, images = LogitDequantize(8), torch.full((1, 1, 2, 2), 3 / 7, dtype=torch.float64)
    noise = torch.rand(1, 1, 2, 2, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda noise: layer(images, noise)[0])(noise).reshape(4, 4)
    expected = torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(layer(images, noise)[1][0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"levels": 1}, "levels must be at least 2, got 1"),
        ({"alpha": 0.5}, r"alpha must be in \(0, 0.5\), got 0.5"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 0.5\), got 0.0"),
    ),
)
def test_bad_dequantisation(options, message):
    with pytest.raises(ValueError, match=message):
        LogitDequantize(**options)


def test_conditioners_start_at_zero_and_learn():
    for net, x in (
        (ResidualMLP(3, 5, 8, 2), torch.randn(4, 3)),
        (ResidualConvNet(3, 5, 8, 2), torch.randn(4, 3, 4, 4)),
    ):
        out = net(x)
        assert out.shape == (4, 5, *x.shape[2:]) and (out == 0).all()
        torch.nn.init.normal_(net.leave.weight)
        net(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
