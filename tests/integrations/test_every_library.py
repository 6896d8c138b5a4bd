"""What holds for every class that fastgen.patch() covers, beside its options: a model of each
library through copies, pickles, devices, dtypes, modes and processes."""

import copy
import functools
import importlib.util
import io
import pickle
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import fastgen
from fastgen.integrations import _library

FOLDER = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("examples", FOLDER / "examples.py")
examples = importlib.util.module_from_spec(_spec)
sys.modules["examples"] = examples
_spec.loader.exec_module(examples)

pytestmark = pytest.mark.usefixtures("fused_on_cpus")

#: Their own code needs values of tensors.
NOT_ON_META = ("vector_quantize_pytorch", "zuko")
#: Their own code breaks the graph.
IN_PIECES = ("vector_quantize_pytorch", "zuko")
INSTALLED = list(examples.installed())
each_library = pytest.mark.parametrize("name", INSTALLED)


def start(name):
    """The library's model and its patched copy, a batch, and how close they come."""
    example = examples.EXAMPLES[name]
    plain = example.objective(torch.float64)
    patched = copy.deepcopy(plain)
    assert not fastgen.patch(patched).left
    close = {"rtol": example.rounding, "atol": example.rounding}
    return plain, patched, example.batch(6, dtype=torch.float64), close


def kinds(model):
    return [type(module) for module in model.modules()]


def assert_alike(a, b, x, **close):
    """In outputs, and so in what the model is; each call on a copy, as calls train buffers."""
    left, right = (copy.deepcopy(model).outputs(x) for model in (a, b))
    torch.testing.assert_close(right, left, **close)


def trained(model, x):
    """Away from where it started."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    return model


@each_library
def test_an_example_of_every_class(name):
    _, patched, *_ = start(name)
    library = _library.find(name)
    modules = {swap.fused for swap in library.swaps if issubclass(swap.original, nn.Module)}
    assert modules and modules <= set(kinds(patched))


@each_library
def test_copies_and_weights(name):
    """deepcopy; a saved state_dict both ways; pickled weights."""
    plain, patched, x, close = start(name)
    other = copy.deepcopy(patched)
    twin = copy.deepcopy(trained(patched, x))
    assert kinds(twin) == kinds(patched)
    assert_alike(patched, twin, x, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(patched.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert_alike(plain, patched, x, **close)
    weights = pickle.loads(pickle.dumps(dict(patched.named_parameters())))
    assert all(type(parameter) is nn.Parameter for parameter in weights.values())
    torch.testing.assert_close(weights, dict(patched.named_parameters()), rtol=0, atol=0)
    other.load_state_dict(pickle.loads(pickle.dumps(trained(plain, x).state_dict())))
    assert_alike(plain, other, x, **close)


@each_library
def test_devices(name):
    """To another device by its shapes alone, and back with the weights of the unpatched model."""
    plain, patched, x, close = start(name)
    expected = [t.shape for t in copy.deepcopy(plain).outputs(x)]
    state, before = copy.deepcopy(plain.state_dict()), kinds(patched)
    patched.to("meta")
    if name in NOT_ON_META:
        with pytest.raises(RuntimeError, match="on meta tensors|register_meta"):
            copy.deepcopy(plain).to("meta").outputs(x.to("meta"))
    else:
        on_meta = patched.outputs(x.to("meta"))
        assert [t.shape for t in on_meta] == expected and all(t.is_meta for t in on_meta)
    patched.to_empty(device="cpu")
    for key, value in patched.named_buffers():
        # what no state_dict has
        if key not in state:
            value.copy_(plain.get_buffer(key))
    patched.load_state_dict(state)
    assert kinds(patched) == before
    assert_alike(plain, patched, x, **close)


@each_library
def test_dtypes(name):
    plain, patched, x, close = start(name)
    exact = copy.deepcopy(plain).outputs(x)
    for half in (torch.float16, torch.bfloat16):
        theirs, ours = (
            copy.deepcopy(model).to(half).outputs(x.to(half)) for model in (plain, patched)
        )
        assert [y.dtype for y in ours] == [y.dtype for y in theirs]
        for y, truth in zip(ours, exact, strict=True):
            # Some ten layers, each rounding what may be a few times larger than its sum.
            least = 40 * torch.finfo(half).eps * (1 + truth.abs().max().item())
            torch.testing.assert_close(y.double(), truth.double(), rtol=0, atol=least)
    patched.float().double().load_state_dict(plain.state_dict())
    assert_alike(plain, patched, x, **close)


@each_library
def test_modes(name):
    """Training, evaluation and training again leave the same weights and buffers."""
    plain, patched, x, close = start(name)
    for training in (True, False, True):
        for model in (plain, patched):
            model.train(training)
        assert [m.training for m in patched.modules()] == [m.training for m in plain.modules()]
        torch.testing.assert_close(patched.outputs(x), plain.outputs(x), **close)
        if training:
            trained(plain, x)
            trained(patched, x)
    torch.testing.assert_close(patched.state_dict(), plain.state_dict(), **close)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@each_library
def test_compiles(name):
    """With the gradients and the buffers of a training step; as one graph where the library can."""
    # All examples are called by the same code, of which dynamo compiles eight versions at most.
    torch._dynamo.reset()
    plain, patched, x, close = start(name)
    compiled = torch.compile(patched, fullgraph=name not in IN_PIECES, backend="aot_eager")
    losses = [plain(x), compiled(x)]
    torch.testing.assert_close(*losses, **close)
    for loss in losses:
        loss.backward()
    for a, b in zip(plain.parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, **close)
    torch.testing.assert_close(patched.state_dict(), plain.state_dict(), **close)


class Subject(nn.Module):
    """A module, and the call of it that was seen; called with the tensors of that call."""

    def __init__(self, module, args, kwargs):
        super().__init__()
        self.module = module
        self.call, self.spec = tree_flatten((args, kwargs))

    @property
    def tensors(self):
        return tuple(t for t in self.call if isinstance(t, torch.Tensor))

    def outputs(self, *tensors):
        rest = iter(tensors)
        call = [next(rest) if isinstance(t, torch.Tensor) else t for t in self.call]
        args, kwargs = tree_unflatten(call, self.spec)
        leaves = tree_leaves(self.module(*args, **kwargs))
        return tuple(t for t in leaves if not torch.is_tensor(t) or t.is_floating_point())

    def loss(self, *tensors):
        return sum(t.square().sum() for t in self.outputs(*tensors))


class OfOne(Subject):
    def forward(self, x):
        return self.outputs(x)


class OfTwo(Subject):
    def forward(self, x, y):
        return self.outputs(x, y)


class Applied(nn.Module):
    """A module that makes transformations, as what they make of an input."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module().call_and_ladj(x)


