"""fastgen.patch on FrEIA."""

import copy
import io
import logging
import warnings

import pytest
import torch
from torch import nn

import fastgen
from fastgen.integrations import _library

with warnings.catch_warnings():
    # its docstrings hold escapes that Python does not know
    warnings.simplefilter("ignore")
    Fm = pytest.importorskip("FrEIA.modules")
    Ff = pytest.importorskip("FrEIA.framework")
ours = pytest.importorskip("fastgen.integrations.freia")

# A block without channels to transform has a subnet without outputs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
    pytest.mark.usefixtures("fused_on_cpus"),
]

#: Rounding of sums of at most a few hundred terms, through 20 steps of training.
CLOSE = {
    torch.float32: {"rtol": 1e-3, "atol": 2e-5},
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
}
CLAMPS = ("ATAN", "TANH", "SIGMOID")
VECTOR, IMAGE = (5,), (4, 2, 3)


def dense(a, b):
    return nn.Sequential(nn.Linear(a, 8), nn.SiLU(), nn.Linear(8, b))


def conv(a, b):
    return nn.Sequential(nn.Conv2d(a, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, b, 1))


def make(cls, shape, conditions=(), **options):
    subnet = dense if len(shape) == 1 else conv
    return cls([shape], list(conditions), subnet_constructor=subnet, **options)


def coupling(*args, **options):
    return lambda: make(*args, **options), args


CASES = {
    **{
        f"{cls.__name__} {clamp}": coupling(cls, VECTOR, clamp_activation=clamp)
        for cls in (Fm.GLOWCouplingBlock, Fm.RNVPCouplingBlock)
        for clamp in CLAMPS
    },
    **{
        f"{cls.__name__} image, condition": coupling(cls, IMAGE, [(2, 2, 3)], clamp=1.3)
        for cls in (Fm.GLOWCouplingBlock, Fm.RNVPCouplingBlock, Fm.AffineCouplingOneSided)
    },
    "split": coupling(Fm.GLOWCouplingBlock, VECTOR, split_len=1, clamp=1),
    "nothing in one half": coupling(Fm.GLOWCouplingBlock, VECTOR, [(2,)], split_len=1.0),
    "two conditions": coupling(Fm.RNVPCouplingBlock, VECTOR, [(2,), (3,)], clamp_activation="TANH"),
    "one side": coupling(Fm.AffineCouplingOneSided, VECTOR, clamp_activation="SIGMOID"),
    "condition alone": coupling(Fm.ConditionalAffineTransform, VECTOR, [(2,), (3,)]),
    "all in one": coupling(Fm.AllInOneBlock, VECTOR),
    "all in one, soft": coupling(
        Fm.AllInOneBlock,
        VECTOR,
        [(2,)],
        permute_soft=True,
        affine_clamping=1.5,
        global_affine_type="SIGMOID",
        global_affine_init=0.7,
    ),
    "all in one, Householder": coupling(
        Fm.AllInOneBlock, VECTOR, learned_householder_permutation=2, global_affine_type="EXP"
    ),
    "all in one, image": coupling(Fm.AllInOneBlock, IMAGE, [(2, 2, 3)], reverse_permutation=True),
}


def pair(build, dtype=torch.float32):
    torch.manual_seed(0)
    plain = build().to(dtype)
    patched = copy.deepcopy(plain)
    report = fastgen.patch(patched)
    assert len(report.replaced) == 1 and not report.left
    return plain, patched


def data(args, dtype=torch.float32):
    _, shape, *conditions = args
    torch.manual_seed(1)
    return [torch.randn(6, *size, dtype=dtype) for size in (shape, *(conditions or [()])[0])]


def run(block, rev, x, *c):
    torch.manual_seed(2)
    block.zero_grad()
    leaves = [t.detach().requires_grad_() for t in (x, *c)]
    (y,), log_jacobian = block((leaves[0],), leaves[1:], rev=rev)
    (torch.sin(y).sum() + (log_jacobian * torch.randn(len(x), dtype=x.dtype)).sum()).backward()
    gradients = [t.grad for t in (*leaves, *block.parameters())]
    return [y, log_jacobian, *(g for g in gradients if g is not None)]


def assert_alike(left, right, dtype=torch.float32, **close):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(b, a, **(CLOSE[dtype] | close))


