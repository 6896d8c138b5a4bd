import pytest
import torch
from torch.nn.functional import instance_norm

from fastgen import backends, nn


@pytest.mark.parametrize("spatial", ((7,), (4, 5), (2, 3, 4)))
def test_formula(spatial):
    layer = nn.AdaIN(5, 3)
    x, w = torch.randn(2, 3, *spatial), torch.randn(2, 5)
    scale, shift = (w @ layer.affine.weight.T + layer.affine.bias).view(2, 2, 3).unbind(1)
    per_plane = (2, 3, *(1,) * len(spatial))
    expected = instance_norm(x) * scale.view(per_plane) + shift.view(per_plane)
    backends.reset_calls()
    torch.testing.assert_close(layer(x, w), expected)
    assert backends.calls() == {("adain", "cpu"): 1}


def test_a_style_of_zeros_only_normalises_at_first():
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(nn.AdaIN(5, 3)(x, torch.zeros(2, 5)), instance_norm(x))


def test_state_dict():
    state = nn.AdaIN(5, 3).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "affine.weight": (6, 5),
        "affine.bias": (6,),
    }
    other = nn.AdaIN(5, 3)
    other.load_state_dict(state)
    assert torch.equal(other.affine.weight, state["affine.weight"])


def test_first_and_second_order_gradients():
    layer = nn.AdaIN(3, 2, dtype=torch.float64)
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, (x, w))
    torch.autograd.gradgradcheck(layer, (x, w))
    layer(x, w).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_under_autocast():
    layer = nn.AdaIN(5, 3)
    x, w = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16(), w).dtype == torch.bfloat16
        y = layer(x, w)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(x, w), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "x,w,error,message",
    (
        ([1.0], torch.ones(2, 5), TypeError, "x: expected a Tensor, got list"),
        (torch.ones(2, 3, 4), 1.0, TypeError, "w: expected a Tensor, got float"),
        (
            torch.ones(2, 4, 4),
            torch.ones(2, 5),
            ValueError,
            r"x: expected shape \(B, 3, \*spatial\), got \(2, 4, 4\)",
        ),
        (
            torch.ones(2, 3, 4),
            torch.ones(3, 5),
            ValueError,
            r"w: expected shape \(2, 5\) \(batch of x, style_dim\), got \(3, 5\)",
        ),
    ),
)
def test_bad_input(x, w, error, message):
    with pytest.raises(error, match=message):
        nn.AdaIN(5, 3)(x, w)


def test_repr():
    assert "style_dim=5, num_features=3, eps=1e-05" in repr(nn.AdaIN(5, 3))
