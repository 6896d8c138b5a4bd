"""Coupling layers: Jacobian, inverse, identity at the start, gradients, state."""

import pytest
import torch
from torch import nn

from fastgen.nn import AffineCoupling, RQSplineCoupling


class Conditioner(nn.Module):
    """A small smooth network, with an optional context that is added to its input."""

    def __init__(self, inputs, outputs, spatial=False):
        super().__init__()
        layer = (lambda i, o: nn.Conv2d(i, o, 3, padding=1)) if spatial else nn.Linear
        self.net = nn.Sequential(layer(inputs, 16), nn.Tanh(), layer(16, outputs))

    def forward(self, x, context=None):
        return self.net(x if context is None else x + context)


def make(kind, channels=6, spatial=False, swap=False, **options):
    first = (channels + 1) // 2
    kept, moved = (channels - first, first) if swap else (first, channels - first)
    each = 2 if kind is AffineCoupling else 3 * options.get("num_bins", 8) - 1
    return kind(Conditioner(kept, each * moved, spatial), swap=swap, **options)


LAYERS = (
    *((AffineCoupling, {"scale": s}) for s in ("exp", "tanh", "sigmoid", "atan", "softplus")),
    (AffineCoupling, {"scale": "sigmoid", "min_scale": 0.1}),
    (AffineCoupling, {"scale": "softplus", "min_scale": 1e-3}),
    (RQSplineCoupling, {}),
    (RQSplineCoupling, {"num_bins": 5, "tail_bound": 1.0}),
)
each_layer = pytest.mark.parametrize(
    ("kind", "options"), LAYERS, ids=[f"{k.__name__}-{tuple(o.values())}" for k, o in LAYERS]
)
each_order = pytest.mark.parametrize("swap", (False, True), ids=("first", "second"))


@each_layer
@each_order
@pytest.mark.parametrize("channels", (2, 5, 6))
def test_log_det_is_that_of_the_jacobian(kind, options, swap, channels):
    layer = make(kind, channels, swap=swap, **options).double()
    x = torch.randn(3, channels, dtype=torch.float64)
    for function in layer.forward, layer.inverse:
        _, log_det = function(x)
        full = torch.func.jacrev(function)(x)[0]
        per_sample = torch.stack([full[i, :, i] for i in range(3)])
        expected = torch.linalg.slogdet(per_sample)[1]
        torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-10)


@each_layer
@each_order
@pytest.mark.parametrize("spatial", (False, True), ids=("vector", "image"))
def test_inverse_undoes_forward(kind, options, swap, spatial):
    layer = make(kind, 5, spatial, swap, **options).double()
    x = torch.randn(4, 5, *((3, 7) if spatial else ()), dtype=torch.float64)
    y, forward = layer(x)
    back, inverse = layer.inverse(y)
    assert y.shape == x.shape and forward.shape == (4,)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse, -forward, rtol=0, atol=1e-9)
    kept = slice(3, None) if swap else slice(None, 3)
    assert torch.equal(y[:, kept], x[:, kept])
    assert not torch.equal(y, x)


@each_layer
def test_image_is_its_pixels(kind, options):
    """A 1x1 image gives what the vector of its channels gives: the parameter layouts agree."""
    torch.manual_seed(1)
    image = make(kind, 6, spatial=True, **options)
    vector = make(kind, 6, **options)
    for ours, theirs in zip(vector.parameters(), image.parameters(), strict=True):
        ours.data = theirs.data[..., 1, 1] if theirs.dim() == 4 else theirs.data
    x = torch.randn(9, 6)
    for a, b in zip(vector(x), image(x[..., None, None]), strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [row for row in LAYERS if row[1].get("scale") not in ("sigmoid", "softplus")],
)
def test_zero_last_layer_is_the_identity(kind, options):
    layer = make(kind, **options)
    nn.init.zeros_(layer.conditioner.net[-1].weight)
    nn.init.zeros_(layer.conditioner.net[-1].bias)
    x = torch.randn(8, 6)
    y, log_det = layer(x)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(8), rtol=0, atol=1e-5)


@each_layer
def test_context_reaches_the_conditioner(kind, options):
    layer = make(kind, **options).double()
    x, context = torch.randn(4, 6).double(), torch.randn(4, 3).double()
    y, log_det = layer(x, context)
    assert not torch.allclose(y, layer(x)[0])
    back, inverse = layer.inverse(y, context)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse, -log_det, rtol=0, atol=1e-9)


@each_layer
def test_every_parameter_gets_a_gradient(kind, options):
    layer = make(kind, **options)
    y, log_det = layer(torch.randn(64, 6))
    (y.square().sum(1) / 2 - log_det).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@each_layer
def test_autocast(kind, options):
    """A conditioner in bfloat16 leaves x and log_det in float32, and near their values."""
    layer, x = make(kind, **options), torch.randn(16, 6)
    expected, exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = layer(x)
    assert y.dtype == torch.float32 and log_det.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0, atol=0.1)
    torch.testing.assert_close(log_det, exact, rtol=0, atol=0.3)


@each_layer
def test_compiles_whole(kind, options):
    torch._dynamo.reset()
    layer = make(kind, **options)
    x = torch.randn(4, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), layer(x), strict=True):
        torch.testing.assert_close(a, b)


def test_state_dict_is_the_conditioners():
    layer = make(RQSplineCoupling)
    assert set(layer.state_dict()) == {f"conditioner.{k}" for k in layer.conditioner.state_dict()}
    other = make(RQSplineCoupling)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(other(x)[0], layer(x)[0])


def test_repr():
    assert "swap=True, scale='atan', scale_factor=2.0" in repr(
        make(AffineCoupling, swap=True, scale="atan", scale_factor=2.0)
    )
    assert "scale='softplus', scale_factor=1.0, min_scale=0.001" in repr(
        make(AffineCoupling, scale="softplus", min_scale=1e-3)
    )
    assert "swap=False, num_bins=5, tail_bound=3.0" in repr(make(RQSplineCoupling, num_bins=5))


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    (
        (AffineCoupling, {"scale": "relu"}, ValueError, "scale: expected one of exp, "),
        (AffineCoupling, {"scale_factor": 0.0}, ValueError, "scale_factor: expected a positive"),
        (AffineCoupling, {"min_scale": 0.1}, ValueError, "min_scale: expected 0 with scale='tanh'"),
        (RQSplineCoupling, {"num_bins": 0}, ValueError, "num_bins: expected"),
        (RQSplineCoupling, {"tail_bound": -1.0}, ValueError, "tail_bound: expected a positive"),
    ),
)
def test_bad_options(kind, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        kind(nn.Identity(), **options)


@pytest.mark.parametrize("shape", ((4,), (4, 1)))
def test_bad_x(shape):
    with pytest.raises(ValueError, match=r"^x: expected \(B, C, \*spatial\) with at least 2"):
        make(AffineCoupling)(torch.randn(shape))


def test_bad_conditioner():
    layer = RQSplineCoupling(nn.Linear(3, 68))
    with pytest.raises(ValueError, match=r"^conditioner: expected output of shape \(4, 69\)"):
        layer(torch.randn(4, 6))