def innermost(subject):
    """The module of a covered class."""
    module = subject.module
    return module.module if isinstance(module, Applied) else module


def subject(module, args, kwargs):
    count = sum(isinstance(t, torch.Tensor) for t in tree_leaves((args, kwargs)))
    return (OfOne, OfTwo)[count - 1](module, args, kwargs)


def subjects(name, training=True):
    """One of each covered class of a library, by its name, and its patched copy."""
    plain, _, x, _ = start(name)
    plain.train(training)
    originals = {swap.original for swap in _library.find(name).swaps}
    found = [module for module in plain.modules() if type(module) in originals]
    calls = {}

    def see(module, args, kwargs, result):
        calls.setdefault(type(module), (module, args, kwargs, result))

    hooks = [module.register_forward_hook(see, with_kwargs=True) for module in found]
    plain.outputs(x[:3])
    for module in found:
        if type(module) not in calls:
            module(x[:3])  # its inverse alone was called
    for hook in hooks:
        hook.remove()
    assert set(calls) == set(map(type, found))
    for kind, (module, args, kwargs, result) in calls.items():
        if isinstance(result, torch.distributions.Transform):
            module, args, kwargs = Applied(module), (x[:3],), {}
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        patched = copy.deepcopy(module)
        fastgen.patch(patched)
        yield (
            kind.__name__,
            subject(copy.deepcopy(module), args, kwargs),
            subject(patched, args, kwargs),
        )


def compare(name, function, training=True, **close):
    """Holds function(patched) to function(plain) where the latter works; the classes where so."""
    worked = set()
    for kind, plain, patched in subjects(name, training):
        try:
            expected = function(plain)
        except Exception:
            continue
        before = kinds(patched)
        torch.testing.assert_close(function(patched), expected, **close)
        assert kinds(patched) == before
        worked.add(kind)
    return worked


def leaves(subject):
    """The parameters, and inputs that require gradients."""
    params = {k: p for k, p in subject.named_parameters() if p.requires_grad}
    return params, tuple(t.clone().requires_grad_() for t in subject.tensors)


def jit_script(subject):
    return torch.jit.script(subject.module)(*tree_unflatten(subject.call, subject.spec)[0])


def jit_trace(subject):
    """What a file has of it, which other programs can load."""
    # Without the check, which calls it again: a call in training changes its buffers.
    traced = torch.jit.trace(subject, subject.tensors, check_trace=False)
    assert "fastgen::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)(*subject.tensors)


def onnx_export(subject):
    """What torch.onnx.export converts: a program of PyTorch's operators alone."""
    with mock.patch("torch.onnx.is_in_onnx_export", lambda: True):
        program = torch.export.export(subject, subject.tensors, strict=False)
    assert "fastgen" not in program.graph_module.code
    return program.module()(*subject.tensors)


