"""fastgen.patch on models made of torch.nn, and what holds for every library."""

import copy
import io
import logging
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import fastgen
from fastgen.integrations import _library, _patch, torch_nn

CLASSES = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
SIZES = {1: (2, 6, 17), 2: (2, 6, 5, 7), 3: (2, 6, 3, 4, 5)}
OPTIONS = [
    {},
    {"affine": True},
    {"track_running_stats": True},
    {"affine": True, "track_running_stats": True, "momentum": None, "eps": 1e-3},
]


def generator():
    """A small generator in the manner of CycleGAN: convolutions, norms, a residual block."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(
                nn.ReflectionPad2d(1),
                nn.Conv2d(8, 8, 3),
                nn.InstanceNorm2d(8),
                nn.ReLU(True),
                nn.ReflectionPad2d(1),
                nn.Conv2d(8, 8, 3),
                nn.InstanceNorm2d(8, affine=True),
            )

        def forward(self, x):
            return x + self.block(x)

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.InstanceNorm2d(8, track_running_stats=True),
        nn.ReLU(),
        Residual(),
        nn.Conv2d(8, 3, 3, padding=1),
    )


def names(pieces):
    return [piece.path for piece in pieces]


def grads(model, x):
    for p in model.parameters():
        p.grad = None
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return [y, x.grad, *(p.grad for p in model.parameters())]


def train(model, x, steps):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for i in range(steps):
        optimizer.zero_grad()
        model(x + 0.1 * i).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("dims", CLASSES)
def test_trains_as_before(dims, options):
    torch.manual_seed(0)
    norm = CLASSES[dims](6, **options)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](6, 6, 1)
    plain = nn.Sequential(conv, norm, nn.Tanh())
    patched = copy.deepcopy(plain)
    assert names(fastgen.patch(patched).replaced) == ["1"]
    x = torch.randn(SIZES[dims])
    # Float32 rounding of sums of at most 60 values, through 20 steps.
    close = {"rtol": 1e-4, "atol": 1e-6}
    assert_close(grads(plain, x), grads(patched, x), **close)
    train(plain, x, 20)
    train(patched, x, 20)
    assert plain.state_dict().keys() == patched.state_dict().keys()
    assert_close(list(plain.state_dict().values()), list(patched.state_dict().values()), **close)
    plain.eval()
    patched.eval()
    assert_close(grads(plain, x), grads(patched, x), **close)
    patched.double().load_state_dict(plain.double().state_dict())
    assert_close(grads(plain, x.double()), grads(patched, x.double()), rtol=1e-10, atol=1e-12)


def test_state_dicts_load_both_ways():
    plain, patched = generator(), generator()
    fastgen.patch(patched)
    x = torch.randn(2, 3, 8, 8)
    patched.load_state_dict(plain.state_dict())
    assert_close(patched(x), plain(x))
    other = generator()
    fastgen.patch(other)
    plain.load_state_dict(other.state_dict())
    assert_close(other(x), plain(x))


def test_everything_else_stays_the_same_object():
    model = generator()
    norm = model[1]
    seen = []
    norm.register_forward_hook(lambda *_: seen.append(1))
    before = [*model.parameters(), *model.buffers(), *model.modules()]
    with fastgen.patch(model):
        assert all(
            a is b
            for a, b in zip(
                before, [*model.parameters(), *model.buffers(), *model.modules()], strict=True
            )
        )
        model(torch.randn(1, 3, 8, 8))
        assert type(norm) is torch_nn.FusedInstanceNorm2d and isinstance(norm, nn.InstanceNorm2d)
    assert seen == [1]
    assert [type(m) for m in model.modules() if isinstance(m, nn.InstanceNorm2d)] == [
        nn.InstanceNorm2d
    ] * 3


def test_copies_and_saved_weights():
    model = generator()
    fastgen.patch(model)
    x = torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(model)
    assert type(twin[1]) is torch_nn.FusedInstanceNorm2d
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain = generator()
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert_close(twin.eval()(x), plain.eval()(x))
    fastgen.unpatch(twin)
    assert type(twin[1]) is nn.InstanceNorm2d and type(model[1]) is torch_nn.FusedInstanceNorm2d


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    norm = nn.InstanceNorm2d(8, affine=True)
    x = torch.randn(2, 8, 6, 6)
    exact = norm(x)
    fastgen.patch(norm)
    norm.to(dtype)
    y = norm(x.to(dtype))
    assert y.dtype == dtype
    assert_close(y.float(), exact, rtol=0.02, atol=0.02)


def test_under_compile_and_autocast():
    model = generator().eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    fastgen.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("norm", "size", "layout"),
    [
        (nn.InstanceNorm2d, (2, 8, 6, 5), torch.channels_last),
        (nn.InstanceNorm3d, (2, 8, 3, 4, 5), torch.channels_last_3d),
    ],
)
def test_channels_last_stays(norm, size, layout):
    """The library loses it, and what follows pays; of the gradient, too."""
    layer = norm(8, affine=True)
    x = torch.randn(size).to(memory_format=layout).requires_grad_()
    assert not layer(x).is_contiguous(memory_format=layout)
    with fastgen.patch(layer):
        y = layer(x)
        y.backward(torch.randn(size).to(memory_format=layout))
    assert y.is_contiguous(memory_format=layout) and x.grad.is_contiguous(memory_format=layout)


def test_lazy_norms_once_they_know_their_size():
    model = nn.Sequential(nn.LazyInstanceNorm2d(affine=True))
    with pytest.warns(UserWarning, match="nothing was replaced"):
        assert fastgen.patch(model).others == 2
    x = torch.randn(2, 6, 5, 4)
    expected = model(x)
    with fastgen.patch(model) as report:
        assert names(report.replaced) == ["0"] and type(model[0]) is torch_nn.FusedInstanceNorm2d
        assert_close(model(x), expected)


def test_left_alone_with_a_reason():
    class Mine(nn.InstanceNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    changed = nn.InstanceNorm2d(4)
    changed.forward = lambda x: x
    model = nn.Sequential(Mine(4), changed, nn.InstanceNorm2d(4), fastgen.nn.InstanceNorm2d(4))
    report = fastgen.patch(model)
    assert names(report.replaced) == ["2"] and report.others == 2
    assert {piece.path: piece.reason for piece in report.left} == {
        "0": "a subclass of torch.nn.modules.instancenorm.InstanceNorm2d, which may differ from it",
        "1": "its forward was replaced on the object",
    }
    assert "replaced 2: torch.nn.modules.instancenorm.InstanceNorm2d" in str(report)
    fastgen.unpatch(model)
    assert [type(m) for m in model] == [
        Mine,
        nn.InstanceNorm2d,
        nn.InstanceNorm2d,
        fastgen.nn.InstanceNorm2d,
    ]


def test_explains_modules():
    model = generator()
    assert names(fastgen.explain(model).left) == ["1", "3.block.2", "3.block.6"]
    fastgen.patch(model)
    assert names(fastgen.explain(model).replaced) == ["1", "3.block.2", "3.block.6"]
    x = torch.randn(1, 8, 4, 4)
    assert fastgen.explain(model[1], x).chosen == "fastgen"
    assert fastgen.explain("instance_norm", x).op == "instance_norm"
    other = fastgen.explain(model[0], x)
    assert other.chosen == "its own code" and "does not cover" in other.rejected["fastgen"]
    with pytest.raises(
        TypeError, match="subject: expected an op's name or a torch.nn.Module, got int"
    ):
        fastgen.explain(3)


def test_patched_library_makes_faster_objects():
    init = nn.InstanceNorm2d.__init__
    before = generator()
    report = fastgen.patch("torch.nn")
    try:
        assert len(report.replaced) == 3
        assert type(generator()[1]) is torch_nn.FusedInstanceNorm2d
        assert type(before[1]) is nn.InstanceNorm2d
        with pytest.raises(RuntimeError, match="'torch.nn' is patched already"):
            fastgen.patch("torch.nn")
    finally:
        fastgen.unpatch("torch.nn")
    assert type(generator()[1]) is nn.InstanceNorm2d
    assert nn.InstanceNorm2d.__init__ is init and "__init__" not in vars(nn.InstanceNorm2d)
    with fastgen.patch("torch.nn"):
        assert type(generator()[1]) is torch_nn.FusedInstanceNorm2d
    assert type(generator()[1]) is nn.InstanceNorm2d
    with pytest.raises(ValueError, match="target: 'torch.nn' is not patched"):
        fastgen.unpatch("torch.nn")


def test_patching_twice_changes_nothing():
    model = generator()
    fastgen.patch(model)
    with pytest.warns(UserWarning, match="nothing was replaced"):
        again = fastgen.patch(model)
    assert not again.replaced and {piece.reason for piece in again.left} == {"patched already"}


@pytest.mark.parametrize("function", [fastgen.patch, fastgen.unpatch])
def test_wrong_targets(function):
    with pytest.raises(
        TypeError, match="target: expected a torch.nn.Module or a library's name, got int"
    ):
        function(3)
    with pytest.raises(
        ValueError, match="target: expected a module or one of .*torch.nn.*; got 'numpy'"
    ):
        function("numpy")


def test_nothing_to_replace_and_nothing_installed(monkeypatch):
    with pytest.warns(UserWarning, match="nothing was replaced"):
        assert fastgen.patch(nn.Linear(2, 2)).others == 1
    monkeypatch.setitem(_library._FILES, "absent_library", "absent")
    with pytest.raises(ModuleNotFoundError, match="'absent_library' is not installed"):
        fastgen.patch("absent_library")


def test_a_release_without_the_classes_is_left_alone(monkeypatch):
    """The file that covers it cannot be imported; models of other libraries are patched."""
    monkeypatch.setitem(_library._FILES, "json", "a_file_that_fails")
    _library._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="does not know this release of 'json'"):
        assert fastgen.patch(nn.Sequential(nn.InstanceNorm2d(4))).replaced
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastgen.patch(nn.Sequential(nn.InstanceNorm2d(4))).replaced
    with pytest.raises(ImportError, match="does not know this release of 'json'"):
        fastgen.patch("json")


def test_a_failure_leaves_no_half_patched_model(monkeypatch):
    class Stubborn(nn.InstanceNorm2d):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise RuntimeError("no")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.InstanceNorm2d(4), Stubborn(4))
    swap = _library.Swap(Stubborn, torch_nn.FusedInstanceNorm2d, "", ())
    library = _library.Library(
        "torch.nn", "torch", torch_nn.LIBRARY.tested, (*torch_nn.LIBRARY.swaps, swap)
    )
    monkeypatch.setattr(torch_nn, "LIBRARY", library)
    with pytest.raises(RuntimeError, match="no"):
        fastgen.patch(model)
    assert type(model[0]) is nn.InstanceNorm2d


@pytest.mark.parametrize("swap", torch_nn.LIBRARY.swaps, ids=lambda s: s.original.__name__)
def test_fingerprints(swap):
    if torch.__version__.partition("+")[0] != torch_nn.LIBRARY.tested[-1]:
        pytest.skip(f"they are those of {torch_nn.LIBRARY.tested[-1]}")
    assert _library.fingerprint(swap.original, *swap.relies_on) == swap.fingerprint


def test_a_changed_version_warns_once_and_is_left_alone(monkeypatch):
    swaps = (
        torch_nn.LIBRARY.swaps[0],
        _library.Swap(nn.InstanceNorm2d, torch_nn.FusedInstanceNorm2d, "another", ()),
    )
    library = _library.Library("torch.nn", "torch", ("1.0",), swaps)
    monkeypatch.setattr(torch_nn, "LIBRARY", library)
    model = nn.Sequential(nn.InstanceNorm1d(4), nn.InstanceNorm2d(4))
    with pytest.warns(
        UserWarning, match=r"tested with torch 1\.0; .*Left alone, as changed: InstanceNorm2d"
    ):
        report = fastgen.patch(model)
    assert names(report.replaced) == ["0"]
    assert "is not that of 1.0" in report.left[0].reason
    fastgen.unpatch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastgen.patch(model)


def test_says_once_that_a_call_runs_the_librarys_code(caplog):
    _library.run_own_code.cache_clear()
    with caplog.at_level(logging.DEBUG, "fastgen"):
        _library.run_own_code("Layer", "a mask")
        _library.run_own_code("Layer", "a mask")
    assert [r.getMessage() for r in caplog.records] == ["Layer: the library's own code: a mask"]


def test_reaches_what_is_wrapped():
    model = generator()
    wrapped = nn.DataParallel(model)
    assert names(fastgen.patch(wrapped).replaced)[0] == "module.1"
    assert _patch.state(model).replaced


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("register", "remove"),
    [
        (
            parametrizations.weight_norm,
            lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        ),
        (
            parametrizations.spectral_norm,
            lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        ),
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    ],
    ids=["weight_norm", "spectral_norm", "weight_norm by hooks"],
)
def test_normalised_weights(register, remove):
    """PyTorch's own parametrizations, by a class of theirs or by a hook."""
    plain = nn.InstanceNorm2d(6, affine=True)
    nn.init.normal_(plain.weight)
    patched = copy.deepcopy(plain)
    fastgen.patch(patched)
    for layer in (plain, patched):
        register(layer)
    x = torch.randn(SIZES[2])
    assert_close(grads(patched, x), grads(plain, x), rtol=1e-4, atol=1e-6)
    fastgen.unpatch(patched)
    assert type(patched) is not torch_nn.FusedInstanceNorm2d
    assert not isinstance(patched, torch_nn.FusedInstanceNorm2d)
    assert_close(grads(patched, x), grads(plain, x), rtol=1e-4, atol=1e-6)
    fastgen.patch(patched)
    for layer in (plain, patched):
        remove(layer)
    assert type(patched) is torch_nn.FusedInstanceNorm2d
    assert_close(grads(patched, x), grads(plain, x), rtol=1e-4, atol=1e-6)
    fastgen.unpatch(patched)
    assert type(patched) is nn.InstanceNorm2d


