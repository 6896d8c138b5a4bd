"""A reversible chain runs its layers again in backward: as they ran, or not at all.

What is expected is always a plain chain's result for the same layers, weights and seed.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize, weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrizations import weight_norm as new_weight_norm
from torch.utils.checkpoint import checkpoint

from fastgen.models.flow_layers import FlowBatchNorm, Permutation, Standardize
from fastgen.nn import (
    AffineCoupling,
    Dropout,
    Invertible,
    InvertibleChain,
    RQSplineCoupling,
    keyed_dropout,
)

DIM = 6


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Checkpointed(nn.Module):
    def __init__(self, net, reentrant):
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


class WithDropout(Invertible):
    """y = x exp(s) + t of the other half, with dropout; `unwind` is left as it is."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.BatchNorm1d(6))

    def forward(self, x):
        kept, moved = x.chunk(2, 1)
        s, t = self.net(kept).tanh().chunk(2, 1)
        return torch.cat((kept, moved * s.exp() + t), 1), s.sum(1)

    def inverse(self, y):
        kept, moved = y.chunk(2, 1)
        s, t = self.net(kept).tanh().chunk(2, 1)
        return torch.cat((kept, (moved - t) * (-s).exp()), 1), -s.sum(1)


class ActNorm(Invertible):
    """Takes its parameters from the first batch, as Glow does."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.zeros(DIM)) for _ in range(2))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x):
        if not self.ready:
            with torch.no_grad():
                self.shift.copy_(x.mean(0))
                self.scale.copy_(x.std(0).log())
                self.ready.fill_(True)
        return (x - self.shift) * (-self.scale).exp(), -self.scale.sum().expand(len(x))

    def inverse(self, y):
        return y * self.scale.exp() + self.shift, self.scale.sum().expand(len(y))


def net(*between, wrap=lambda linear: linear, outputs=DIM):
    made = nn.Sequential(wrap(nn.Linear(3, 16)), nn.SiLU(), *between, wrap(nn.Linear(16, outputs)))
    for linear in made:
        if isinstance(linear, nn.Linear) and not parametrize.is_parametrized(linear):
            nn.init.normal_(linear.bias, std=0.1)
    return made


CONDITIONERS = {
    "plain": net,
    "dropout": lambda: net(nn.Dropout(0.3)),
    "two dropouts": lambda: net(nn.Dropout(0.3), nn.AlphaDropout(0.2)),
    "RReLU": lambda: net(nn.RReLU()),
    "functional dropout": lambda: net(Function(lambda x: F.dropout(x, 0.3))),
    "noise": lambda: net(Function(lambda x: x + 0.1 * torch.randn_like(x))),
    "batch norm": lambda: net(nn.BatchNorm1d(16)),
    "cumulative batch norm": lambda: net(nn.BatchNorm1d(16, momentum=None)),
    "spectral norm": lambda: net(wrap=spectral_norm),
    "old spectral norm": lambda: net(wrap=old_spectral_norm),
    "weight norm": lambda: net(wrap=new_weight_norm),
    "checkpoint": lambda: Checkpointed(net(nn.Dropout(0.3)), reentrant=False),
}
OLD = pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.*deprecated:FutureWarning")
each_conditioner = pytest.mark.parametrize(
    "make", CONDITIONERS.values(), ids=[name.replace(" ", "-") for name in CONDITIONERS]
)


def couplings(make, count=4):
    return [AffineCoupling(make(), swap=i % 2 == 1) for i in range(count)]


CHAINS = {
    "affine": lambda: couplings(net),
    "spline": lambda: [
        RQSplineCoupling(net(outputs=42), num_bins=5, swap=i % 2 == 1) for i in range(3)
    ],
    "dropout in a layer of its own": lambda: [WithDropout(), *couplings(net, 2), WithDropout()],
    "flow batch norm": lambda: [*couplings(net, 2), FlowBatchNorm(DIM), *couplings(net, 2)],
    "fixed": lambda: [Standardize(DIM), *couplings(net, 2), Permutation(torch.randperm(DIM))],
    "of torch alone": lambda: [WithDropout(), ActNorm(), WithDropout(), Standardize(DIM)],
    "starts from the data": lambda: [ActNorm(), *couplings(net, 2), ActNorm()],
}
each_chain = pytest.mark.parametrize(
    "layers", CHAINS.values(), ids=[name.replace(" ", "-") for name in CHAINS]
)


def pair(layers, **options):
    """A plain and a reversible chain of equal layers that share nothing."""
    return [made(layers, reversible=reversible, **options).double() for reversible in (False, True)]


def made(layers, **options):
    torch.manual_seed(0)
    return InvertibleChain(layers(), **options)


def warmed(chain):
    """With statistics of another batch."""
    torch.manual_seed(5)
    with torch.no_grad():
        chain.train()(3 * batch() + 1)
    return chain


def batch(count=9):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, DIM, dtype=torch.float64, generator=generator, requires_grad=True)


def weighted(y, log_det):
    weight = torch.arange(1, y.numel() + 1, dtype=y.dtype).view_as(y).sin()
    return (y.sin() * weight).sum() + (log_det * torch.arange(1.0, len(y) + 1)).sum()


def named_gradients(chain, x):
    return {"x": x.grad} | {name: p.grad for name, p in chain.named_parameters()}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(
                found[name],
                value,
                msg=lambda m, n=name: f"{n}: {m}",
                **{"rtol": 1e-7, "atol": 1e-9} | tolerance,
            )


def results(chain, step, **options):
    """Of `step(chain, x)`: gradients, the buffers afterwards, and where the generator stands."""
    torch.manual_seed(1)
    x = batch(**options)
    step(chain, x)
    found = named_gradients(chain, x)
    found |= {f"buffer {name}": buffer for name, buffer in chain.named_buffers()}
    return found | {"next number": torch.rand(1)}


def first_order(chain, x):
    weighted(*chain(x)).backward()


def second_order(chain, x):
    """A gradient penalty with a constant cotangent, beside the loss."""
    y, log_det = chain(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    (weighted(y, log_det) + grad.square().sum() * 3).backward()


def third_order(chain, x):
    (grad,) = torch.autograd.grad(weighted(*chain(x)), x, create_graph=True)
    (grad,) = torch.autograd.grad(grad.square().sum(), x, create_graph=True)
    grad.square().sum().backward()


def several(chain, x):
    """Two forwards before a backward, each used twice, and two steps."""
    for _ in range(2):
        first, second = weighted(*chain(x)), weighted(*chain(x + 1))
        second.backward(retain_graph=True)
        (first + second).backward()


each_step = pytest.mark.parametrize(
    "step", [first_order, second_order, third_order, several], ids=lambda step: step.__name__
)


@OLD
@each_step
@each_conditioner
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_conditioners_that_move_and_draw(make, step, training):
    plain, reversible = (warmed(c).train(training) for c in pair(lambda: couplings(make)))
    assert_same(results(reversible, step), results(plain, step))


@each_step
@each_chain
@pytest.mark.parametrize("anchor_every", [1, 2, 16])
def test_layers_that_move_and_draw(layers, step, anchor_every):
    plain, reversible = pair(layers, anchor_every=anchor_every)
    assert_same(results(reversible, step), results(plain, step), rtol=1e-6, atol=1e-8)


@OLD
@pytest.mark.parametrize("wrap", [weight_norm, old_spectral_norm, spectral_norm])
def test_second_order_in_parameters(wrap):
    """Gradients of a gradient in the parameters, whose hooks run once."""

    def step(chain, x):
        for p in chain.parameters():
            p.register_hook(lambda grad: 2 * grad)
        parameters = list(chain.parameters())
        grads = torch.autograd.grad(weighted(*chain(x)), parameters, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()

    plain, reversible = pair(lambda: couplings(lambda: net(wrap=wrap), 2))
    assert_same(results(reversible, step), results(plain, step))


def test_a_penalty_on_part_of_what_is_learned():
    """x without a gradient, and frozen weights; `create_graph` without a second derivative."""

    def step(chain, x):
        chain.layers[1].requires_grad_(False)
        last = list(chain.layers[3].parameters())
        grads = torch.autograd.grad(weighted(*chain(x.detach())), last, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        weighted(*chain(x.detach())).backward(create_graph=True)

    with pytest.warns(UserWarning, match="create_graph=True"):
        plain, reversible = pair(CHAINS["affine"])
        found, expected = results(reversible, step), results(plain, step)
    assert_same(found, expected)


def test_a_layer_that_remembers_must_say_how_to_replay():
    class Remembers(AffineCoupling):
        def remember(self, x):
            return *self(x), (x.chunk(2, 1)[1],)

    chain = InvertibleChain([Remembers(net())], reversible=True).double()
    x = batch()
    weighted(*chain(x)).backward()
    with pytest.raises(NotImplementedError, match="Remembers: expected a replay"):
        second_order(chain, x)


def test_batched_cotangents():
    """torch.autograd's vmap over backward."""
    plain, reversible = pair(CHAINS["flow batch norm"])
    x = batch()

    def rows(chain, **options):
        y, _ = chain(x)
        cotangents = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        learned = [x, *chain.parameters()]
        grads = torch.autograd.grad(
            y, learned, cotangents, is_grads_batched=True, allow_unused=True, **options
        )
        return dict(enumerate(grads))

    assert_same(rows(reversible), rows(plain))

    def one(chain, cotangent):
        return torch.autograd.grad(chain_of_x[chain][0], x, cotangent, retain_graph=True)[0]

    chain_of_x = {chain: chain.eval()(x) for chain in (plain, reversible)}
    cotangents = torch.randn(3, *x.shape, dtype=x.dtype)
    found, expected = (
        torch.func.vmap(lambda cotangent, c=c: one(c, cotangent))(cotangents) for c in chain_of_x
    )
    torch.testing.assert_close(found, expected)

    def jacobian(chain):
        return torch.autograd.functional.jacobian(lambda x: chain(x)[0], x, vectorize=True)

    torch.testing.assert_close(jacobian(reversible.eval()), jacobian(plain.eval()))