def dual_numbers(subject):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in subject.tensors]
        return [tuple(forward_ad.unpack_dual(y)) for y in subject(*duals)]


def tangents(subject):
    return tuple(torch.ones_like(t) for t in subject.tensors)


def batched_grads(subject):
    """Gradients for two cotangents at once, and for as many as there are outputs."""
    params, tensors = leaves(subject)
    loss = subject.loss(*tensors)
    weights = torch.tensor([1.0, -2.0], dtype=loss.dtype)
    inputs = [*tensors, *params.values()]
    grads = torch.autograd.grad(loss, inputs, weights, is_grads_batched=True, allow_unused=True)
    jacobian = torch.autograd.functional.jacobian(subject, subject.tensors, vectorize=True)
    return grads, jacobian


TRACERS = {
    "jit.script": jit_script,
    "jit.trace": jit_trace,
    "fx": lambda s: torch.fx.symbolic_trace(s)(*s.tensors),
    "make_fx": lambda s: make_fx(s)(*s.tensors)(*s.tensors),
    "export": lambda s: torch.export.export(s, s.tensors).module()(*s.tensors),
    "onnx.export": onnx_export,
    "jvp": lambda s: torch.func.jvp(s, s.tensors, tangents(s)),
    "dual numbers": dual_numbers,
    "jacfwd": lambda s: torch.func.jacfwd(s)(*s.tensors),
    "hessian": lambda s: torch.func.hessian(s.loss)(*s.tensors),
    "batched grads": batched_grads,
}
#: The classes that can be read by source where they are not patched.
INSTANCE_NORMS = {"InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"}
BY_SOURCE = {
    "jit.script": INSTANCE_NORMS | {"MaskedAffineFlow"},
    "fx": INSTANCE_NORMS
    | {"AdaGroupNorm", "AffineCouplingOneSided", "ConditionalAffineTransform"}
    | {"GLOWCouplingBlock", "MaskedAffineFlow", "RNVPCouplingBlock"},
}
#: A model of each library in training, and in evaluation where that is another computation.
EVALUATED = ("torch.nn", "vector_quantize_pytorch")
MODES = [(name, True) for name in INSTALLED]
MODES += [(name, False) for name in INSTALLED if name in EVALUATED]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "training"), MODES, ids=lambda v: {True: "training", False: "evaluation"}.get(v, v)
)
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracers(name, tracer, training):
    """What PyTorch's tracers make of a patched class is what they make of its library's own."""
    rounding = examples.EXAMPLES[name].rounding
    worked = compare(name, TRACERS[tracer], training, rtol=rounding, atol=rounding)
    if tracer in BY_SOURCE:
        covered = {swap.original.__name__ for swap in _library.find(name).swaps}
        assert worked == BY_SOURCE[tracer] & covered
    if not worked:
        pytest.skip("not with the library's own classes either")


def slices(subject, params, tensors, vmap):
    """The loss of every row of the batch: by vmap, or one after the other."""

    def loss(*rows):
        rows = tuple(row[None] for row in rows)
        outputs = functional_call(subject, params, rows)
        return sum(t.square().sum() for t in outputs)

    if vmap:
        return torch.vmap(loss)(*tensors)
    return torch.stack([loss(*rows) for rows in zip(*tensors, strict=True)])


def grads_of(loss, inputs, **options):
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True, **options)


def backward(subject, vmap):
    params, tensors = leaves(subject)
    loss = slices(subject, params, tensors, vmap).sum()
    return loss, grads_of(loss, [*tensors, *params.values()])


def second_order(subject, vmap):
    params, tensors = leaves(subject)
    slopes = grads_of(slices(subject, params, tensors, vmap).sum(), tensors, create_graph=True)
    return grads_of(sum(s.square().sum() for s in slopes), [*tensors, *params.values()])


def compiled(subject, vmap):
    params, tensors = leaves(subject)
    torch._dynamo.reset()

    def function(*tensors):
        return slices(subject, params, tensors, vmap).sum()

    if vmap:
        function = torch.compile(function, backend="aot_eager")
    loss = function(*tensors)
    return loss, grads_of(loss, [*tensors, *params.values()])


def nested(subject, vmap):
    params, tensors = leaves(subject)

    def outer(*tensors):
        return slices(subject, params, tensors, vmap).sum()

    pairs = [torch.stack([t, t / 2]) for t in tensors]
    losses = (
        torch.vmap(outer)(*pairs) if vmap else [outer(*pair) for pair in zip(*pairs, strict=True)]
    )
    return grads_of(sum(losses), [*tensors, *params.values()])