def quantized(model, x):
    """By torch.ao.quantization, calibrated on x."""
    quantization = torch.ao.quantization
    model = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(model)
    prepared(x)
    return quantization.convert(prepared)


@pytest.mark.filterwarnings("ignore")
def test_static_quantization():
    """A patched model becomes the quantized model that the unpatched one becomes."""
    plain, x = (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8, affine=True)),
        torch.randn(2, 3, 8, 8),
    )
    patched = copy.deepcopy(plain)
    fastgen.patch(patched)
    expected, seen = quantized(plain, x), quantized(patched, x)
    assert [type(m) for m in seen.modules()] == [type(m) for m in expected.modules()]
    assert_close(seen(x), expected(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_quantization_by_graph():
    """The graph keeps a patched layer, in floats; the rest is quantized around it."""
    from torch.ao.quantization import quantize_fx as quantize

    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    expected = model(x)
    fastgen.patch(model)
    prepared = quantize.prepare_fx(model, torch.ao.quantization.get_default_qconfig_mapping(), (x,))
    prepared(x)
    converted = quantize.convert_fx(prepared)
    assert type(converted.get_submodule("1")) is torch_nn.FusedInstanceNorm2d
    assert type(converted.get_submodule("0")) is not nn.Conv2d
    # Steps of 1 / 255 of the range.
    assert_close(converted(x), expected, rtol=0, atol=0.2)


@pytest.mark.usefixtures("forward_mode")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_says_why_a_traced_call_runs_pytorchs_code(caplog):
    layer, x = nn.InstanceNorm2d(4), torch.randn(1, 4, 3, 3)
    fastgen.patch(layer)
    assert fastgen.explain(layer, x).chosen == "fastgen"
    _library.run_own_code.cache_clear()
    with caplog.at_level(logging.DEBUG, "fastgen"), forward_ad.dual_level():
        explanation = fastgen.explain(layer, x)
        layer(forward_ad.make_dual(x, x))
    assert explanation.chosen == "torch.nn"
    assert explanation.rejected == {"fastgen": "forward-mode differentiation"}
    said = [r.getMessage() for r in caplog.records]
    assert said == ["InstanceNorm2d: the library's own code: forward-mode differentiation"]
    reasons = []

    class Asks(nn.Module):
        def forward(self, x):
            reasons.append(fastgen.explain(layer, x).rejected["fastgen"])
            return layer(x) if isinstance(x, torch.Tensor) else x

    torch.jit.trace(Asks(), (x,), check_trace=False)
    torch.fx.symbolic_trace(Asks())
    assert reasons == ["torch.jit.trace", "torch.fx.symbolic_trace"]
