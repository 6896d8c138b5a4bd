"""affine_coupling: the published formulas, its Jacobian, and safety at large raw scales."""

import math

import numpy as np
import pytest
import torch

from fastgen import ops
from fastgen.ops import _library
from fastgen.testing import backends_here

SCALES = ("exp", "tanh", "sigmoid", "atan", "softplus")
#: scale, min_scale: from the least floor to above 1.
FLOORS = [(s, m) for s in ("sigmoid", "softplus") for m in (1.2e-38, 1e-3, 0.4, 1.0, 7.0)]
#: Instruction sets, of which Triton's interpreter has none, and rows, which it is slow on.
ISAS, ROWS = (
    (("portable",), 5) if _library.triton_interprets else (("portable", "avx2", "avx512"), 77)
)
FORMULAS = {
    "exp": lambda a, f: np.exp(a),
    "tanh": lambda a, f: np.exp(f * np.tanh(a)),
    "sigmoid": lambda a, f: 1 / (1 + np.exp(-(a + 2))),
    "atan": lambda a, f: np.exp(f * 2 / np.pi * np.arctan(a)),
    "softplus": lambda a, f: np.log1p(np.exp(a)),
}


def sample(*shape, dtype=torch.float64, raw=1.0):
    x, raw_scale, shift = (torch.randn(*shape, dtype=dtype) for _ in range(3))
    return x, raw * raw_scale, shift