def ensemble(subject, vmap):
    """Two models as one."""
    models = [subject, copy.deepcopy(subject)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.1)
    params, buffers = torch.func.stack_module_state(models)

    def loss(params, buffers):
        outputs = functional_call(subject, (params, buffers), subject.tensors)
        return sum(t.square().sum() for t in outputs)

    inputs = [p for p in params.values() if p.requires_grad]
    if vmap:
        losses = torch.vmap(loss)(params, buffers)
    else:
        states = [[{k: t[i] for k, t in s.items()} for s in (params, buffers)] for i in range(2)]
        losses = torch.stack([loss(*state) for state in states])
    return losses, grads_of(losses.sum(), inputs)


def func_grad(subject, vmap):
    params, tensors = leaves(subject)

    def total(params, tensors):
        return slices(subject, params, tensors, vmap).sum()

    return torch.func.grad(total, (0, 1))({k: p.detach() for k, p in params.items()}, tensors)


def func_jacrev(subject, vmap):
    params, tensors = leaves(subject)
    return torch.func.jacrev(lambda *tensors: slices(subject, params, tensors, vmap))(*tensors)


def mapped(subject):
    """Without running statistics, into which a batch of calls cannot be put."""
    for module in subject.modules():
        if getattr(module, "track_running_stats", False):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return subject


def succeeds(function, plain):
    try:
        function(plain, vmap=True)
    except Exception:
        return False
    return True


THROUGH_VMAP = (backward, second_order, compiled, nested, ensemble, func_grad, func_jacrev)


#: Their own code wants the values of tensors, or changes what every call shares.
NOT_MAPPED = ("vector_quantize_pytorch",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", THROUGH_VMAP, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [name for name in INSTALLED if name not in NOT_MAPPED])
def test_gradients_through_vmap(name, function):
    """Those of calls one after the other, wherever the library's own class can be mapped."""
    rounding = examples.EXAMPLES[name].rounding
    worked = False
    for _, plain, patched in subjects(name):
        expected = function(mapped(plain), vmap=False)
        try:
            seen = function(mapped(patched), vmap=True)
        except Exception:
            if succeeds(function, plain):
                raise
            continue
        torch.testing.assert_close(seen, expected, rtol=rounding, atol=rounding)
        worked = True
    assert worked


@pytest.mark.filterwarnings("ignore")
@each_library
def test_empty_batches(name):
    for _, plain, patched in subjects(name, training=False):
        nothing = [t[:0] for t in plain.tensors]
        try:
            expected = plain(*nothing)
        except (IndexError, RuntimeError):
            continue
        torch.testing.assert_close(patched(*nothing), expected)


class Same(nn.Module):
    """A parametrization under which everything stays as it is."""

    def forward(self, value):
        return value.clone()


def parametrized(module, name):
    return parametrize.register_parametrization(module, name, Same())


def check_kind(subject, kind, parametrized=True, *, expected, **close):
    module = innermost(subject)
    assert parametrize.is_parametrized(module) == parametrized
    assert parametrize.type_before_parametrizations(module) is kind
    explained = fastgen.explain(module)
    assert any(piece.path == "" for piece in explained.replaced) == kind.__name__.startswith(
        "Fused"
    )
    torch.testing.assert_close(subject(*subject.tensors), expected, **close)


@each_library
def test_parametrized(name):
    """A class that PyTorch has put over a module's own stays, whatever goes first."""
    close = {"rtol": examples.EXAMPLES[name].rounding, "atol": examples.EXAMPLES[name].rounding}
    for _, plain, fused in subjects(name, training=False):
        own, patched = type(innermost(plain)), type(innermost(fused))
        module = innermost(plain)
        state = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        tensor = next((key for key, t in state if t.is_floating_point()), None)
        if tensor is None:
            continue
        check = functools.partial(check_kind, expected=plain(*plain.tensors), **close)
        parametrized(innermost(fused), tensor)
        check(fused, patched)
        twin = copy.deepcopy(fused)
        fastgen.unpatch(fused)
        check(fused, own)
        check(twin, patched)
        assert fastgen.patch(fused).replaced
        check(fused, patched)
        parametrize.remove_parametrizations(innermost(fused), tensor)
        check(fused, patched, parametrized=False)
        fastgen.unpatch(fused)
        check(fused, own, parametrized=False)

        parametrized(innermost(plain), tensor)
        with fastgen.patch(plain):
            check(plain, patched)
            twin = copy.deepcopy(plain)
        check(plain, own)
        parametrize.remove_parametrizations(innermost(plain), tensor)
        check(plain, own, parametrized=False)
        fastgen.unpatch(twin)
        parametrize.remove_parametrizations(innermost(twin), tensor)
        check(twin, own, parametrized=False)


def test_two_processes(two_ranks):
    """DistributedDataParallel over every example; a spawn for all of them."""
    for output in two_ranks(FOLDER / "two_ranks.py", timeout=300):
        assert [name for name in INSTALLED if name not in output.splitlines()] == [], output


def test_sharded(two_ranks):
    two_ranks(FOLDER / "sharded.py", timeout=120)