def train(block, steps, x, *c):
    optimizer = torch.optim.SGD([p for p in block.parameters() if p.requires_grad], 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (y,), log_jacobian = block((x,), c)
        (0.5 * y.square().flatten(1).sum(1) - log_jacobian).div(y[0].numel()).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_trains_as_before(name, dtype):
    build, args = CASES[name]
    if dtype == torch.float64 and "Householder" in name:
        pytest.skip("the library makes its reflections in float32")
    plain, patched = pair(build, dtype)
    batch = data(args, dtype)
    for rev in (False, True):
        assert_alike(run(plain, rev, *batch), run(patched, rev, *batch), dtype)
    train(plain, 20, *batch)
    train(patched, 20, *batch)
    assert_alike(plain.state_dict().values(), patched.state_dict().values(), dtype)
    patched.load_state_dict(plain.state_dict())
    plain.eval()
    patched.eval()
    assert_alike(run(plain, True, *batch), run(patched, True, *batch), dtype)
    plain.load_state_dict(patched.state_dict())
    fastgen.unpatch(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        "GLOWCouplingBlock ATAN",
        "RNVPCouplingBlock SIGMOID",
        "one side",
        "condition alone",
        "all in one",
    ],
)
def test_half_precision(name, dtype):
    build, args = CASES[name]
    plain, patched = pair(build)
    x, *c = (t.to(dtype) for t in data(args))
    (theirs,), their_log_jacobian = plain.to(dtype)((x,), c)
    (y,), log_jacobian = patched.to(dtype)((x,), c)
    assert (y.dtype, log_jacobian.dtype) == (theirs.dtype, their_log_jacobian.dtype)
    (exact,), _ = plain.double()((x.double(),), [t.double() for t in c])
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= (theirs - exact).abs().max() + rounding


def test_autocast():
    plain, patched = pair(CASES["all in one"][0])
    x = torch.randn(16, 5)
    (exact,), exact_log_jacobian = plain((x,))
    with torch.autocast("cpu", torch.bfloat16):
        (y,), log_jacobian = patched((x,))
        (theirs,), _ = plain((x,))
    assert y.dtype == theirs.dtype
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(log_jacobian.float(), exact_log_jacobian, rtol=0.05, atol=0.05)


