"""fastgen.patch on normflows."""

import copy
import io
import logging
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastgen
from fastgen.integrations import _library

nf = pytest.importorskip("normflows")
ours = pytest.importorskip("fastgen.integrations.normflows")
coupling = pytest.importorskip("normflows.flows.neural_spline.coupling")
splines = pytest.importorskip("normflows.utils.splines")

# Invertible1x1Conv calls torch.lu.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(?s).*torch.lu is deprecated"),
    pytest.mark.usefixtures("fused_on_cpus"),
]

MAPS = ("exp", "sigmoid", "sigmoid_inv")
MODES = ("channel", "channel_inv", "checkerboard", "checkerboard_inv")
#: Rounding of sums of at most a few hundred terms, through 20 steps of training; the quotients of
#: the library's splines lose some of it.
CLOSE = {
    torch.float32: {"rtol": 1e-3, "atol": 2e-5},
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
}


def block(scale_map="exp", mode="channel", features=5):
    """A coupling of vectors; the first half is the larger one."""
    small, large = features // 2, features - features // 2
    sizes = (small, large) if mode == "channel_inv" else (large, small)
    net = nf.nets.MLP([sizes[0], 8, 2 * sizes[1]])
    return nf.flows.AffineCouplingBlock(net, scale_map=scale_map, split_mode=mode)


def masked(t=True):
    nets = [nf.nets.MLP([4, 8, 4]) for _ in range(2)]
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0])
    return nf.flows.MaskedAffineFlow(mask, nets[0] if t else None, nets[1])


def images(net=nf.nets.ConvResidualNet, **options):
    """A spline coupling of 3x2x4 images."""
    mask = torch.tensor([0, 1, 1])
    return coupling.PiecewiseRationalQuadraticCoupling(
        mask,
        lambda a, b: net(a, b, 6),
        num_bins=3,
        apply_unconditional_transform=True,
        img_shape=[2, 4],
        **{"tails": "linear", "tail_bound": 2.0} | options,
    )


def masked_autoregressive(*args, **options):
    return nf.flows.MaskedAffineAutoregressive(5, 8, *args, num_blocks=1, **options)


Coupled = nf.flows.CoupledRationalQuadraticSpline
Autoregressive = nf.flows.AutoregressiveRationalQuadraticSpline
AFFINE = {
    **{f"block {m} {s}": (lambda m=m, s=s: block(m, s), (6, 5)) for m in MAPS for s in MODES[:2]},
    **{f"block {s}": (lambda s=s: block("exp", s, 6), (6, 6)) for s in MODES[2:]},
    "masked": (masked, (6, 4)),
    "masked without shift": (lambda: masked(t=False), (6, 4)),
    **{
        f"glow {m} {s}": (lambda m=m, s=s: nf.flows.GlowBlock(3, 4, True, m, s), (2, 3, 2, 4))
        for m in MAPS
        for s in MODES
    },
    "autoregressive affine": (masked_autoregressive, (6, 5)),
    "autoregressive affine, context": (lambda: masked_autoregressive(2), (6, 5), (6, 2)),
    "autoregressive affine, random mask": (
        lambda: masked_autoregressive(use_residual_blocks=False, random_mask=True),
        (6, 5),
    ),
    "autoregressive affine, dropout": (
        lambda: masked_autoregressive(dropout_probability=0.5),
        (6, 5),
    ),
    "glow, a 1x1 convolution without LU, ActNorm in the net": (
        lambda: nf.flows.GlowBlock(4, 4, use_lu=False, net_actnorm=True),
        (2, 4, 4, 4),
    ),
}
SPLINES = {
    "coupled": (lambda: Coupled(5, 1, 8), (8, 5)),
    "coupled, reversed mask, 3 bins, bound 1": (
        lambda: Coupled(4, 2, 6, num_bins=3, tail_bound=1, reverse_mask=True, activation=nn.SiLU),
        (8, 4),
    ),
    "coupled, 1 bin": (lambda: Coupled(4, 1, 6, num_bins=1), (8, 4)),
    "coupled, dropout": (lambda: Coupled(4, 1, 6, dropout_probability=0.5), (8, 4)),
    "coupled, context": (lambda: Coupled(4, 1, 6, 2), (8, 4), (8, 2)),
    "autoregressive": (lambda: Autoregressive(3, 1, 8), (8, 3)),
    "autoregressive, context, permuted": (
        lambda: Autoregressive(3, 1, 8, 2, num_bins=4, permute_mask=True, init_identity=False),
        (8, 3),
        (8, 2),
    ),
    "images": (images, (2, 3, 2, 4)),
    "images, other minima": (
        lambda: images(min_bin_width=0.1, min_bin_height=0.02, min_derivative=0.05),
        (2, 3, 2, 4),
    ),
}
CASES = AFFINE | SPLINES


