"""rq_spline: the published formula, invertibility, and behaviour at the edges of its domain."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian

from fastgen import ops
from fastgen.ops import _library
from fastgen.testing import backends_here

BINS = (1, 2, 3, 5, 8, 9, 17, 32)


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch):
    """Of the Triton kernels in their interpreter, which takes its time by the program."""
    if _library.triton_interprets:
        kernels = importlib.import_module("fastgen.kernels.rq_spline")
        monkeypatch.setattr(kernels, "_TILE_BYTES", 2**17)


def parameters(*shape, bins, scale=1.0, dtype=torch.float64):
    return tuple((scale * torch.randn(*shape, k)).to(dtype) for k in (bins, bins, bins - 1))


def both_directions(function):
    return pytest.mark.parametrize("inverse", (False, True), ids=("forward", "inverse"))(function)


def published(x, widths, heights, derivatives, bound):
    """Durkan et al. 2019, eq. 4 and 5, one element at a time: y, dy/dx and the knots."""
    bins = len(widths)

    def knots(raw):
        p = np.exp(raw) / np.exp(raw).sum()
        return -bound + 2 * bound * np.concatenate(([0], np.cumsum(1e-3 + (1 - 1e-3 * bins) * p)))

    shift = np.log(np.exp(1 - 1e-3) - 1)
    d = np.concatenate(([1.0], 1e-3 + np.log1p(np.exp(derivatives + shift)), [1.0]))
    xk, yk = knots(widths), knots(heights)
    if abs(x) > bound:
        return x, 1.0, xk, yk, d
    k = min(int(np.searchsorted(xk, x, side="right")) - 1, bins - 1)
    s = (yk[k + 1] - yk[k]) / (xk[k + 1] - xk[k])
    xi = (x - xk[k]) / (xk[k + 1] - xk[k])
    denominator = s + (d[k + 1] + d[k] - 2 * s) * xi * (1 - xi)
    y = yk[k] + (yk[k + 1] - yk[k]) * (s * xi**2 + d[k] * xi * (1 - xi)) / denominator
    slope = d[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + d[k] * (1 - xi) ** 2
    return y, s**2 * slope / denominator**2, xk, yk, d


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("bound", (1.1, 3.0))
def test_is_the_published_formula(bins, bound):
    x = 1.5 * bound * (2 * torch.rand(50, dtype=torch.float64) - 1)
    raw = parameters(50, bins=bins)
    y, log_det = ops.rq_spline(x, *raw, tail_bound=bound)
    expected = [published(*(t[i].numpy() for t in (x, *raw)), bound)[:2] for i in range(50)]
    value, slope = torch.tensor(np.array(expected, dtype=np.float64)).T
    torch.testing.assert_close(y, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, slope.log(), rtol=0, atol=1e-11)


@both_directions
@pytest.mark.parametrize("bins", BINS)
def test_zero_parameters_are_the_identity(bins, inverse):
    x = torch.linspace(-4, 4, 101)
    zeros = (torch.zeros(101, k) for k in (bins, bins, bins - 1))
    y, log_det = ops.rq_spline(x, *zeros, inverse=inverse)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(101), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("scale", (1.0, 5.0, 20.0))
def test_round_trip(dtype, scale):
    """The error of x is that of y's last bits over the slope, and the log-determinants cancel."""
    x = (2.5 * torch.randn(5000)).to(dtype)
    raw = parameters(5000, bins=8, scale=scale, dtype=dtype)
    y, forward = ops.rq_spline(x, *raw)
    back, inverse = ops.rq_spline(y, *raw, inverse=True)
    epsilon = torch.finfo(dtype).eps
    slope = forward.exp().clamp_max(1)
    # A bin may be entirely steeper or flatter than the slope at x says: its ends bound it.
    assert ((back - x).abs() <= 300 * epsilon * 6 / slope).all()
    gentle = forward.abs() < 3
    assert gentle.sum() > 1500
    torch.testing.assert_close(
        forward[gentle].double(), -inverse[gentle].double(), rtol=0, atol=2e5 * epsilon
    )