@pytest.mark.parametrize("scale", SCALES)
def test_is_the_published_formula(scale):
    x, raw, shift = sample(5, 7)
    s = FORMULAS[scale](raw.numpy(), 1.7)
    y, log_det = ops.affine_coupling(x, raw, shift, scale=scale, scale_factor=1.7)
    expected = torch.tensor(s * x.numpy() + shift.numpy())
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(log_det, torch.tensor(np.log(s).sum(1)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("scale", "min_scale"), FLOORS)
def test_is_the_published_formula_with_a_floor(scale, min_scale):
    x, raw, shift = sample(5, 7)
    s = FORMULAS[scale](raw.numpy(), 1.0) + min_scale
    y, log_det = ops.affine_coupling(x, raw, shift, scale=scale, min_scale=min_scale)
    expected = torch.tensor(s * x.numpy() + shift.numpy())
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(log_det, torch.tensor(np.log(s).sum(1)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("inverse", (False, True))
@pytest.mark.parametrize(
    ("scale", "min_scale"), [*((s, 0.0) for s in SCALES), ("sigmoid", 0.1), ("softplus", 1e-3)]
)
def test_log_det_is_that_of_the_jacobian(scale, min_scale, inverse):
    x, raw, shift = sample(1, 6)
    options = {"scale": scale, "min_scale": min_scale, "inverse": inverse}

    def function(t):
        return ops.affine_coupling(t[None], raw, shift, **options)[0][0]

    full = torch.autograd.functional.jacobian(function, x[0])
    assert torch.equal(full, torch.diag(full.diagonal()))
    _, log_det = ops.affine_coupling(x, raw, shift, **options)
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(full)[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_round_trip(scale, dtype):
    x, raw, shift = sample(64, 33, dtype=dtype)
    y, forward = ops.affine_coupling(x, raw, shift, scale=scale)
    back, inverse = ops.affine_coupling(y, raw, shift, scale=scale, inverse=True)
    epsilon = torch.finfo(dtype).eps
    s = (y - shift).abs() / x.abs()
    bound = 8 * epsilon * (x.abs() + (y.abs() + shift.abs()) / s)
    assert ((back - x).abs() <= bound).all()
    torch.testing.assert_close(inverse, -forward, rtol=0, atol=0)


@pytest.mark.parametrize("inverse", (False, True))
@pytest.mark.parametrize("backend", backends_here("affine_coupling"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("magnitude", (100.0, 1e4, 1e30))
def test_bounded_scales_survive_any_raw_value(magnitude, dtype, backend, inverse):
    """tanh and atan bound log s, so value, log-determinant and gradients stay finite."""
    raw = magnitude * torch.tensor([[1.0, -1.0] * 20], dtype=dtype)
    for scale in ("tanh", "atan"):
        inputs = [t.requires_grad_() for t in (torch.randn_like(raw), raw.clone(), raw.clone())]
        results = ops.affine_coupling(*inputs, scale=scale, inverse=inverse, backend=backend)
        grads = torch.autograd.grad(results, inputs, [torch.ones_like(r) for r in results])
        assert all(t.isfinite().all() for t in (*results, *grads))


@pytest.mark.parametrize(("scale", "log_s"), [("sigmoid", -998.0), ("softplus", -1000.0)])
@pytest.mark.parametrize("backend", backends_here("affine_coupling"))
def test_log_det_does_not_underflow(backend, scale, log_s):
    """log sigmoid(a + 2) = a + 2 and log softplus(a) = a far on the left, where the sigmoid and
    softplus themselves are zero in float32."""
    raw = torch.full((1, 16), -1000.0, requires_grad=True)
    x = torch.randn(1, 16)
    y, log_det = ops.affine_coupling(x, raw, x, scale=scale, backend=backend)
    assert torch.equal(y, x)
    torch.testing.assert_close(log_det, torch.tensor([log_s * 16]))
    (grad,) = torch.autograd.grad(log_det.sum(), raw)
    torch.testing.assert_close(grad, torch.ones(1, 16))


def exact_terms(raw, scale, min_scale):
    """log s, d(log s) / d(raw) and s, in float64 but for the last digit or two.

    Where s is near 1, log1p of what it has above 1 keeps what the sum drops.
    """
    a = raw.astype(np.float64) + (2 if scale == "sigmoid" else 0)
    with np.errstate(under="ignore", divide="ignore", invalid="ignore"):
        e = np.exp(-np.abs(a))
        if scale == "sigmoid":
            unfloored = np.where(a < 0, e, 1) / (1 + e)
            log_unfloored = np.minimum(a, 0) - np.log1p(e)
            slope = e / (1 + e) ** 2
            above = np.where(a < 0, unfloored + (min_scale - 1), min_scale - e / (1 + e))
        else:
            unfloored = np.maximum(a, 0) + np.log1p(e)
            log_unfloored = np.where(a < -40, a, np.log(unfloored))
            slope = np.where(a < 0, e, 1) / (1 + e)
            above = unfloored + (min_scale - 1)
        s = unfloored + min_scale
        if min_scale == 0:
            return log_unfloored, np.where(a < -40, 1, slope / s), s
        near = np.abs(above) < 0.5
        return np.where(near, np.log1p(np.where(near, above, 0)), np.log(s)), slope / s, s


@pytest.mark.parametrize("inverse", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("backend", backends_here("affine_coupling"))
@pytest.mark.parametrize(("scale", "min_scale"), [("sigmoid", 0.0), ("softplus", 0.0), *FLOORS])
def test_values_over_the_whole_range(scale, min_scale, backend, dtype, inverse):
    """log s, s and their gradients to rounding, from underflow to far on the right.

    Digits of s that a sum with 1 drops are digits of log s.
    """
    raw = torch.cat([torch.linspace(-90, 90, 721), torch.tensor([-1e30, -1e4, -500, 500, 1e4])])
    raw = raw.to(dtype)[:, None]
    x, leaf = torch.ones_like(raw, requires_grad=True), raw.clone().requires_grad_()
    options = {"scale": scale, "min_scale": min_scale, "inverse": inverse, "backend": backend}
    y, log_det = ops.affine_coupling(x, leaf, torch.zeros_like(raw), **options)
    (slope,) = torch.autograd.grad(log_det.sum(), leaf, retain_graph=True)
    (grad_x,) = torch.autograd.grad(y.sum(), x)
    y, grad_x, slope = (t.detach().double()[:, 0].numpy() for t in (y, grad_x, slope))
    log_det, raw = log_det.detach().double().numpy(), raw[:, 0].double().numpy()
    if inverse:
        log_det, slope = -log_det, -slope
    log_s, expected_slope, s = exact_terms(raw, scale, min_scale)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # What a digit of raw is worth, where log s changes sign and where s is a power of e.
    digit = eps * (1 + np.abs(raw))
    # The reference adds the floor with no care for what a sum near 1 drops.
    dropped = 4 * eps if backend == "reference" and min_scale > 0 else 0.0
    bound = 8 * eps * np.abs(log_s) + 4 * digit * expected_slope + tiny + dropped
    assert (np.abs(log_det - log_s) <= bound).all()
    inside = np.abs(log_s) < -math.log(tiny)
    # Where 1 / s overflows, the gradient of the inverse is that times zero.
    shown = inside if inverse else slice(None)
    bound = 24 * digit * expected_slope + tiny + dropped
    assert (np.abs(slope - expected_slope) <= bound)[shown].all()
    factor = (1 / s if inverse else s)[inside]
    # s as the exponential of its logarithm has an error of log s units of its last digit.
    bound = 8 * eps * (1 + np.abs(log_s[inside])) * factor
    for value in (y, grad_x):
        assert (np.abs(value[inside] - factor) <= bound).all()


@pytest.mark.parametrize("scale", SCALES)
def test_log_det_of_a_long_sample(scale):
    """A million terms add up without losing digits."""
    x, raw, shift = sample(2, 1 << 20, dtype=torch.float32)
    _, log_det = ops.affine_coupling(x, raw + 1, shift, scale=scale)
    _, exact = ops.affine_coupling(
        x.double(), raw.double() + 1, shift.double(), scale=scale, backend="reference"
    )
    torch.testing.assert_close(log_det.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (
            {"x": torch.zeros(())},
            ValueError,
            r"x: expected at least one dimension, \(B, ...\), got",
        ),
        ({"x": torch.zeros(2, 3).long()}, TypeError, "x: expected dtype float32.*, got int64"),
        ({"raw_scale": torch.zeros(2, 4)}, ValueError, r"raw_scale: expected shape \(2, 3\)"),
        ({"shift": torch.zeros(3)}, ValueError, r"shift: expected shape \(2, 3\) .* got \(3,\)"),
        ({"shift": torch.zeros(2, 3).half()}, TypeError, "shift: expected the dtype of x, float32"),
        ({"scale": "softsign"}, ValueError, "scale: expected one of exp, tanh, .* got 'softsign'"),
        ({"scale_factor": 0}, ValueError, "scale_factor: expected a positive number, got 0"),
        ({"scale_factor": math.inf}, ValueError, "scale_factor: expected a positive number"),
        ({"scale_factor": True}, TypeError, "scale_factor: expected a positive number, got bool"),
        ({"min_scale": 1e-3}, ValueError, "min_scale: expected 0 with scale='tanh', .* got 0.001"),
        (
            {"scale": "exp", "min_scale": 1},
            ValueError,
            "min_scale: expected 0 with scale='exp', which has no floor, got 1",
        ),
        (
            {"scale": "sigmoid", "min_scale": -1e-3},
            ValueError,
            "min_scale: expected a finite number >= 0, got -0.001",
        ),
        (
            {"scale": "sigmoid", "min_scale": math.nan},
            ValueError,
            "min_scale: expected a finite number >= 0, got nan",
        ),
        (
            {"scale": "softplus", "min_scale": 1e-39},
            ValueError,
            "min_scale: expected 0 or a normal float32 number, got 1e-39",
        ),
        (
            {"scale": "softplus", "min_scale": "0"},
            TypeError,
            "min_scale: expected a number >= 0, got str",
        ),
    ),
)
def test_errors(change, error, message):
    arguments = {name: torch.zeros(2, 3) for name in ("x", "raw_scale", "shift")}
    with pytest.raises(error, match=f"^{message}"):
        ops.affine_coupling(**{**arguments, **change})


@pytest.mark.parametrize("wrong", ("raw_scale", "shift"))
def test_raw_operator_checks_sizes(wrong):
    tensors = {name: torch.zeros(4, 3) for name in ("x", "raw_scale", "shift")}
    tensors[wrong] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=f"affine_coupling: {wrong} has the wrong"):
        torch.ops.fastgen.affine_coupling_fwd(*tensors.values(), "tanh", False, 1.0, 0.0)


def test_gradient_of_shift_is_not_copied():
    """Forward adds shift, so the gradient of shift is that of y, in the same memory."""
    x, raw, shift = (t.requires_grad_() for t in sample(4, 3))
    y, _ = ops.affine_coupling(x, raw, shift)
    grad_y = torch.randn_like(y)
    _, grad_shift = torch.autograd.grad(y, (x, shift), grad_y)
    assert grad_shift.data_ptr() == grad_y.data_ptr()


def second_of_pairs(t):
    return torch.stack((t + 1, t), -1)[..., 1]


def second_of_pairs_in_longer_rows(t):
    return second_of_pairs(torch.cat((t, t - 1), 1))[:, : t.shape[1]]


LAYOUTS = (
    lambda t: t,
    second_of_pairs,
    second_of_pairs_in_longer_rows,
    torch.Tensor.contiguous,
    torch.Tensor.double,
)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(
    ("scale", "min_scale"), [*((s, 0.0) for s in SCALES), ("sigmoid", 1e-3), ("softplus", 1.0)]
)
def test_rows_of_every_length_in_every_layout(name, scale, min_scale, isa):
    """Rows shorter than a vector share vectors where they follow each other in memory."""
    if not isa(name):
        pytest.skip(f"this machine has no {name}")
    for size in (1, 2, 15, 16, 17, 63, 64, 65, 4097):
        apart = torch.randn(ROWS, 4 * size)
        x, raw, shift, grad_y = apart.chunk(4, 1)
        grad_log_det = torch.randn(ROWS)
        for inverse in (False, True):
            outcomes = []
            for convert in LAYOUTS:
                inputs = [convert(t).detach().requires_grad_() for t in (x, raw, shift)]
                results = ops.affine_coupling(
                    *inputs, scale=scale, min_scale=min_scale, inverse=inverse
                )
                grads = (convert(grad_y), grad_log_det.to(results[1].dtype))
                outcomes.append((*results, *torch.autograd.grad(results, inputs, grads)))
            for *strided, dense, exact in zip(*outcomes, strict=True):
                assert all(torch.equal(t, dense) for t in strided), size
                torch.testing.assert_close(dense.double(), exact, rtol=1e-5, atol=1e-4)