def pair(make, dtype=torch.float32):
    """A layer other than the identity, and its patched copy."""
    torch.manual_seed(0)
    plain = make()
    for module in plain.modules():
        # those are initialised by the first batch
        if not isinstance(module, (nf.flows.ActNorm, nf.flows.Invertible1x1Conv)):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.2 if parameter.dim() < 3 else 0.1)
    plain = plain.to(dtype)
    patched = copy.deepcopy(plain)
    report = fastgen.patch(patched)
    assert report.replaced and not report.left
    return plain, patched


def data(case, dtype=torch.float32):
    """Inputs inside and outside the interval and on its ends, and the context."""
    _, shape, *context = case
    torch.manual_seed(1)
    x = 1.5 * torch.randn(shape, dtype=dtype)
    x.view(-1)[:4] = torch.tensor([3.0, -3.0, 1.0, -1.0])
    return x, *(torch.randn(size, dtype=dtype) for size in context)


def run(flow, method, x, *context):
    """Outputs of one direction, and the gradients of a random function of them."""
    torch.manual_seed(2)
    flow.zero_grad()
    x = x.detach().requires_grad_()
    y, log_det = (flow if method == "forward" else flow.inverse)(x, *context)
    (torch.sin(y).sum() + (log_det * torch.randn_like(log_det)).sum()).backward()
    gradients = [x.grad, *(p.grad for p in flow.parameters())]
    return [y, log_det, *(g for g in gradients if g is not None)]


def assert_alike(left, right, dtype=torch.float32, **close):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(b, a, **(CLOSE[dtype] | close))


