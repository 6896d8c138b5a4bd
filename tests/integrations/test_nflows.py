"""nflows before and after fastgen.patch."""

import copy
import io

import pytest
import torch
from torch import nn

import fastgen
from fastgen.integrations import _library

pytest.importorskip("nflows")

from nflows import distributions, flows, transforms
from nflows.nn.nets import ConvResidualNet, ResidualNet
from nflows.transforms import splines
from nflows.transforms.base import InputOutsideDomain

from fastgen.integrations import nflows as patched_nflows

MASK = [1, 0, 1, 1, 0]
FEATURES = len(MASK)
CONTEXT = 2
MINIMA = {"min_bin_width": 1e-2, "min_bin_height": 2e-3, "min_derivative": 0.1}


class PlainNet(nn.Sequential):
    """A conditioner without the attributes that nflows looks for."""

    def forward(self, inputs, context=None):
        return super().forward(inputs)


def plain_net(inputs, outputs):
    return PlainNet(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def residual_net(inputs, outputs):
    # Smooth, so that float32 rounding does not flip a unit.
    net = ResidualNet(inputs, outputs, 16, CONTEXT, num_blocks=1, activation=torch.tanh)
    nn.init.normal_(net.final_layer.bias)
    return net


def conv_net(inputs, outputs):
    return ConvResidualNet(inputs, outputs, 8, num_blocks=1, activation=torch.tanh)


def coupling_spline(**options):
    return transforms.PiecewiseRationalQuadraticCouplingTransform(MASK, residual_net, **options)


def image_spline(**options):
    return transforms.PiecewiseRationalQuadraticCouplingTransform(MASK, conv_net, **options)


def autoregressive_spline(**options):
    return transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        FEATURES, 16, CONTEXT, num_blocks=1, activation=torch.tanh, **options
    )


def autoregressive_affine(**options):
    return transforms.MaskedAffineAutoregressiveTransform(
        FEATURES, 16, CONTEXT, num_blocks=1, activation=torch.tanh, **options
    )


