"""Reversible chains: the gradients of plain backward, in memory that does not grow with depth."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgen.nn import AffineCoupling, InvertibleChain, RQSplineCoupling, VolumePreserving
from fastgen.nn.reversible import Invertible


class Flip(VolumePreserving):
    """Reverses the order of the channels."""

    def rearrange(self, x):
        return x.flip(1)

    restore = rearrange


class Shift(Invertible):
    """A layer that leaves `remember` and `unwind` as they are: y = x exp(scale) + shift."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(0.1 * torch.randn(dim))
        self.shift = nn.Parameter(torch.randn(dim))

    def forward(self, x):
        return x * self.scale.exp() + self.shift, self.scale.sum().expand(len(x))

    def inverse(self, y):
        return (y - self.shift) * (-self.scale).exp(), -self.scale.sum().expand(len(y))


def conditioner(dim, each):
    net = nn.Sequential(nn.Linear(dim, 16), nn.SiLU(), nn.Linear(16, each * dim))
    # gains that keep the states of 20 layers of the order of 1
    nn.init.normal_(net[-1].weight, std=0.12)
    return net


def affine(swap=False, dim=6, **options):
    return AffineCoupling(conditioner(dim // 2, 2), swap=swap, **options)


def floored(swap=False, dim=6):
    return affine(swap, dim, scale="softplus", min_scale=0.5)


def spline(swap=False, dim=6):
    return RQSplineCoupling(conditioner(dim // 2, 14), num_bins=5, swap=swap)


def couplings(make, count):
    return [make(i % 2 == 1) for i in range(count)]


CHAINS = {
    "affine": lambda: couplings(affine, 5),
    "affine with a floor": lambda: couplings(floored, 5),
    "spline": lambda: couplings(spline, 5),
    "mixed": lambda: [affine(), Flip(), spline(True), Shift(6), spline(), Flip(), affine(True)],
    "default": lambda: [Shift(6), Shift(6)],
    "rearrangement": lambda: [Flip(), affine()],
    "nothing": lambda: [Flip()],
}
each_chain = pytest.mark.parametrize("layers", CHAINS.values(), ids=list(CHAINS))


def pair(layers, **options):
    """The same layers in a plain and in a reversible chain."""
    torch.manual_seed(0)
    plain = InvertibleChain(layers())
    return plain, InvertibleChain(plain.layers, reversible=True, **options)


def gradients(function, x, parameters):
    """Of a loss in which every element of y and log_det has a weight of its own."""
    x = x.clone().requires_grad_()
    y, log_det = function(x)
    weight = torch.arange(1, y.numel() + 1, dtype=y.dtype).view_as(y).sin()
    loss = (y.square() * weight).sum() + (log_det * torch.arange(1.0, len(x) + 1)).sum()
    grads = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    return [y, log_det, *(g for g in grads if g is not None)]


def assert_same(first, second, **tolerance):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@each_chain
@pytest.mark.parametrize("anchor_every", (1, 2, 16))
def test_gradients_are_those_of_plain_backward(layers, anchor_every):
    plain, reversible = (chain.double() for chain in pair(layers, anchor_every=anchor_every))
    x, parameters = torch.randn(7, 6, dtype=torch.float64), list(plain.parameters())
    expected = gradients(plain, x, parameters)
    assert len(expected) == 3 + len(parameters)
    assert_same(gradients(reversible, x, parameters), expected, rtol=1e-8, atol=1e-9)


def test_float32_keeps_its_digits_over_many_layers():
    """40 couplings: rounding in what is rebuilt, not its sum over layers."""
    plain, reversible = pair(lambda: couplings(affine, 40))
    x, parameters = torch.randn(64, 6), list(plain.parameters())
    expected = gradients(plain, x, parameters)[2:]
    for found, want in zip(gradients(reversible, x, parameters)[2:], expected, strict=True):
        assert (found - want).norm() < 1e-4 * want.norm()


def test_anchors_stop_the_drift():
    """The state that is kept is forward's own: of the last layer before it nothing is rebuilt."""
    plain, reversible = pair(lambda: couplings(affine, 6), anchor_every=1)
    seen, expected = [], []
    x = torch.randn(5, 6)
    with torch.no_grad():
        y = x
        for layer in plain:
            expected.append(y := layer(y)[0])

    def record(layer):
        unwind = layer.unwind
        layer.unwind = lambda y, *rest: (seen.append(y), unwind(y, *rest))[1]

    for layer in reversible:
        record(layer)
    gradients(reversible, x, [])
    assert all(torch.equal(a, b) for a, b in zip(reversed(seen), expected, strict=True))


def test_a_parameter_without_effect():
    """A parameter that no output depends on gets none."""
    chain = InvertibleChain([Shift(6), affine()], reversible=True)
    chain.layers[1].unused = nn.Parameter(torch.ones(3))
    chain(torch.randn(4, 6))[0].sum().backward()
    assert chain.layers[1].unused.grad is None and chain.layers[0].shift.grad is not None


def test_splines_lose_nothing():
    """Steep splines, whose inverse would: their moved half is kept, so x comes back bit for bit."""
    torch.manual_seed(0)
    chain = InvertibleChain(couplings(spline, 4), reversible=True)
    for layer in chain:
        layer.conditioner[-1].weight.data *= 20
    x, states = 2 * torch.randn(64, 6), []
    memories = []
    with torch.no_grad():
        y = x
        for layer in chain:
            states.append(y)
            y, _, memory = layer.remember(y)
            memories.append(memory)
    for layer, memory, state in reversed(list(zip(chain, memories, states, strict=True))):
        cotangents = (torch.ones_like(y), torch.ones(len(y)))
        y, _, _ = layer.unwind(y, memory, cotangents, list(layer.parameters()))
        assert torch.equal(y, state)


@pytest.mark.parametrize("count", (2, 3))
def test_a_layer_used_more_than_once(count):
    """In one chain, and by another chain before the backward of both."""
    torch.manual_seed(0)
    shared = [affine(), spline(True)]
    x, parameters = torch.randn(7, 6).double(), [p for m in shared for p in m.parameters()]

    def twice(reversible):
        first = InvertibleChain(shared * count, reversible=reversible).double()
        second = InvertibleChain([affine_alone, *shared], reversible=reversible).double()

        def function(x):
            y, one = first(x)
            z, two = second(y)
            return z, one + two

        return function

    affine_alone = affine().double()
    found = gradients(twice(True), x, parameters)
    assert_same(found, gradients(twice(False), x, parameters), rtol=1e-8, atol=1e-9)


def test_accumulation():
    _, chain = pair(CHAINS["mixed"])
    chain.double()
    x = torch.randn(8, 6, dtype=torch.float64)

    def backward(parts):
        chain.zero_grad()
        for part in parts:
            y, log_det = chain(part)
            (y.square().sum() - log_det.sum()).backward()
        return [p.grad.clone() for p in chain.parameters()]

    assert_same(backward(x.split(2)), backward([x]))


def test_frozen_parameters():
    plain, reversible = pair(CHAINS["mixed"])
    for parameter in [*plain.layers[0].parameters(), plain.layers[3].shift]:
        parameter.requires_grad_(False)
    x = torch.randn(5, 6)
    for chain in (plain, reversible):
        chain.zero_grad()
        y, log_det = chain(x)
        (y.square().sum() + log_det.sum()).backward()
        grads = {name: p.grad for name, p in chain.named_parameters()}
        for name, grad in grads.items():
            frozen = name.startswith("layers.0.") or name == "layers.3.shift"
            assert (grad is None) == frozen, name
        if chain is plain:
            expected = {name: None if g is None else g.clone() for name, g in grads.items()}
    for name, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)


def test_all_frozen_still_gives_the_input_its_gradient():
    plain, reversible = (chain.requires_grad_(False).double() for chain in pair(CHAINS["mixed"]))
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_same(gradients(reversible, x, []), gradients(plain, x, []), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("outside", (False, True), ids=("around forward", "around backward too"))
@pytest.mark.parametrize("layers", (CHAINS["affine"], CHAINS["spline"]), ids=("affine", "spline"))
def test_autocast(layers, outside):
    """The conditioners run again in bfloat16, as they did, wherever backward is called."""
    plain, reversible = pair(layers)
    x, parameters = torch.randn(64, 6), list(plain.parameters())
    dtypes = []
    for module in reversible.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))

    def step(chain):
        chain.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y, log_det = chain(x)
            loss = (y.square().sum(1) - log_det).mean()
            if outside:
                loss.backward()
        if not outside:
            loss.backward()
        return [p.grad.clone() for p in parameters]

    expected = step(plain)
    dtypes.clear()
    found = step(reversible)
    assert len(dtypes) == 2 * 2 * len(reversible.layers) and set(dtypes) == {torch.bfloat16}
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_backward_in_autocast_of_a_forward_outside():
    """The conditioners run again in float32, as they did."""
    plain, reversible = pair(CHAINS["affine"])
    x, parameters = torch.randn(64, 6), list(plain.parameters())
    expected = gradients(plain, x, parameters)[2:]
    y, log_det = reversible(x.requires_grad_())
    weight = torch.arange(1.0, y.numel() + 1).view_as(y).sin()
    loss = (y.square() * weight).sum() + (log_det * torch.arange(1.0, len(x) + 1)).sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, [x, *parameters])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()


def test_autocast_with_a_parameter_used_outside_the_chain():
    """The chain's forward has no graph; a cast that it cached would cut the other use's off."""
    plain, reversible = pair(CHAINS["affine"])
    x, parameters = torch.randn(64, 6), list(plain.parameters())
    linear = plain.layers[0].conditioner[0]

    def grads(chain):
        with torch.autocast("cpu", torch.bfloat16):
            y, log_det = chain(x)
            return torch.autograd.grad(
                y.square().mean() - log_det.mean() + linear(x[:, :3]).float().square().mean(),
                parameters,
            )

    for a, b in zip(grads(reversible), grads(plain), strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_weights_changed_before_backward_are_an_error():
    _, chain = pair(CHAINS["affine"])
    y, _ = chain(torch.randn(5, 6))
    with torch.no_grad():
        next(chain.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_recorded_without_gradients():
    plain, reversible = pair(CHAINS["mixed"])
    x = torch.randn(5, 6)
    with torch.no_grad():
        assert_same(reversible(x), plain(x), rtol=0, atol=0)
    reversible.requires_grad_(False)
    y, log_det = reversible(x)
    assert not y.requires_grad and not log_det.requires_grad
    back, undone = reversible.inverse(y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(undone, -log_det, rtol=0, atol=1e-4)


PEAKS = """
import torch
from torch import nn
from benchmarks.memory import peak_bytes
from fastgen.nn import AffineCoupling, InvertibleChain

def layer(swap):
    net = nn.Sequential(nn.Linear(32, 128), nn.SiLU(), nn.Linear(128, 64))
    nn.init.normal_(net[-1].weight, std=0.04)
    return AffineCoupling(net, swap=swap)

def peak(layers, reversible):
    chain = InvertibleChain([layer(i % 2 == 1) for i in range(layers)], reversible=reversible)
    x = torch.randn(8192, 64)

    def step():
        y, log_det = chain(x)
        (y.square().sum(1) - log_det).mean().backward()

    step()
    return peak_bytes(step, x.device)

torch.set_num_threads(1)
for reversible in (True, False):
    print(*(peak(layers, reversible) for layers in (4, 32)))
"""


def test_memory():
    """32 couplings take at most 1.3 times what 4 take; plain backward keeps what each layer made.

    Activations dwarf weights here: 8192 samples of width 128, a layer has 12,000 weights. Large
    tensors get pages of their own, so that the figures are not those of a fragmented heap.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAKS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    (few, many), (few_plain, many_plain) = (
        map(float, row.split()) for row in done.stdout.splitlines()
    )
    if few != few:
        pytest.skip("this system does not tell the high-water mark of memory")
    assert many <= 1.3 * few
    assert many_plain > 4 * few_plain


def test_a_chain_in_a_reversible_chain_is_refused():
    inner = InvertibleChain(couplings(affine, 2))
    plain = InvertibleChain([Shift(6), inner])
    x = torch.randn(3, 6)
    torch.testing.assert_close(plain.inverse(plain(x)[0])[0], x, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"layers\.1 is InvertibleChain"):
        InvertibleChain([Shift(6), inner], reversible=True)


def test_bad_anchor_every():
    with pytest.raises(ValueError, match="anchor_every: expected a positive int, got 0"):
        InvertibleChain([], anchor_every=0)
    with pytest.raises(TypeError, match="anchor_every: expected a positive int, got str"):
        InvertibleChain([], anchor_every="x")


def test_state_dict_and_repr():
    plain, reversible = pair(CHAINS["mixed"], anchor_every=3)
    assert set(plain.state_dict()) == set(reversible.state_dict())
    assert "layers.0.conditioner.0.weight" in plain.state_dict()
    assert "reversible=True, anchor_every=3" in repr(reversible)