def train(flow, steps, *batch):
    optimizer = torch.optim.SGD(flow.parameters(), 0.05)
    for i in range(steps):
        torch.manual_seed(i)
        optimizer.zero_grad()
        z, log_det = flow.inverse(*batch)
        (torch.sin(z).mean() + torch.sin(log_det / z[0].numel()).mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_trains_as_before(name, dtype):
    case = CASES[name]
    plain, patched = pair(case[0], dtype)
    batch = data(case, dtype)
    for method in ("inverse", "forward"):
        assert_alike(run(plain, method, *batch), run(patched, method, *batch), dtype)
    train(plain, 20, *batch)
    train(patched, 20, *batch)
    assert_alike(plain.state_dict().values(), patched.state_dict().values(), dtype)
    patched.load_state_dict(plain.state_dict())
    plain.eval()
    patched.eval()
    assert_alike(run(plain, "inverse", *batch), run(patched, "inverse", *batch), dtype)
    plain.load_state_dict(patched.state_dict())
    fastgen.unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize(
    "name",
    [
        "block exp channel",
        "glow sigmoid checkerboard",
        "masked",
        "autoregressive affine",
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_affine_layers(name, dtype):
    case = CASES[name]
    plain, patched = pair(case[0])
    x = data(case)[0].to(dtype)
    y, log_det = patched.to(dtype).inverse(x)
    theirs, their_log_det = plain.to(dtype).inverse(x)
    assert (y.dtype, log_det.dtype) == (theirs.dtype, their_log_det.dtype)
    exact, _ = plain.double().inverse(x.double())
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= (theirs - exact).abs().max() + rounding


def test_affine_layers_under_autocast():
    plain, patched = pair(block)
    x = torch.randn(16, 5)
    exact = plain.inverse(x)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, actual = plain.inverse(x), patched.inverse(x)
    assert [t.dtype for t in actual] == [t.dtype for t in theirs]
    assert_alike(exact, actual, rtol=0.02, atol=0.02)


def test_autoregressive_affine_layers_under_autocast():
    """The library's log-determinant is in bfloat16 on a CPU, in float32 on a GPU."""
    plain, patched = pair(masked_autoregressive)
    x = torch.randn(16, 5)
    exact = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = patched(x)
    assert [t.dtype for t in actual] == [torch.float32, torch.float32]
    assert_alike(exact, actual, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_additions(mode):
    torch.manual_seed(0)
    plain = nf.flows.AffineCouplingBlock(nf.nets.MLP([3, 4, 3]), scale=False, split_mode=mode)
    patched = copy.deepcopy(plain)
    report = fastgen.patch(patched)
    assert [p.path for p in report.replaced] == [""] and [p.path for p in report.left] == [
        "flows.1"
    ]
    x = torch.randn(4, 6)
    for method in ("forward", "inverse"):
        assert_alike(run(plain, method, x), run(patched, method, x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPLINES)
def test_half_precision_of_splines(name, dtype):
    case = CASES[name]
    plain, patched = pair(case[0])
    plain.eval()
    x, *context = data(case)
    exact, _ = plain.inverse(x, *context)
    patched.to(dtype).eval()
    y, log_det = patched.inverse(x.to(dtype), *(c.to(dtype) for c in context))
    assert y.dtype == log_det.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)


def test_autocast_that_the_library_fails():
    """A sample on the end of the interval is past its last knot in bfloat16."""
    plain, patched = pair(lambda: Coupled(8, 1, 8))
    x = torch.randn(64, 8).mul(2).clamp(-3, 3)
    exact = plain.inverse(x)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="index 8 is out of bounds"):
            plain.inverse(x)
        y, log_det = patched.inverse(x)
    assert y.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(y, exact[0], rtol=0.1, atol=0.1)
    torch.testing.assert_close(log_det, exact[1], rtol=0.1, atol=0.5)


def test_large_logits_that_the_library_fails():
    """Rounding makes the discriminant of the inverse negative, which the library asserts on."""
    spline = splines.unconstrained_rational_quadratic_spline
    torch.manual_seed(0)
    parameters = [8 * torch.randn(100_000, k) for k in (8, 8, 7)]
    y, _ = spline(torch.rand(100_000) * 6 - 3, *parameters, tail_bound=3.0)
    with pytest.raises(AssertionError):
        spline(y, *parameters, inverse=True, tail_bound=3.0)
    with fastgen.patch("normflows"):
        spline = splines.unconstrained_rational_quadratic_spline
        x, log_det = spline(y, *parameters, inverse=True, tail_bound=3.0)
    assert x.isfinite().all() and log_det.isfinite().all() and (x.abs() <= 3).all()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_spline_function(dtype, inverse):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 40, *k, dtype=dtype) for k in ((), (6,), (6,), (5,))]
    options = {"inverse": inverse, "min_bin_width": 0.01, "min_derivative": 0.02}
    options |= {"tail_bound": 1.5}

    def results():
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, log_det = splines.unconstrained_rational_quadratic_spline(*leaves, **options)
        (y.sin() + log_det.cos()).sum().backward()
        return [y, log_det, *(t.grad for t in leaves)]

    before = splines.unconstrained_rational_quadratic_spline
    plain = results()
    with fastgen.patch("normflows"):
        assert splines.unconstrained_rational_quadratic_spline is not before
        assert_alike(plain, results(), dtype)
    assert splines.unconstrained_rational_quadratic_spline is before


@pytest.mark.parametrize(
    ("reason", "options", "derivatives"),
    [
        ("tails='circular'", {"tails": "circular"}, 6),
        ("tails=\\['linear', 'circular'\\]", {"tails": ["linear", "circular"]}, 7),
        ("a tail_bound for each feature", {"tail_bound": torch.tensor([2.0, 3.0])}, 5),
        ("parameters of shape \\(4, 2, 7\\) for 6 bins", {}, 7),
        ("min_derivative=0", {"min_derivative": 0}, 5),
    ],
)
def test_spline_function_runs_the_librarys_code(reason, options, derivatives, caplog):
    torch.manual_seed(0)
    inputs = [torch.randn(4, 2, *k) for k in ((), (6,), (6,), (derivatives,))]
    expected = splines.unconstrained_rational_quadratic_spline(*inputs, **options)
    _library.run_own_code.cache_clear()
    with fastgen.patch("normflows"), caplog.at_level(logging.DEBUG, "fastgen"):
        actual = splines.unconstrained_rational_quadratic_spline(*inputs, **options)
        with pytest.raises(RuntimeError, match="hyperbolic tails are not implemented"):
            splines.unconstrained_rational_quadratic_spline(*inputs, tails="hyperbolic")
    assert_alike(expected, actual, rtol=0, atol=0)
    assert re.search(reason, caplog.text)


def circular(cls, **options):
    return cls(3, 1, 6, [1], num_bins=3, **options)


LEFT = {
    "an addition": (
        lambda: nf.flows.AffineCoupling(nf.nets.MLP([2, 4, 2]), scale=False),
        "one addition",
    ),
    "an unknown map": (
        lambda: nf.flows.AffineCoupling(nf.nets.MLP([2, 4, 2]), scale_map="tanh"),
        "scale_map='tanh'",
    ),
    "NICE": (
        lambda: nf.flows.MaskedAffineFlow(torch.tensor([0.0, 1.0]), nf.nets.MLP([2, 4, 2])),
        "one addition",
    ),
    "a soft mask": (
        lambda: nf.flows.MaskedAffineFlow(torch.tensor([0.5, 1.0]), None, nf.nets.MLP([2, 4, 2])),
        "not of zeros and ones",
    ),
    "no tails": (lambda: Coupled(4, 1, 6, tails=None), "tails=None"),
    "circular tails": (lambda: Coupled(4, 1, 6, tails="circular"), "tails='circular'"),
    "circular coordinates": (
        lambda: circular(nf.flows.CircularCoupledRationalQuadraticSpline),
        "tails=\\['(circular|linear)'",
    ),
    "circular autoregression": (
        lambda: circular(nf.flows.CircularAutoregressiveRationalQuadraticSpline),
        "tails=\\['linear', 'circular', 'linear'\\]",
    ),
    "bounds": (
        lambda: images(tails="linear", tail_bound=torch.ones(3), min_derivative=0.0),
        "a tail_bound for each feature",
    ),
    "minima": (lambda: images(min_bin_width=1 / 3), "min_bin_width=0.333"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_a_reason(name):
    make, reason = LEFT[name]
    flow = make()
    with pytest.warns(UserWarning, match=f"(?s)nothing was replaced.*{reason}"):
        report = fastgen.patch(flow)
    assert not report.replaced
    flows = {piece.path: piece for piece in report.left}
    for path, piece in flows.items():
        assert f"{type(flow.get_submodule(path)).__name__}" in piece.original
        assert re.search(reason, piece.reason)
    with fastgen.patch("normflows"):
        made = make()
    assert [type(m) for m in made.modules()] == [type(m) for m in flow.modules()]


def test_circular_tails_stay_as_they_were():
    torch.manual_seed(0)
    flow = circular(nf.flows.CircularCoupledRationalQuadraticSpline)
    x = torch.randn(6, 3)
    expected = run(flow, "inverse", x)
    with fastgen.patch("normflows"):
        assert_alike(expected, run(flow, "inverse", x), rtol=0, atol=0)


class Broadcast(nn.Module):
    """Parameters of a single pixel."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x.mean((2, 3), keepdim=True).repeat(1, 2, 1, 1)


@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_parameters_that_broadcast_run_the_librarys_code(method, caplog):
    plain = nf.flows.AffineCouplingBlock(Broadcast())
    patched = copy.deepcopy(plain)
    fastgen.patch(patched)
    x = torch.randn(2, 4, 3, 3)
    _library.run_own_code.cache_clear()
    with caplog.at_level(logging.DEBUG, "fastgen"):
        assert_alike(run(plain, method, x), run(patched, method, x), rtol=0, atol=0)
    assert "parameters of shape (2, 4, 1, 1) for an input of shape (2, 2, 3, 3)" in caplog.text
    assert patched.flows[1].param_map.calls == 1


def test_calls_that_run_the_librarys_code():
    flow = block("exp", "checkerboard", 6)
    fastgen.patch(flow)
    x = torch.randn(4, 6)
    assert fastgen.explain(flow, x).chosen == "fastgen"
    assert fastgen.explain(flow.flows[1], [x[:, :3], x[:, 3:]]).chosen == "fastgen"
    assert "an odd number" in fastgen.explain(flow, x[:, :5]).rejected["fastgen"]
    seen = []
    flow.flows[0].register_forward_hook(lambda *args: seen.append(args))
    assert "a hook on its Split" in fastgen.explain(flow, x).rejected["fastgen"]
    flow(x)
    assert len(seen) == 1
    mask = masked()
    fastgen.patch(mask)
    rejected = fastgen.explain(mask, torch.randn(2, 3, 4)).rejected["fastgen"]
    assert "shape (2, 3, 4) for a mask of (4,)" in rejected
    affine = masked_autoregressive()
    fastgen.patch(affine)
    assert fastgen.explain(affine, x[:, :5]).chosen == "fastgen"
    rejected = fastgen.explain(affine, x[None]).rejected["fastgen"]
    assert "an input of 3 dimensions" in rejected
    spline = Autoregressive(3, 1, 8)
    fastgen.patch(spline)
    assert fastgen.explain(spline.mprqat, torch.randn(2, 3)).chosen == "fastgen"
    rejected = fastgen.explain(spline.mprqat, torch.ones(2, 3, dtype=torch.int64)).rejected
    assert "tensors of torch.int64" in rejected["fastgen"]


@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_an_autoregressive_network_of_another_batch_runs_the_librarys_code(method, caplog):
    """One row of parameters for all samples."""

    class OneRow(nn.Module):
        def forward(self, inputs, context=None):
            return torch.linspace(-1, 1, 10).to(inputs)[None]

    plain = masked_autoregressive()
    plain.autoregressive_net = OneRow()
    patched = copy.deepcopy(plain)
    fastgen.patch(patched)
    x = torch.randn(4, 5)
    _library.run_own_code.cache_clear()
    with caplog.at_level(logging.DEBUG, "fastgen"):
        assert_alike(getattr(plain, method)(x), getattr(patched, method)(x), rtol=0, atol=0)
    assert "parameters of shape (1, 10) for an input of shape (4, 5)" in caplog.text


def test_infinite_parameters_show():
    class Infinite(nn.Module):
        def forward(self, x):
            return x.new_tensor([1.0, torch.inf, 1.0, 1.0]).expand_as(x)

    plain = nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0.0, 0.0, 1.0]), Infinite(), Infinite())
    patched = copy.deepcopy(plain)
    fastgen.patch(patched)
    x = torch.randn(3, 4)
    assert_alike(plain(x), patched(x), equal_nan=True)
    assert patched(x)[0].isnan().sum() == 3


def test_a_net_that_does_not_say_its_width():
    def make():
        return coupling.PiecewiseRationalQuadraticCoupling(
            torch.tensor([0, 1]), lambda a, b: TakesContext(a, b), tails="linear", num_bins=2
        )

    class TakesContext(nn.Linear):
        def forward(self, x, context):
            return super().forward(x)

    plain, patched = pair(make)
    x = torch.randn(5, 2)
    with pytest.warns(UserWarning, match="not scaled down"):
        expected = run(plain, "forward", x)
    with pytest.warns(UserWarning, match="enter their softmax as they are"):
        assert_alike(expected, run(patched, "forward", x))


def real_nvp():
    """The example of normflows' README, smaller."""
    base = nf.distributions.base.DiagGaussian(2)
    flows = []
    for _ in range(4):
        param_map = nf.nets.MLP([1, 8, 8, 2], init_zeros=True)
        flows.append(nf.flows.AffineCouplingBlock(param_map))
        flows.append(nf.flows.Permute(2, mode="swap"))
    return nf.NormalizingFlow(base, flows, nf.distributions.target.TwoMoons())


def spline_flow():
    base = nf.distributions.DiagGaussian(4)
    return nf.NormalizingFlow(base, [Coupled(4, 1, 8), Autoregressive(4, 1, 8)])


@pytest.mark.parametrize("make", [real_nvp, spline_flow])
def test_readme_under_patch(make):
    def losses():
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        values = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model.forward_kld(torch.randn(32, model.q0.d))
            if model.p is not None:
                loss = loss + model.reverse_kld(num_samples=16)
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        samples, log_q = model.sample(8)
        torch.testing.assert_close(model.log_prob(samples), log_q, rtol=1e-3, atol=1e-3)
        return model, [*values, samples, log_q]

    plain, expected = losses()
    with fastgen.patch("normflows") as report:
        assert len(report.replaced) == 8 and not report.left
        patched, actual = losses()
    assert_alike(expected, actual)
    covered = {swap.original for swap in ours.LIBRARY.swaps}
    assert {type(m) for m in plain.modules()} & covered
    assert not {type(m) for m in patched.modules()} & covered
    file = io.BytesIO()
    torch.save(patched.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(patched)
    x = torch.randn(6, plain.q0.d)
    assert_alike([plain.log_prob(x)], [twin.log_prob(x)])


class LogProb(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        return self.flow.log_prob(x)


@pytest.mark.parametrize("make", [real_nvp, spline_flow])
def test_compiles_as_one_graph(make):
    torch.manual_seed(0)
    model = LogProb(make())
    x = torch.randn(6, model.flow.q0.d)
    expected = model(x)
    fastgen.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, **CLOSE[torch.float32])


def test_autoregressive_affine_layer_compiles_as_one_graph():
    """Its inverse does not: the library counts the passes by numpy."""
    plain, patched = pair(masked_autoregressive)
    x = torch.randn(6, 5)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    assert_alike(plain(x), compiled(x))


def test_checkerboard_compiles_as_one_graph():
    flow = nf.flows.AffineCouplingBlock(nf.nets.ConvNet2d((2, 4, 4), (3, 3)), True, "exp", MODES[2])
    x = torch.randn(2, 2, 4, 4)
    expected = flow(x)
    fastgen.patch(flow)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    assert_alike(expected, compiled(x))


@pytest.mark.parametrize(
    "piece",
    [*ours.LIBRARY.swaps, *ours.LIBRARY.functions],
    ids=lambda piece: piece.original.__name__,
)
def test_fingerprints(piece):
    assert _library.fingerprint(piece.original, *piece.relies_on) == piece.fingerprint


@pytest.mark.slow
def test_the_librarys_own_tests():
    """They come with its package; also what a CPU would leave to the library runs fused."""
    code = (
        "import fastgen, pytest, sys\n"
        "from fastgen.integrations import _coupling\n"
        "_coupling.CPU_FROM['AffineCoupling'] = 0\n"
        "fastgen.patch('normflows')\n"
        "sys.exit(pytest.main(['--pyargs', 'normflows', '-q', '-p', 'no:cacheprovider']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