LEFT = {
    "its own clamp": (
        lambda: make(Fm.GLOWCouplingBlock, VECTOR, clamp_activation=torch.sin),
        "a clamp_activation of its own",
    ),
    "its own arc tangent": (
        lambda: make(Fm.RNVPCouplingBlock, VECTOR, clamp_activation=lambda u: torch.atan(u)),
        "a clamp_activation of its own",
    ),
    "no clamp": (lambda: make(Fm.GLOWCouplingBlock, VECTOR, clamp=0), "a clamp of 0"),
    "negative": (lambda: make(Fm.AllInOneBlock, VECTOR, affine_clamping=-1.0), "a clamp of -1.0"),
    "GIN": (lambda: make(Fm.AllInOneBlock, VECTOR, gin_block=True), "gin_block=True"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_a_reason(name):
    build, reason = LEFT[name]
    block = build()
    with pytest.warns(UserWarning, match=f"(?s)nothing was replaced.*{reason}"):
        report = fastgen.patch(block)
    assert [piece.path for piece in report.left] == [""]
    with fastgen.patch("FrEIA"):
        assert type(build()) is type(block)
    x = torch.randn(3, 5)
    assert reason in fastgen.explain(block, (x,)).rejected["fastgen"]


def test_others_are_not_covered():
    block = make(Fm.NICECouplingBlock, VECTOR)
    with pytest.warns(UserWarning, match="nothing was replaced"):
        report = fastgen.patch(block)
    assert not report.left and report.others


class Pooled(nn.Module):
    """Parameters of a single pixel, or a leaf that nobody may write to."""

    def __init__(self, channels):
        super().__init__()
        self.calls = 0
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        self.calls += 1
        return x.mean((1, 2, 3)).view(-1, 1, 1, 1) + self.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize(
    "cls",
    [
        Fm.GLOWCouplingBlock,
        Fm.RNVPCouplingBlock,
        Fm.AffineCouplingOneSided,
        Fm.ConditionalAffineTransform,
        Fm.AllInOneBlock,
    ],
)
@pytest.mark.parametrize("rev", [False, True])
def test_parameters_that_broadcast_run_the_librarys_code(cls, rev, caplog):
    shape, conditions = (4, 2, 3), [(1, 2, 3)]
    plain = cls([shape], conditions, subnet_constructor=lambda _, channels: Pooled(channels))
    patched = copy.deepcopy(plain)
    fastgen.patch(patched)
    x, c = torch.randn(2, *shape), torch.randn(2, *conditions[0])
    _library.run_own_code.cache_clear()
    with caplog.at_level(logging.DEBUG, "fastgen"):
        assert_alike(run(plain, rev, x, c), run(patched, rev, x, c), rtol=0, atol=0)
    assert f"{cls.__name__}: the library's own code: parameters of shape" in caplog.text
    assert {m.calls for m in patched.modules() if isinstance(m, Pooled)} == {1}
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    (y,), _ = compiled((x,), (c,), rev=rev)
    torch.testing.assert_close(y, plain((x,), (c,), rev=rev)[0][0])


def test_calls_that_run_the_librarys_code():
    block = make(Fm.GLOWCouplingBlock, VECTOR)
    fastgen.patch(block)
    x = torch.randn(3, 5)
    assert fastgen.explain(block, (x,)).chosen == "fastgen"
    rejected = fastgen.explain(block, (x[..., None],), rev=True).rejected
    assert "an input of 3 dimensions" in rejected["fastgen"]
    assert "tensors of torch.int64" in fastgen.explain(block, (x.long(),)).rejected["fastgen"]
    block = make(Fm.AllInOneBlock, VECTOR)
    fastgen.patch(block)
    assert "an input of 3 dim" in fastgen.explain(block, (x[..., None],)).rejected["fastgen"]


class Constant(nn.Module):
    """A subnet that is its parameter."""

    def __init__(self, _, channels):
        super().__init__()
        self.value = nn.Parameter(torch.randn(3, channels))

    def forward(self, x):
        return self.value


def test_a_subnets_parameter_that_the_library_writes_to():
    plain = Fm.AllInOneBlock([(4,)], subnet_constructor=Constant)
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        plain((x,))
    value = plain.subnet.value.clone()
    fastgen.patch(plain)
    (y,), log_jacobian = plain((x,))
    (y.sum() + log_jacobian.sum()).backward()
    assert plain.subnet.value.grad is not None
    torch.testing.assert_close(plain.subnet.value, value, rtol=0, atol=0)


def sequence():
    """In the manner of the documentation's quick start."""
    inn = Ff.SequenceINN(4)
    for _ in range(4):
        inn.append(Fm.AllInOneBlock, subnet_constructor=dense, permute_soft=True)
    return inn, lambda x: inn(x), lambda z: inn(z, rev=True)


def graph():
    """In the manner of the documentation's tutorial: a conditional graph."""
    nodes = [Ff.InputNode(4, name="input")]
    condition = Ff.ConditionNode(2)
    for cls in (Fm.GLOWCouplingBlock, Fm.RNVPCouplingBlock):
        options = {"subnet_constructor": dense, "clamp": 2.0}
        nodes.append(Ff.Node(nodes[-1], cls, options, conditions=condition))
        nodes.append(Ff.Node(nodes[-1], Fm.PermuteRandom, {"seed": len(nodes)}))
    nodes.append(Ff.OutputNode(nodes[-1], name="output"))
    inn = Ff.GraphINN([*nodes, condition])
    c = torch.randn(16, 2)
    return inn, lambda x: inn(x, c=c), lambda z: inn(z, c=c, rev=True)


@pytest.mark.parametrize("build", [sequence, graph])
def test_documented_examples_under_patch(build):
    def losses():
        torch.manual_seed(0)
        numpy_seed()
        inn, forward, reverse = build()
        optimizer = torch.optim.Adam([p for p in inn.parameters() if p.requires_grad], 1e-2)
        x, values = torch.randn(16, 4), []
        for _ in range(5):
            optimizer.zero_grad()
            z, log_jacobian = forward(x)
            loss = (0.5 * z.square().sum(1) - log_jacobian).mean() / 4
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        z, _ = forward(x)
        torch.testing.assert_close(reverse(z)[0], x, rtol=1e-3, atol=1e-4)
        return inn, forward, x, [*values, z]

    plain, forward, x, expected = losses()
    with fastgen.patch("FrEIA") as report:
        assert len(report.replaced) == 5 and not report.left
        patched, forward_patched, _, actual = losses()
    assert_alike(expected, actual)
    covered = {swap.original for swap in ours.LIBRARY.swaps}
    assert {type(m) for m in plain.modules()} & covered
    assert not {type(m) for m in patched.modules()} & covered
    file = io.BytesIO()
    torch.save(patched.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert_alike(forward(x), forward_patched(x))
    fastgen.unpatch(patched)
    assert {type(m) for m in patched.modules()} & covered


def numpy_seed():
    """The permutations are numpy's and scipy's."""
    pytest.importorskip("numpy").random.seed(0)


@pytest.mark.parametrize("clamp", CLAMPS)
def test_compiles_as_one_graph(clamp):
    torch.manual_seed(0)
    block = make(Fm.GLOWCouplingBlock, VECTOR, clamp_activation=clamp)
    x = torch.randn(3, 5)
    expected = block((x,))
    fastgen.patch(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    (y,), log_jacobian = compiled((x,))
    assert_alike([expected[0][0], expected[1]], [y, log_jacobian])


@pytest.mark.parametrize("swap", ours.LIBRARY.swaps, ids=lambda swap: swap.original.__name__)
def test_fingerprints(swap):
    assert _library.fingerprint(swap.original, *swap.relies_on) == swap.fingerprint