LINEAR = {"tails": "linear"}
#: Name -> what makes the transform, whether it takes images, whether it is over [0, 1].
CASES = {
    "spline": (lambda: coupling_spline(**LINEAR), False, False),
    "spline-options": (
        lambda: coupling_spline(**LINEAR, **MINIMA, num_bins=4, tail_bound=3),
        False,
        False,
    ),
    "spline-unconditional": (
        lambda: coupling_spline(**LINEAR, apply_unconditional_transform=True),
        False,
        False,
    ),
    "spline-no-tails": (lambda: coupling_spline(), False, True),
    "spline-no-tails-unconditional": (
        lambda: coupling_spline(**MINIMA, num_bins=4, apply_unconditional_transform=True),
        False,
        True,
    ),
    "spline-image": (
        lambda: image_spline(**LINEAR, apply_unconditional_transform=True, img_shape=[4, 3]),
        True,
        False,
    ),
    "spline-image-no-tails": (lambda: image_spline(num_bins=1), True, True),
    "affine": (lambda: transforms.AffineCouplingTransform(MASK, residual_net), False, False),
    "affine-image": (lambda: transforms.AffineCouplingTransform(MASK, conv_net), True, False),
    "additive": (lambda: transforms.AdditiveCouplingTransform(MASK, residual_net), False, False),
    "autoregressive-affine": (autoregressive_affine, False, False),
    "autoregressive-spline": (
        lambda: autoregressive_spline(**LINEAR, tail_bound=2.0, num_bins=5),
        False,
        False,
    ),
    "autoregressive-spline-no-tails": (lambda: autoregressive_spline(**MINIMA), False, True),
    "cdf": (lambda: transforms.PiecewiseRationalQuadraticCDF([5], **LINEAR), False, False),
    "cdf-image-no-tails": (
        lambda: transforms.PiecewiseRationalQuadraticCDF([5, 4, 3], num_bins=3),
        True,
        True,
    ),
    "cdf-identity": (
        lambda: transforms.PiecewiseRationalQuadraticCDF(5, **LINEAR, identity_init=True),
        False,
        False,
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


def build(case, dtype=torch.float64):
    """A transform, a patched copy of it, and inputs."""
    make, images, unit = CASES[case]
    torch.manual_seed(1)
    plain = make().to(dtype)
    patched = copy.deepcopy(plain)
    fastgen.patch(patched)
    shape = (7, FEATURES, 4, 3) if images else (7, FEATURES)
    x = (torch.rand if unit else torch.randn)(shape, dtype=dtype)
    return plain, patched, x, None if images else torch.randn(7, CONTEXT, dtype=dtype)


def outcome(transform, x, context, inverse=False):
    """Outputs, log-determinant and all gradients."""
    transform.zero_grad()
    x = x.detach().requires_grad_()
    y, log_det = (transform.inverse if inverse else transform)(x, context)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().add((log_det * (1 + log_det)).sum()).backward()
    return [y, log_det, x.grad, *(p.grad for p in transform.parameters() if p.grad is not None)]


def train(transform, x, context, steps=20):
    optimizer = torch.optim.SGD(transform.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        y, log_det = transform(x, context)
        (y.square().mean() - log_det.mean()).backward()
        optimizer.step()


def assert_close(left, right, **close):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, **close)


# What float64 leaves of sums of a few hundred terms; it shows that the map is the same.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def assert_rounded_alike(actual, theirs, exact):
    """Float32 results no further from the exact ones than nflows' are, by a factor that allows for
    luck and for the threefold interval of a spline without tails."""
    for ours, other, truth in zip(actual, theirs, exact, strict=True):
        unit = truth.abs().max()
        error, allowed = ((t - truth).abs().max() for t in (ours, other))
        assert error <= 5 * allowed + 2e-6 * unit


@each_case
def test_as_before(case):
    plain, patched, x, context = build(case)
    assert type(patched) is not type(plain) and isinstance(patched, type(plain))
    expected = outcome(plain, x, context)
    y = expected[0].detach()
    expected_inverse = outcome(plain, y, context, inverse=True)
    assert_close(outcome(patched, x, context), expected, **CLOSE)
    assert_close(outcome(patched, y, context, inverse=True), expected_inverse, **CLOSE)
    plain, patched, x, y = plain.float(), patched.float(), x.float(), y.float()
    context = None if context is None else context.float()
    assert_rounded_alike(outcome(patched, x, context), outcome(plain, x, context), expected)
    assert_rounded_alike(
        outcome(patched, y, context, True), outcome(plain, y, context, True), expected_inverse
    )


@each_case
def test_trains_as_before(case):
    plain, patched, x, context = build(case)
    train(plain, x, context)
    train(patched, x, context)
    assert plain.state_dict().keys() == patched.state_dict().keys()
    assert_close(patched.state_dict().values(), plain.state_dict().values(), rtol=1e-8, atol=1e-10)


@each_case
def test_state_and_class_both_ways(case):
    plain, patched, x, context = build(case)
    expected = plain(x, context)
    file = io.BytesIO()
    torch.save(patched.state_dict(), file)
    file.seek(0)
    other = CASES[case][0]().double()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_close(other(x, context), expected, **CLOSE)
    twin = copy.deepcopy(patched)
    assert type(twin) is type(patched)
    twin.load_state_dict(plain.state_dict())
    twin.eval()
    assert_close(twin(x, context), expected, **CLOSE)
    fastgen.unpatch(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert_close(twin(x, context), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "case",
    ["spline", "spline-no-tails", "affine", "autoregressive-affine", "autoregressive-spline"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(case, dtype):
    plain, patched, x, _ = build(case, torch.float32)
    context = torch.zeros(7, CONTEXT)
    y, log_det = patched.to(dtype)(x.to(dtype), context.to(dtype))
    assert y.dtype == log_det.dtype == dtype
    expected, expected_log_det = plain(x.to(dtype).float(), context)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(log_det.float(), expected_log_det, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    "case",
    ["spline", "affine", "additive", "autoregressive-affine", "autoregressive-spline", "cdf"],
)
def test_compiles_whole(case):
    _, patched, x, context = build(case)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, context), patched(x, context), **CLOSE)


@pytest.mark.parametrize("case", ["affine", "affine-image", "autoregressive-affine"])
@pytest.mark.parametrize("bias", [-200.0, -30.0, 30.0, 1000.0])
def test_affine_scales_at_their_ends(case, bias):
    plain, patched, x, context = build(case, torch.float32)
    for transform in (plain, patched):
        with torch.no_grad():
            for name, parameter in transform.named_parameters():
                if "final_layer" in name:
                    parameter.mul_(0.1).add_(bias * name.endswith("bias"))
    for inverse in (False, True):
        actual, expected, exact = (
            outcome(t, *inputs, inverse)
            for t, inputs in (
                (patched, (x, context)),
                (plain, (x, context)),
                (
                    copy.deepcopy(plain).double(),
                    [t if t is None else t.double() for t in (x, context)],
                ),
            )
        )
        assert_rounded_alike(actual, expected, exact)


def test_autoregressive_affine_with_another_floor(caplog):
    plain, patched, x, context = build("autoregressive-affine")
    plain._epsilon = patched._epsilon = 0.25
    assert_close(outcome(patched, x, context), outcome(plain, x, context), **CLOSE)
    assert fastgen.explain(patched, x).chosen == "fastgen"
    _library.run_own_code.cache_clear()
    plain._epsilon = patched._epsilon = torch.tensor(0.25)
    with caplog.at_level("DEBUG", "fastgen"):
        assert_close(outcome(patched, x, context), outcome(plain, x, context), rtol=0, atol=0)
    assert "a scale of at least tensor(0.25" in caplog.text
    patched._epsilon = -1.0
    assert fastgen.explain(patched, x).rejected == {"fastgen": "a scale of at least -1.0"}


def test_an_unscaled_conditioner_still_warns():
    plain = transforms.PiecewiseRationalQuadraticCouplingTransform(MASK, plain_net, tails="linear")
    patched = copy.deepcopy(plain)
    fastgen.patch(patched)
    x = torch.randn(3, FEATURES)
    results = []
    for transform in (plain, patched):
        with pytest.warns(UserWarning, match="Inputs to the softmax are not scaled down"):
            results.append(transform(x))
    assert_close(*results, rtol=1e-5, atol=1e-6)


def spline_inputs(shape=(50,), bins=6, spread=1.0, tails=True, dtype=torch.float64):
    x = torch.randn(shape, dtype=dtype) if tails else torch.rand(shape, dtype=dtype)
    sizes = bins, bins, bins - 1 if tails else bins + 1
    return x, *(spread * torch.randn(*shape, size, dtype=dtype) for size in sizes)


def value_and_grads(function, inputs, **options):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y, log_det = function(*inputs, **options)
    grads = torch.autograd.grad((y * torch.arange(y.numel())).sum() + log_det.exp().sum(), inputs)
    return [y, log_det, *grads]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    "tails, options",
    [
        (True, {}),
        (True, {"tail_bound": 3.0, "min_derivative": 0.2, "min_bin_width": 0.05}),
        (False, {}),
        (False, {"left": -2.0, "bottom": -2.0, "right": 5.0, "top": 5.0, "min_bin_height": 0.02}),
    ],
)
def test_functions(tails, options, inverse):
    name = "unconstrained_rational_quadratic_spline" if tails else "rational_quadratic_spline"
    inputs = spline_inputs(tails=tails)
    expected = value_and_grads(getattr(splines, name), inputs, inverse=inverse, **options)
    with fastgen.patch("nflows"):
        assert getattr(splines, name) is getattr(patched_nflows, name)
        actual = value_and_grads(getattr(splines, name), inputs, inverse=inverse, **options)
    assert_close(actual, expected, **CLOSE)
    assert getattr(splines, name).__module__ == "nflows.transforms.splines.rational_quadratic"
    assert not hasattr(getattr(splines, name), "__wrapped__")


def test_the_ends_of_an_interval_without_tails():
    _, *parameters = spline_inputs((3,), tails=False, dtype=torch.float32)
    x = torch.tensor([0.0, 1.0, 1.0])
    with fastgen.patch("nflows"):
        y, log_det, *grads = value_and_grads(splines.rational_quadratic_spline, (x, *parameters))
    expected = value_and_grads(splines.rational_quadratic_spline, (x, *parameters))
    assert_close([y, log_det, *grads], expected, rtol=1e-3, atol=1e-3)
    assert y.min() >= 0 and y.max() <= 1


# Why nflows' code runs -> arguments of the unconstrained spline.
OWN_CODE = {
    "min_bin_width=0 is not between 0 and 0.166667": {"min_bin_width": 0},
    "min_derivative=1.5 is not between 0 and 1": {"min_derivative": 1.5},
    "low is no plain number": {"tail_bound": torch.tensor(2.0)},
}


@pytest.mark.parametrize("reason", OWN_CODE)
def test_what_has_no_fused_path_runs_nflows_code(reason, caplog):
    _library.run_own_code.cache_clear()
    function = patched_nflows.unconstrained_rational_quadratic_spline
    inputs = spline_inputs()
    expected = patched_nflows._own_unconstrained(*inputs, **OWN_CODE[reason])
    with caplog.at_level("DEBUG", "fastgen"):
        assert_close(
            function(*inputs, **OWN_CODE[reason]), expected, rtol=0, atol=0, equal_nan=True
        )
    assert reason in caplog.text


@pytest.mark.usefixtures("forward_mode")
def test_other_calls_run_nflows_code(caplog):
    _library.run_own_code.cache_clear()
    x, *parameters = spline_inputs(tails=False)
    with caplog.at_level("DEBUG", "fastgen"):
        patched_nflows.rational_quadratic_spline(x, *parameters, top=2.0)
        patched_nflows.rational_quadratic_spline(x[:1], *parameters[:2], parameters[2])
        torch.func.jvp(
            lambda x: patched_nflows.rational_quadratic_spline(x, *parameters)[0],
            (x,),
            (torch.ones_like(x),),
        )
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == [
        "intervals of x and y that differ",
        "parameters of other shapes than the inputs'",
        "forward-mode differentiation",
    ]
    with pytest.raises(RuntimeError, match="tails are not implemented"):
        patched_nflows.unconstrained_rational_quadratic_spline(*spline_inputs(), tails="other")


def test_outside_the_domain_is_an_error_still():
    for inverse in (False, True):
        with pytest.raises(InputOutsideDomain):
            x, *parameters = spline_inputs(tails=False)
            patched_nflows.rational_quadratic_spline(x + 1e-3 + 1 - x.max(), *parameters, inverse)


def test_reports_and_explains():
    model = transforms.CompositeTransform(
        [
            coupling_spline(**LINEAR, apply_unconditional_transform=True),
            autoregressive_spline(**LINEAR, min_bin_width=0.0),
            transforms.PiecewiseQuadraticCouplingTransform(MASK, residual_net, tails="linear"),
            autoregressive_affine(),
        ]
    )
    report = fastgen.patch(model)
    assert [piece.path for piece in report.replaced] == [
        "_transforms.0",
        "_transforms.0.unconditional_transform",
        "_transforms.3",
    ]
    assert {piece.path: piece.reason for piece in report.left} == {
        "_transforms.1": "min_bin_width=0.0 is not between 0 and 0.1"
    }
    x = torch.randn(3, FEATURES)
    spline = model._transforms[0]
    assert fastgen.explain(spline, x).chosen == "fastgen"
    own = fastgen.explain(spline, x.int())
    assert own.chosen == "nflows" and own.rejected == {"fastgen": "tensors of torch.int32"}
    spline.tails = "circular"
    assert fastgen.explain(spline, x).rejected == {"fastgen": "tails='circular'"}
    with pytest.raises(RuntimeError, match="circular tails are not implemented"):
        spline(x, torch.randn(3, CONTEXT))


@pytest.mark.parametrize(
    "piece", [*patched_nflows.LIBRARY.swaps, *patched_nflows.LIBRARY.functions]
)
def test_fingerprints(piece):
    assert _library.fingerprint(piece.original, *piece.relies_on) == piece.fingerprint


def test_bfloat16_autocast():
    """nflows under autocast: a point that a linear layer rounds to the bound is in no bin."""
    torch.manual_seed(0)
    steps = [coupling_spline(**LINEAR, tail_bound=3.0), transforms.LULinear(FEATURES)] * 2
    flow = flows.Flow(
        transforms.CompositeTransform(steps), distributions.StandardNormal([FEATURES])
    )
    x, context = 2 * torch.randn(4000, FEATURES), torch.randn(4000, CONTEXT)
    expected = flow.log_prob(x, context)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            flow.log_prob(x, context)
        fastgen.patch(flow)
        log_prob = flow.log_prob(x, context)
        log_prob.mean().backward()
    assert log_prob.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    # What is left is what bfloat16 makes of the linear layers.
    assert (log_prob - expected).abs().mean() < 0.1


def test_large_logits():
    """nflows#71, #87: the quadratic's discriminant is negative by rounding, and an assertion."""
    _, *parameters = spline_inputs((50_000,), bins=8, spread=8.0, dtype=torch.float32)
    ours, own = (
        patched_nflows.unconstrained_rational_quadratic_spline,
        patched_nflows._own_unconstrained,
    )
    y, _ = own(torch.rand(50_000) * 2 - 1, *parameters)
    with pytest.raises(AssertionError):
        own(y, *parameters, inverse=True)
    x, log_det, *grads = value_and_grads(ours, (y, *parameters), inverse=True)
    assert all(t.isfinite().all() for t in (x, log_det, *grads))
    # Where the spline is nearly flat the point is lost, but not its height; where it is steep, the
    # height moves by the slope times the last digit of the point.
    error = (ours(x, *parameters)[0] - y).abs()
    assert (error <= 1e-6 + 2e-7 * (-log_det).exp()).all()


def test_readme_under_patch(readme_examples):
    examples = readme_examples("nflows")
    assert len(examples) == 3
    names = {"inputs": torch.randn(5, 2), "num_samples": 4}
    with fastgen.patch("nflows") as report:
        for example in examples:
            exec(example, names)
    assert len(report.replaced) == 8 and not report.left
    transform = names["transform"]._transforms[0]
    assert type(transform) is patched_nflows.FusedMaskedAffineAutoregressiveTransform
    assert names["log_prob"].shape == (5,) and names["samples"].shape == (4, 2)
    assert type(autoregressive_affine()) is transforms.MaskedAffineAutoregressiveTransform


@pytest.mark.slow
def test_own_suite_under_patch(own_suite):
    """Some of it fails by itself: functions that torch has no longer, and tolerances."""
    pytest.importorskip("torchtestcase")
    patched = own_suite("nflows", "nflows-0.14", "patched")
    assert patched == own_suite("nflows", "nflows-0.14", "plain") and patched[1] > 100
