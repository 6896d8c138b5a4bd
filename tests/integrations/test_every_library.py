"""What holds for every class that fastgen.patch() covers, beside its options: a model of each
library through copies, pickles, devices, dtypes, modes and processes."""

import copy
import importlib.util
import io
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

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


def test_two_processes(two_ranks):
    """DistributedDataParallel over every example; a spawn for all of them."""
    for output in two_ranks(FOLDER / "two_ranks.py", timeout=300):
        assert [name for name in INSTALLED if name not in output.splitlines()] == [], output