@both_directions
def test_log_det_is_that_of_the_jacobian(inverse):
    x = 1.5 * torch.randn(6, dtype=torch.float64)
    raw = parameters(6, bins=5)
    full = jacobian(lambda t: ops.rq_spline(t, *raw, inverse=inverse)[0], x)
    assert torch.equal(full, torch.diag(full.diagonal()))
    _, log_det = ops.rq_spline(x[None], *(t[None] for t in raw), inverse=inverse, sum_log_det=True)
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(full)[1], rtol=0, atol=1e-10)


@both_directions
@pytest.mark.parametrize("scale", (1.0, 10.0, 50.0))
def test_monotone(scale, inverse):
    x = torch.linspace(-3.5, 3.5, 20001)
    raw = [t.expand(20001, -1) for t in parameters(1, bins=8, scale=scale, dtype=torch.float32)]
    y, log_det = ops.rq_spline(x, *raw, inverse=inverse)
    # Where the map is flat, values a last bit apart may come out in either order.
    assert (y.diff() >= -1e-6).all()
    assert log_det.isfinite().all()


@both_directions
@pytest.mark.parametrize("backend", backends_here("rq_spline"))
@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_never_nan(dtype, bins, backend, inverse):
    values = torch.tensor([0.0, 1.0, -1.0, 50.0, -50.0, 1e4, -1e4])
    n = 4000
    raw = [values[torch.randint(7, (n, k))].to(dtype) for k in (bins, bins, bins - 1)]
    edges = torch.tensor([-3.0, 3.0, -1e4, 1e4, 0.0, -0.0, 3.001, -2.999, 1e-30])
    x = torch.cat([edges[torch.randint(9, (n // 2,))], 2 * torch.randn(n // 2)]).to(dtype)
    inputs = [t.requires_grad_() for t in (x, *raw)]
    y, log_det = ops.rq_spline(*inputs, inverse=inverse, backend=backend)
    assert y.isfinite().all() and log_det.isfinite().all()
    if dtype == torch.float32:
        grads = torch.autograd.grad([y, log_det], inputs, [torch.ones_like(y)] * 2)
        assert not any(g.isnan().any() for g in grads)


def on_and_beside_knots(raw_sizes, minimum, bound):
    """Knots, the numbers beside them, the ends of the box, points near 0, and any points."""
    n, bins = raw_sizes.shape
    sizes = minimum + (1 - minimum * bins) * raw_sizes.double().softmax(-1)
    knots = (2 * bound * sizes.cumsum(-1) - bound).to(raw_sizes.dtype)
    knots = knots.gather(1, torch.randint(bins, (n, 1)))[:, 0]
    ends = torch.full_like(knots, bound)
    kinds = [
        knots,
        torch.nextafter(knots, -ends),
        torch.nextafter(knots, ends),
        bound * torch.randint(2, (n,)).mul(2).sub(1),
        torch.randn(n) * 10.0 ** -torch.randint(3, 30, (n,)),
        bound * (2 * torch.rand(n) - 1),
    ]
    i = torch.arange(n)
    return torch.stack([t.to(knots) for t in kinds])[i % 6, i].clamp(-bound, bound)


def assert_between(x, y, raw, slack, **options):
    """y is that of a point no more than `slack` from x, up to `slack`, by the exact spline."""
    raw = [t.detach().double() for t in raw]
    x, y = x.detach().double(), y.detach().double()
    for side in (-slack, slack):
        limit, _ = ops.rq_spline(x + side, *raw, **options, backend="reference")
        assert ((limit + side - y) * side >= 0).all()


@both_directions
@pytest.mark.parametrize("backend", backends_here("rq_spline"))
@pytest.mark.parametrize("scale", (5.0, 20.0, 100.0))
@pytest.mark.parametrize("minimum", (1e-6, 1e-9, 1e-12))
def test_bins_below_rounding(minimum, scale, backend, inverse):
    """Where rounded knots meet or nearly so, results are those of the knots before rounding."""
    options = {"min_bin_width": minimum, "min_bin_height": minimum, "tail_bound": 3.0}
    slack = 2e-6
    for bins in (2, 3, 8, 17):
        widths, heights = (scale * torch.randn(600, bins) for _ in range(2))
        raw = [widths, heights, torch.randn(600, bins - 1)]
        x = on_and_beside_knots(heights if inverse else widths, minimum, 3.0)
        inputs = [t.requires_grad_() for t in (x, *raw)]
        y, log_det = ops.rq_spline(*inputs, **options, inverse=inverse, backend=backend)
        back, back_log_det = ops.rq_spline(y, *raw, **options, inverse=not inverse, backend=backend)
        grads = torch.autograd.grad([y.sum() + log_det.sum()], inputs)
        for value in (y, log_det, back, back_log_det, *grads):
            assert value.isfinite().all()
        assert (y.abs() <= 3).all()
        assert_between(x, y, raw, slack, **options, inverse=inverse)
        assert_between(back, y, raw, 2 * slack, **options, inverse=inverse)


@both_directions
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_flat_bins_below_rounding(dtype, inverse):
    """With slopes so small that gradients have to be cut, of any minima."""
    for minimum in (1e-3, 1e-12, 1e-30):
        raw = parameters(3000, bins=8, scale=100.0, dtype=dtype)
        x = on_and_beside_knots(raw[inverse], minimum, 3.0)
        inputs = [t.requires_grad_() for t in (x, *raw)]
        y, log_det = ops.rq_spline(
            *inputs,
            inverse=inverse,
            min_bin_width=minimum,
            min_bin_height=minimum,
            min_derivative=1e-30,
        )
        assert y.isfinite().all() and log_det.isfinite().all()
        for loss in (y, log_det):
            grads = torch.autograd.grad([loss.sum()], inputs, retain_graph=True)
            assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", backends_here("rq_spline"))
def test_knots_that_meet(backend):
    """A point on them belongs to the bin above, the upper end of the box to the last bin."""
    tiny = {"min_bin_width": 1e-12, "min_bin_height": 1e-12, "backend": backend}
    middle = torch.tensor([1.0, -200.0, -200.0, 0.0])
    knot = (6 * middle.double().softmax(0)[0] - 3).float()
    zeros, slopes = torch.zeros(4), torch.tensor([0.5, 1.0, -1.0])
    below, above = knot - 1e-6, knot + 1e-6

    def spline(x, widths, heights, **options):
        x = torch.stack([torch.as_tensor(t) for t in x])
        raw = (t.expand(len(x), -1) for t in (widths, heights, slopes))
        return ops.rq_spline(x, *raw, **tiny, **options)

    y, log_det = spline((below, above), middle, zeros)
    torch.testing.assert_close(y, torch.tensor([-1.5, 1.5]), rtol=0, atol=1e-5)
    assert log_det.isfinite().all()
    x, log_det = spline((-1.0, 0.5, 1.0), middle, zeros, inverse=True)
    torch.testing.assert_close(x, knot.expand(3), rtol=0, atol=1e-6)
    assert (log_det < -20).all()
    x, log_det = spline((below, above), zeros, middle, inverse=True)
    torch.testing.assert_close(x, torch.tensor([-1.5, 1.5]), rtol=0, atol=1e-5)
    last = torch.tensor([0.0, -200.0, -200.0, -200.0])
    for inverse in (False, True):
        for sizes in ((last, zeros), (zeros, last), (last, last)):
            y, log_det = spline((3.0,), *sizes, inverse=inverse)
            assert y == 3 and log_det.abs() < 1e-5


@both_directions
def test_nan_input_gives_nan(inverse):
    raw = parameters(20, bins=8, dtype=torch.float32)
    x = torch.full((20,), math.nan)
    y, log_det = ops.rq_spline(x, *raw, inverse=inverse)
    assert y.isnan().all() and log_det.isnan().all()


@both_directions
def test_tails_pass_everything_through(inverse):
    x = torch.tensor([3.0001, -3.0001, 1e6, -1e6, math.inf, -math.inf] * 5, requires_grad=True)
    raw = [t.requires_grad_() for t in parameters(30, bins=8, dtype=torch.float32)]
    y, log_det = ops.rq_spline(x, *raw, inverse=inverse)
    assert torch.equal(y, x) and torch.equal(log_det, torch.zeros(30))
    cotangents = [torch.randn(30), torch.randn(30)]
    grad_x, *grads = torch.autograd.grad([y, log_det], [x, *raw], cotangents)
    assert torch.equal(grad_x, cotangents[0])
    assert not any(g.any() for g in grads)


def test_knots_from_both_sides():
    """At a knot the map is continuous and so is its slope, which is the derivative given there."""
    raw = parameters(1, bins=6)
    *_, xk, yk, d = published(0.0, *(t[0].numpy() for t in raw), 3.0)
    for side in (-1e-12, 0.0, 1e-12):
        x = torch.tensor(xk + side)
        y, log_det = ops.rq_spline(x, *(t.expand(7, -1) for t in raw))
        torch.testing.assert_close(y, torch.tensor(yk), rtol=0, atol=1e-10)
        torch.testing.assert_close(log_det.exp(), torch.tensor(d), rtol=0, atol=1e-9)
        back, _ = ops.rq_spline(
            torch.tensor(yk + side), *(t.expand(7, -1) for t in raw), inverse=True
        )
        torch.testing.assert_close(back, torch.tensor(xk), rtol=0, atol=1e-9)


@both_directions
def test_box_ends_are_fixed_points(inverse):
    raw = parameters(1000, bins=8, dtype=torch.float32)
    for end in (-3.0, 3.0):
        x = torch.full((1000,), end)
        y, log_det = ops.rq_spline(x, *raw, inverse=inverse)
        torch.testing.assert_close(y, x, rtol=0, atol=1e-6)
        torch.testing.assert_close(log_det, torch.zeros(1000), rtol=0, atol=2e-5)


@both_directions
def test_one_bin_has_no_gradient(inverse):
    """A single bin is the identity whatever its parameters, so their gradient vanishes."""
    x = 2 * torch.randn(40, dtype=torch.float64)
    raw = [t.requires_grad_() for t in parameters(40, bins=1)]
    y, log_det = ops.rq_spline(x, *raw, inverse=inverse)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(log_det, torch.zeros_like(x), rtol=0, atol=1e-14)
    grads = torch.autograd.grad([y.sum() + log_det.sum()], raw)
    assert all(g.abs().max() == 0 for g in grads[:2]) and grads[2].shape == (40, 0)


def test_slices_of_one_tensor():
    """What a conditioner gives: one tensor, split along its last dimension."""
    theta = torch.randn(33, 7, 23, requires_grad=True)
    x = torch.randn(33, 14)[:, 7:]
    split = theta.split((8, 8, 7), -1)
    whole = [t.detach().clone().requires_grad_() for t in split]
    results = ops.rq_spline(x, *split, sum_log_det=True)
    expected = ops.rq_spline(x.clone(), *whole, sum_log_det=True)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
    ones = [torch.ones_like(r) for r in results]
    (grad,) = torch.autograd.grad(results, [theta], ones)
    assert torch.equal(grad, torch.cat(torch.autograd.grad(expected, whole, ones), -1))


@pytest.mark.parametrize("size", (1, 3, 16, 1023, 1024, 1025, 5000, 40000))
def test_sum_of_log_det(size):
    """Samples shorter and longer than what one thread takes at a time."""
    x = 2 * torch.randn(5, size)
    raw = parameters(5, size, bins=4, dtype=torch.float32)
    y, each = ops.rq_spline(x, *raw)
    z, total = ops.rq_spline(x, *raw, sum_log_det=True)
    assert torch.equal(y, z)
    torch.testing.assert_close(total.double(), each.double().sum(1), rtol=1e-6, atol=1e-5)


@both_directions
@pytest.mark.parametrize("bins", (4, 8, 32))
def test_no_less_exact_than_plain_pytorch(bins, inverse):
    """Quantiles of the errors of outputs and gradients over many elements.

    A single element tells nothing: where a bin is steep, it is chance whose knot rounds better.
    """
    n = 20000
    inputs = (2 * torch.randn(n), *parameters(n, bins=bins, dtype=torch.float32))
    cotangents = torch.randn(2, n, dtype=torch.float64)

    def everything(dtype, backend):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        results = ops.rq_spline(*leaves, inverse=inverse, backend=backend)
        grads = torch.autograd.grad(results, leaves, list(cotangents.to(dtype)))
        return [t.detach().double() for t in (*results, *grads)]

    exact = everything(torch.float64, "reference")
    ours, plain = everything(torch.float32, None), everything(torch.float32, "reference")
    for a, b, e in zip(ours, plain, exact, strict=True):
        for q in 0.5, 0.9, 0.999:
            error, plain_error = ((t - e).abs().flatten().quantile(q) for t in (a, b))
            assert error <= 1.25 * plain_error


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"tail_bound": 0.0}, ValueError, "tail_bound: expected a positive number, got 0.0"),
        ({"tail_bound": "3"}, TypeError, "tail_bound: expected a positive number, got str"),
        ({"min_bin_width": 0.25}, ValueError, "min_bin_width: expected less than 0.25, got 0.25"),
        ({"min_bin_height": 0.3}, ValueError, "min_bin_height: expected less than 0.25, got 0.3"),
        ({"min_derivative": 1.0}, ValueError, "min_derivative: expected less than 1, got 1.0"),
        ({"widths": torch.zeros(5, 4)}, ValueError, r"widths: expected shape \(6, 4\)"),
        ({"widths": torch.zeros(6, 0)}, ValueError, "widths: expected at least one bin"),
        ({"widths": torch.zeros(())}, ValueError, r"widths: expected \(..., K\), got shape \(\)"),
        ({"heights": torch.zeros(6, 5)}, ValueError, r"heights: expected shape \(6, 4\)"),
        ({"derivatives": torch.zeros(6, 4)}, ValueError, r"derivatives: expected shape \(6, 3\)"),
        ({"heights": torch.zeros(6, 4).half()}, TypeError, "heights: expected the dtype of x"),
    ),
)
def test_errors(change, error, message):
    arguments = {
        "x": torch.zeros(6),
        "widths": torch.zeros(6, 4),
        "heights": torch.zeros(6, 4),
        "derivatives": torch.zeros(6, 3),
    }
    with pytest.raises(error, match=f"^{message}"):
        ops.rq_spline(**{**arguments, **change})


def test_sum_needs_a_batch():
    raw = (torch.zeros(4), torch.zeros(4), torch.zeros(3))
    assert ops.rq_spline(torch.tensor(0.5), *raw)[0].shape == ()
    with pytest.raises(ValueError, match="^x: expected at least one dimension"):
        ops.rq_spline(torch.tensor(0.5), *raw, sum_log_det=True)


@pytest.mark.parametrize("wrong", range(1, 4))
def test_raw_operator_checks_sizes(wrong):
    tensors = [torch.zeros(6), torch.zeros(6, 4), torch.zeros(6, 4), torch.zeros(6, 3)]
    tensors[wrong] = tensors[wrong][:5]
    with pytest.raises(RuntimeError, match="rq_spline: .* has the wrong device, dtype or shape"):
        torch.ops.fastgen.rq_spline_fwd(*tensors, 1, False, 3.0, 1e-3, 1e-3, 1e-3)


def test_second_order_through_vmap_of_scalars():
    """d/dx of log|dy/dx|, elementwise by vmap over scalars, as continuous flows ask for it."""
    x = torch.randn(9, dtype=torch.float64)
    raw = parameters(9, bins=4)

    def log_slope(*args):
        return ops.rq_spline(*args)[1]

    gradient = torch.func.vmap(torch.func.grad(log_slope))(x, *raw)
    step = 1e-6
    difference = (log_slope(x + step, *raw) - log_slope(x - step, *raw)) / (2 * step)
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-7)
