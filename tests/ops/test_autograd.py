"""What the autograd.Function pairs of the ops share."""

import pytest
import torch

from fastgen import ops


def coupling(x, scale, shift):
    return sum(r.square().sum() for r in ops.affine_coupling(x, scale, shift))


@pytest.fixture
def tensors():
    return torch.randn(3, 4, 5, dtype=torch.float64).unbind(0)


def test_tensors_that_outlive_a_transform(tensors):
    """torch.func leaves wrappers behind, which autograd must not record."""
    kept = []

    def leak(x):
        kept.append(x)
        return x.sum()

    x, scale, shift = tensors
    torch.func.grad(leak)(x)
    scale.requires_grad_()
    (actual,) = torch.autograd.grad(coupling(kept[0], scale, shift), scale)
    (expected,) = torch.autograd.grad(coupling(x, scale, shift), scale)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_pullbacks_that_outlive_their_transform(tensors):
    x, scale, shift = tensors
    value, pullback, *_ = torch.func.vjp(coupling, x, scale, shift)
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(coupling(*leaves), leaves)
    for a, b in zip(pullback(torch.ones_like(value)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compiled", (False, True))
def test_gradients_pass_through_vmap(tensors, compiled):
    """A vmapped tensor does not require grad; what it wraps may, at any depth."""

    def function(*leaves):
        return torch.vmap(torch.vmap(lambda *t: coupling(*(v[None] for v in t))))(*leaves).sum()

    transformed = torch.func.grad(function, (0, 1, 2))
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(coupling(*(t.flatten()[:, None] for t in leaves)), leaves)
    if compiled:
        function, transformed = (
            torch.compile(f, backend="aot_eager", fullgraph=True) for f in (function, transformed)
        )
    for actual in torch.autograd.grad(function(*leaves), leaves), transformed(*tensors):
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_second_order_of_a_jacobian(tensors):
    """The way that the README names: `is_grads_batched` with `create_graph` has none."""
    _, scale, shift = tensors

    def results(x):
        return ops.affine_coupling(x, scale, shift)[0].tanh().sum(1)

    x = tensors[0].clone().requires_grad_()
    rows = [torch.autograd.grad(y, x, create_graph=True)[0] for y in results(x)]
    (expected,) = torch.autograd.grad(torch.stack(rows).square().sum(), x)
    jacobian = torch.func.jacrev(results)(x)
    torch.testing.assert_close(jacobian, torch.stack(rows))
    (actual,) = torch.autograd.grad(jacobian.square().sum(), x)
    torch.testing.assert_close(actual, expected)
    batched, one = results(x), torch.eye(4, dtype=x.dtype)
    (batched,) = torch.autograd.grad(batched, x, one, is_grads_batched=True)
    torch.testing.assert_close(batched, jacobian)


def test_constants_take_no_part_in_autograd():
    x, codebook = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    for backend in "cpu", "reference":
        _, distance = ops.vq_nearest(x, codebook, return_distance=True, backend=backend)
        assert not distance.requires_grad and distance.grad_fn is None
        _, distance = torch.func.vmap(
            lambda rows, backend=backend: ops.vq_nearest(
                rows, codebook, return_distance=True, backend=backend
            )
        )(x.expand(2, 4, 3))
        assert not distance.requires_grad
        zero = torch.func.grad(
            lambda rows, backend=backend: (
                ops.vq_nearest(rows, codebook, return_distance=True, backend=backend)[1].sum()
                + 0 * rows.sum()
            )
        )(x)
        assert torch.equal(zero, torch.zeros_like(x))
