"""What is special to vq_quantize: the straight-through gradient and the loss by their formulas."""

import pytest
import torch

from fastgen import ops


def inputs(dtype=torch.float64, heads=()):
    x = torch.randn(*heads, 300, 6, dtype=torch.float64).to(dtype).requires_grad_()
    codebook = torch.randn(*heads, 20, 6, dtype=torch.float64).to(dtype).requires_grad_()
    return x, codebook


def chosen(codebook, indices):
    if codebook.dim() == 2:
        return codebook[indices]
    return torch.stack([c[i] for c, i in zip(codebook, indices, strict=True)])


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("heads", ((), (3,)))
def test_values_and_gradients_by_the_formulas(backend, heads):
    x, codebook = inputs(heads=heads)
    result = ops.vq_quantize(
        x, codebook, commitment_weight=0.3, codebook_weight=1.7, backend=backend
    )
    assert torch.equal(result.indices, ops.vq_nearest(x, codebook))
    e = chosen(codebook.detach(), result.indices)
    assert torch.equal(result.quantized, e)
    torch.testing.assert_close(result.loss, 2.0 * (x.detach() - e).square().mean())

    cotangent = torch.randn_like(x)
    total = (result.quantized * cotangent).sum() + 5 * result.loss
    grad_x, grad_codebook = torch.autograd.grad(total, (x, codebook))
    pull = 5 * 2 * (x.detach() - e) / x.numel()
    torch.testing.assert_close(grad_x, cotangent + 0.3 * pull)
    expected = torch.zeros_like(codebook)
    rows = (-1.7 * pull).reshape(-1, 6)
    offsets = torch.arange(len(heads) * 3).reshape(heads + (1,)) * 20 if heads else 0
    expected.view(-1, 6).index_add_(0, (result.indices + offsets).reshape(-1), rows)
    torch.testing.assert_close(grad_codebook, expected)


def second_order(backend, heads, wanted):
    torch.manual_seed(3)
    x, codebook = inputs(heads=heads)
    result = ops.vq_quantize(x, codebook, backend=backend)
    cotangent = torch.randn_like(x).requires_grad_()
    weight = torch.tensor(2.0, dtype=x.dtype, requires_grad=True)
    total = (result.quantized.sin() * cotangent).sum() + weight * result.loss.square()
    first = torch.autograd.grad(total, (x, codebook), create_graph=True)
    penalty = sum(first[i].square().sum() for i in wanted)
    return torch.autograd.grad(penalty, (x, codebook, cotangent, weight), materialize_grads=True)


@pytest.mark.parametrize("heads", ((), (2,)))
@pytest.mark.parametrize("wanted", ((0,), (1,), (0, 1)))
def test_second_order_is_that_of_plain_pytorch(heads, wanted):
    """With stop-gradients, finite differences cannot tell: the mixed derivatives are zero."""
    ours, plain = second_order("cpu", heads, wanted), second_order("reference", heads, wanted)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_of_one_output_alone():
    x, codebook = inputs()
    result = ops.vq_quantize(x, codebook)
    (grad,) = torch.autograd.grad(result.quantized.sum(), x, retain_graph=True)
    assert torch.equal(grad, torch.ones_like(x))
    (grad,) = torch.autograd.grad(result.loss, x)
    e = codebook.detach()[result.indices]
    torch.testing.assert_close(grad, 0.5 * (x.detach() - e) / x.numel())


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_codebook_gets_no_gradient_from_quantized(backend):
    x, codebook = inputs()
    result = ops.vq_quantize(x.detach(), codebook, backend=backend)
    assert not result.quantized.requires_grad and result.loss.requires_grad
    assert not result.indices.requires_grad


def test_half_is_computed_in_float32():
    """Sums of many rows of one code do not stall at half precision."""
    x = torch.ones(8192, 1, dtype=torch.bfloat16)
    codebook = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    result = ops.vq_quantize(x, codebook)
    assert result.loss.dtype == torch.float32 and result.loss.item() == 1.25
    (grad,) = torch.autograd.grad(result.loss, codebook)
    assert grad.item() == -2.0


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_no_rows_have_no_loss(backend):
    codebook = torch.randn(4, 3, requires_grad=True)
    result = ops.vq_quantize(torch.empty(0, 3), codebook, backend=backend)
    assert result.quantized.shape == (0, 3) and result.loss.item() == 0
    (grad,) = torch.autograd.grad(result.loss, codebook)
    assert torch.equal(grad, torch.zeros_like(codebook))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_what_is_not_finite_stays_visible(backend):
    x, codebook = (t.detach().float() for t in inputs())
    x[7, 2], x[9, 1] = float("nan"), float("inf")
    result = ops.vq_quantize(x, codebook, backend=backend)
    assert torch.equal(result.quantized.isnan(), ~x.isfinite())
    assert result.loss.isnan()


def test_raw_backward_refuses_wrong_indices():
    x, codebook = (t.detach() for t in inputs())
    indices = torch.full((300,), 20)
    one = torch.ones((), dtype=x.dtype)
    with pytest.raises(ValueError, match=r"indices: expected values in \[0, 20\), got 20"):
        torch.ops.fastgen.vq_quantize_bwd(x, one, x, codebook, indices, 0.25, 1.0, True)


@pytest.mark.parametrize("name", ("commitment_weight", "codebook_weight"))
def test_weights_are_checked(name):
    x, codebook = (t.detach() for t in inputs())
    with pytest.raises(ValueError, match=rf"^{name}: expected a finite number >= 0, got -1"):
        ops.vq_quantize(x, codebook, **{name: -1.0})
    with pytest.raises(TypeError, match=rf"^{name}: expected a number >= 0, got str"):
        ops.vq_quantize(x, codebook, **{name: "1"})


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("reached", ("quantized", "loss without a codebook term"))
def test_a_codebook_that_no_loss_reaches_gets_no_gradient(backend, reached):
    x, codebook = inputs()
    weight = 1.0 if reached == "quantized" else 0.0
    result = ops.vq_quantize(x, codebook, codebook_weight=weight, backend=backend)
    total = result.quantized.sum() if reached == "quantized" else result.loss
    grad_x, grad_codebook = torch.autograd.grad(
        total, (x, codebook), create_graph=True, allow_unused=True
    )
    assert grad_x is not None and grad_codebook is None
    if reached != "quantized":
        second = torch.autograd.grad(grad_x.square().sum(), (x, codebook), allow_unused=True)
        torch.testing.assert_close(second[0], 2 * grad_x.detach() * 0.5 / x.numel())
        assert second[1] is None