def replacements(chain):
    """Other values for all parameters and floating buffers, with a history."""
    source = torch.full((), 1.1, dtype=torch.float64, requires_grad=True)
    state = {
        name: tensor.detach() * source
        for name, tensor in [*chain.named_parameters(), *chain.named_buffers()]
        if tensor.is_floating_point()
    }
    return source, state


@OLD
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ["affine", "fixed", "flow batch norm", "spectral norm"])
@pytest.mark.parametrize("order", [1, 2])
def test_functional_call(name, training, order):
    """Parameters and buffers that the chain has during the call alone, and the way behind them."""

    def layers():
        return CHAINS[name]() if name in CHAINS else couplings(CONDITIONERS[name])

    found = []
    for chain in pair(layers):
        chain.train(training)
        source, state = replacements(chain)
        if training:  # what forward moves cannot have a history
            moved = {key for key, _ in chain.named_buffers()} & state.keys()
            state |= {key: state[key].detach().clone() for key in moved}
        for tensor in state.values():
            if tensor.requires_grad:
                tensor.retain_grad()
        x, before = batch(), {key: chain.state_dict()[key].clone() for key in state}
        y, log_det = functional_call(chain, state, (x,))
        loss = weighted(y, log_det)
        if order == 2:
            (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            loss = loss + grad.square().sum()
        loss.backward()
        assert all(p.grad is None for p in chain.parameters())
        assert_same({key: chain.state_dict()[key] for key in state}, before, rtol=0, atol=0)
        grads = {key: tensor.grad for key, tensor in state.items() if tensor.requires_grad}
        found.append(grads | {"x": x.grad, "source": source.grad})
    assert_same(found[1], found[0])


def func_gradients(chain, x):
    parameters = dict(chain.named_parameters())

    def loss(parameters, x):
        return weighted(*functional_call(chain, parameters, (x,)))

    def outputs(x):
        return chain(x)[0]

    _, pullback = torch.func.vjp(outputs, x)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    return [
        torch.func.grad(loss, argnums=(0, 1))(parameters, x),
        pullback(torch.ones_like(x)),
        torch.func.jacrev(outputs)(x),
        torch.func.jacrev(torch.func.grad(lambda x: weighted(*chain(x))))(x[:2]),
        per_sample(parameters, x[:, None]),
    ]


@pytest.mark.parametrize("name", ["affine", "fixed", "of torch alone"])
def test_torch_func(name):
    plain, reversible = (warmed(chain).eval() for chain in pair(CHAINS[name]))
    x = batch().detach()
    torch.testing.assert_close(func_gradients(reversible, x), func_gradients(plain, x))


@pytest.mark.parametrize("name", ["affine", "of torch alone"])
def test_backward_through_vmap(name):
    plain, reversible = (warmed(chain).eval() for chain in pair(CHAINS[name]))
    found = []
    for chain in (plain, reversible):
        x = batch()
        torch.vmap(lambda row, c=chain: weighted(*c(row)))(x[:, None]).sum().backward()
        found.append(named_gradients(chain, x))
    assert found[1]["x"].abs().sum() > 0
    assert_same(found[1], found[0])


@pytest.mark.usefixtures("forward_mode")
def test_forward_mode():
    x = batch().detach()
    for chain in pair(CHAINS["of torch alone"]):
        warmed(chain).eval()
        with forward_ad.dual_level():
            y, _ = chain(forward_ad.make_dual(x, torch.ones_like(x)))
            tangent = forward_ad.unpack_dual(y).tangent
        _, expected = torch.func.jvp(lambda x, c=chain: c(x)[0], (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, expected)
        torch.testing.assert_close(tangent.sum(), torch.func.jacrev(chain)(x)[0].sum())


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_a_checkpoint(reentrant):
    def step(chain, x):
        def part(x):
            return chain(x)

        weighted(*checkpoint(part, x, use_reentrant=reentrant)).backward()

    plain, reversible = pair(lambda: couplings(CONDITIONERS["dropout"]))
    assert_same(results(reversible, step), results(plain, step))


def test_a_reentrant_checkpoint_inside_is_pytorchs_own_error():
    chain = InvertibleChain(
        [AffineCoupling(Checkpointed(net(), reentrant=True))], reversible=True
    ).double()
    y, log_det = chain(batch())
    with pytest.raises(RuntimeError, match="torch.utils.checkpoint is incompatible"):
        weighted(y, log_det).backward()


def test_saved_tensors_that_hooks_move():
    def step(chain, x):
        with torch.autograd.graph.save_on_cpu():
            loss = weighted(*chain(x))
        loss.backward()

    plain, reversible = pair(CHAINS["spline"], anchor_every=2)
    assert_same(results(reversible, step), results(plain, step))


@pytest.mark.parametrize("order", [first_order, second_order])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_modes_that_flip_before_backward(training, order):
    """What ran in one mode is rebuilt in it, and the modules are left in the new one."""

    def layers():
        nets = lambda: net(nn.Dropout(0.3), nn.BatchNorm1d(16), nn.RReLU())  # noqa: E731
        return [*couplings(nets, 2), FlowBatchNorm(DIM), WithDropout()]

    class Flipping(nn.Module):
        def __init__(self, chain):
            super().__init__()
            self.chain = chain

        def forward(self, x):
            out = self.chain.train(training)(x)
            self.chain.train(not training)
            return out

    def step(chain, x):
        order(Flipping(chain), x)
        assert all(module.training != training for module in chain.modules())

    plain, reversible = (warmed(chain) for chain in pair(layers))
    found, expected = results(reversible, step), results(plain, step)
    assert_same(found, expected, rtol=1e-6, atol=1e-8)


def test_buffers_that_change_before_backward():
    """Such as by a batch in training mode between an evaluation and its backward."""

    def step(chain, x):
        loss = weighted(*chain.eval()(x))
        with torch.no_grad():
            chain.train()(5 * x + 2)
        loss.backward()

    plain, reversible = pair(CHAINS["flow batch norm"])
    assert_same(results(reversible, step), results(plain, step))
    _, reversible = pair(CHAINS["fixed"])
    expected = results(copy.deepcopy(reversible), first_order)

    def refitted(chain, x):
        loss = weighted(*chain(x))
        chain.layers[0].fit(torch.randn(50, DIM, dtype=torch.float64) * 7)
        loss.backward()

    found = results(reversible, refitted)
    for key in ("x", "layers.1.conditioner.0.weight", "layers.2.conditioner.3.bias"):
        torch.testing.assert_close(found.get(key), expected.get(key))


@pytest.mark.parametrize("frozen", [False, True], ids=["learned", "frozen"])
def test_weights_changed_in_place_before_backward_are_an_error(frozen):
    _, chain = pair(CHAINS["affine"])
    weight = chain.layers[1].conditioner[0].weight.requires_grad_(not frozen)
    y, log_det = chain(batch())
    with torch.no_grad():
        weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted(y, log_det).backward()


def test_weights_replaced_before_backward():
    def step(chain, x):
        loss = weighted(*chain(x))
        linear = chain.layers[1].conditioner[0]
        old, linear.weight = linear.weight, nn.Parameter(torch.ones_like(linear.weight))
        loss.backward()
        new, linear.weight = linear.weight, old
        assert new.grad is None

    plain, reversible = pair(CHAINS["affine"])
    assert_same(results(reversible, step), results(plain, step))


def test_hooks_of_tensors_and_of_modules_inside():
    """Each changes what passes; none runs twice on one gradient."""

    def step(chain, x):
        x.register_hook(lambda grad: 3 * grad)
        for i, p in enumerate(chain.parameters(), 2):
            p.register_hook(lambda grad, by=i: by * grad)
        inner = chain.layers[2].conditioner
        inner[0].register_forward_hook(lambda module, args, out: out.sin())
        inner[1].register_forward_pre_hook(lambda module, args: (1.3 * args[0],))
        inner[3].register_full_backward_hook(lambda module, before, after: (0.7 * before[0],))
        first_order(chain, x)

    plain, reversible = pair(lambda: couplings(CONDITIONERS["dropout"]))
    assert_same(results(reversible, step), results(plain, step))


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_forward_hook(lambda *args: None),
        lambda layer: layer.register_forward_pre_hook(lambda *args: None),
        lambda layer: layer.register_full_backward_hook(lambda *args: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *args: None),
    ],
)
def test_hooks_on_layers_are_refused(register):
    plain, reversible = pair(CHAINS["affine"])
    for chain in (plain, reversible):
        handle = register(chain.layers[1])
    with torch.no_grad():
        reversible(batch())
    with pytest.raises(RuntimeError, match=r"layers\.1: expected no hooks on the layers"):
        reversible(batch())
    handle.remove()
    first_order(reversible, batch())


@pytest.mark.parametrize("order", [first_order, second_order])
def test_a_tensor_from_elsewhere_is_refused(order):
    """Its gradient would be lost."""
    outside = torch.ones((), dtype=torch.float64, requires_grad=True)
    context = 2 * outside
    conditioner = net(Function(lambda h: h * context))
    layers = [*couplings(net, 1), AffineCoupling(conditioner), *couplings(net, 1)]
    message = r"layers\.1 \(AffineCoupling\): expected to depend on x, parameters and buffers"
    chain = InvertibleChain(layers, reversible=True).double()
    with pytest.raises(RuntimeError, match=message):
        order(chain, batch())
    context = outside.detach()
    order(chain, batch())


def test_random_numbers_of_backward_alone_are_refused():
    class Late(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return F.dropout(x, 0.5, training=self.calls > 1)

    chain = InvertibleChain([*couplings(net, 1), AffineCoupling(net(Late()))], reversible=True)
    chain.double()
    message = r"layers\.1 \(AffineCoupling\): expected to do the same again in backward"
    with pytest.raises(RuntimeError, match=message):
        first_order(chain, batch())


def test_dropout_by_a_key_needs_the_key_in_backward_too():
    key = torch.tensor([1, 2])

    def step(chain, x):
        with keyed_dropout([chain], key, count=len(x)):
            first_order(chain, x)

    plain, reversible = pair(lambda: couplings(lambda: net(Dropout(0.3))))
    assert_same(results(reversible, step), results(plain, step))
    with keyed_dropout([reversible], key):
        loss = weighted(*reversible(batch()))
    with pytest.raises(RuntimeError, match=r"layers\.3 .* drew random numbers"):
        loss.backward()


def test_modules_of_torch_jit_are_refused():
    with pytest.warns((DeprecationWarning, FutureWarning)):
        scripted = torch.jit.script(nn.Linear(3, DIM))
    chain = InvertibleChain([AffineCoupling(scripted)], reversible=True)
    with pytest.raises(TypeError, match=r"layers\.0 \(AffineCoupling\): .* torch.jit"):
        chain(torch.randn(2, DIM))


def test_parametrizations_that_are_cached():
    """In forward a cached weight would have no graph; in backward it would be another's."""

    def step(chain, x):
        with parametrize.cached():
            outside = chain.layers[0].conditioner[0](x[:, :3]).square().sum()
            (weighted(*chain(x)) + outside).backward()
        assert not parametrize._cache and not parametrize._cache_enabled

    plain, reversible = pair(lambda: couplings(CONDITIONERS["weight norm"]))
    assert_same(results(reversible, step), results(plain, step))


def test_a_compiled_conditioner():
    torch._dynamo.reset()
    plain, reversible = pair(CHAINS["affine"])
    for layer in reversible.layers:
        layer.conditioner.compile(backend="aot_eager")
    assert_same(results(reversible, first_order), results(plain, first_order))


def test_a_recurrent_conditioner():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRU(1, DIM, batch_first=True)

        def forward(self, x):
            return self.cell(x[..., None])[0][:, -1]

    plain, reversible = pair(lambda: couplings(Recurrent))
    found = results(reversible, first_order)
    assert_same(found, results(plain, first_order))
    assert found["layers.0.conditioner.cell.weight_hh_l0"].abs().sum() > 0


def test_dropout_under_autocast():
    """The same zeros, and bfloat16 again, wherever backward is called."""
    plain, reversible = (
        chain.float() for chain in pair(lambda: couplings(CONDITIONERS["dropout"]))
    )

    def step(chain):
        torch.manual_seed(1)
        x = batch(64).detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, log_det = chain(x)
        (y.square().sum(1) - log_det).mean().backward()
        return named_gradients(chain, x)

    found, expected = step(reversible), step(plain)
    for name, value in expected.items():
        assert (found[name] - value).norm() < 0.01 * value.norm(), name


def test_two_ranks(two_ranks):
    for output in two_ranks(Path(__file__).with_name("reversible_ranks.py"), timeout=120):
        assert "the same gradients" in output, output
