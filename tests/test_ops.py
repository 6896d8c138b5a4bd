"""The generated suite: every check x every row of fastgen.testing.CASES x every usable backend."""

import contextlib
import functools
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen import backends, ops
from fastgen.ops import _library
from fastgen.testing import (
    CASES,
    Sample,
    assert_accurate,
    assert_matches_reference,
    backends_here,
    gradients,
    outputs,
    relayouts,
    run,
)

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def usable(case):
    """(device, backend) pairs that can run here, the reference included; under Triton's
    interpreter, only what it runs."""
    for device in DEVICES:
        for name in backends_here(case.op, device):
            if name == "triton" or not _library.triton_interprets:
                yield device, name


ALL = [(case, device, backend) for case in CASES for device, backend in usable(case)]
FUSED = [row for row in ALL if row[2] != "reference"]


def each(rows):
    marks = {True: [pytest.mark.gpu], False: []}
    params = [
        pytest.param(*row, id=f"{row[0].id}-{row[2]}", marks=marks[row[1] == "cuda"])
        for row in rows
    ]
    return pytest.mark.parametrize("case,device,backend", params)


def each_dtype(dtypes=DTYPES):
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))


def double_inputs(case, device):
    sample = case.sample(case.grad_shape, torch.float64, device)
    args = [a.requires_grad_() if i in case.grad else a for i, a in enumerate(sample.args)]
    return args, sample.kwargs


def differentiable(case, kwargs, backend):
    """The op as a function of its differentiable outputs, for gradcheck."""

    def function(*args):
        results = run(case, Sample(args, kwargs), backend)
        return tuple(r for r in results if r.requires_grad)

    return function


# --- the registry itself -----------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted(backends.ops()))
def test_op_is_whole(op):
    assert "reference" in backends.ops()[op].implementations
    assert any(case.op == op for case in CASES), f"{op} has no OpCase row in fastgen/testing.py"
    assert (ROOT / "benchmarks" / "ops" / f"bench_{op}.py").exists(), f"{op} has no benchmark"
    assert (ROOT / "fastgen" / "ops" / f"{op}.py").exists(), f"{op} has no file of its own"
    assert op in ops.__all__
    assert getattr(ops, op).__doc__, f"{op} has no docstring"


def test_ids_are_unique():
    assert len({case.id for case in CASES}) == len(CASES)


def test_kernels_are_tested():
    """Without this, a broken build would leave nothing to compare and the suite would pass."""
    tested = {case.op for case, _, backend in FUSED if backend in ("cpu", "triton")}
    has_triton = {name for name, op in backends.ops().items() if "triton" in op.implementations}
    assert tested == (has_triton if _library.triton_interprets else set(backends.ops()))
    assert has_triton >= {"adain", "affine_coupling", "instance_norm", "rq_spline"}


# --- values and gradients ----------------------------------------------------------------------


@each(FUSED)
@each_dtype()
def test_matches_reference(case, device, backend, dtype):
    for shape in case.shapes:
        assert_matches_reference(case, backend, dtype, shape, device=device)


@each(FUSED)
@given(data=st.data())
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_random_shapes(case, device, backend, data):
    shape = tuple(data.draw(st.integers(*bounds)) for bounds in case.dims)
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16)))
    assert_matches_reference(case, backend, dtype, shape, device=device)


@each(FUSED)
def test_memory_layouts(case, device, backend):
    """Any strides: each tensor argument in turn, then all of them."""
    base = case.sample(case.shapes[0], device=device)
    tensors = [
        i for i, a in enumerate(base.args) if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    for chosen in [*([i] for i in tensors), tensors]:
        names = {name for i in chosen for name, _ in relayouts(base.args[i])}
        for name in sorted(names):
            args = list(base.args)
            for i in chosen:
                args[i] = dict(relayouts(args[i])).get(name, args[i]).detach()
            sample = Sample(
                tuple(a.requires_grad_(False) if isinstance(a, torch.Tensor) else a for a in args),
                base.kwargs,
            )
            check_layout(case, backend, sample, base, f"{case.id}: arguments {chosen} {name}")


def check_layout(case, backend, sample, base, label):
    exact = run(case, base.double(), "reference")
    plain = run(case, base, "reference")
    for results in zip(run(case, sample, backend), plain, exact, strict=True):
        assert_accurate(*results, ulps=case.ulps, what=label)
    if case.grad:
        exact = gradients(case, base.double(), "reference")
        plain = gradients(case, base, "reference")
        for results in zip(gradients(case, sample, backend), plain, exact, strict=True):
            assert_accurate(*results, ulps=case.ulps, what=f"{label}: gradient")


@each([row for row in ALL if row[0].grad and row[0].numeric_gradient])
def test_gradcheck(case, device, backend):
    args, kwargs = double_inputs(case, device)
    torch.autograd.gradcheck(differentiable(case, kwargs, backend), args)


@each([row for row in ALL if row[0].grad])
def test_gradgradcheck(case, device, backend):
    args, kwargs = double_inputs(case, device)
    torch.autograd.gradgradcheck(differentiable(case, kwargs, backend), args)


@each([row for row in FUSED if row[0].grad])
def test_only_some_gradients_wanted(case, device, backend):
    """Each differentiable argument alone gives the same gradient as all together."""
    sample = case.sample(case.shapes[0], device=device)
    every = gradients(case, sample, backend)
    for i, expected in zip(case.grad, every, strict=True):
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in sample.args]
        args[i].requires_grad_()
        results = [r for r in run(case, Sample(tuple(args), sample.kwargs), backend) if r.grad_fn]
        ones = [torch.ones_like(r) for r in results]
        (alone,) = torch.autograd.grad(results, [args[i]], ones)
        assert alone.shape == expected.shape and alone.isfinite().all()


# --- the machinery of PyTorch ------------------------------------------------------------------


class RecordRawCalls(TorchDispatchMode):
    """Collects the calls of raw fastgen operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastgen":
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls[function] = (tuple(copies), kwargs or {})
        return function(*args, **(kwargs or {}))


@each(FUSED)
def test_opcheck(case, device, backend):
    """Schema, fake kernel and aliasing of every raw operator that forward and backward call."""
    sample = case.sample(case.shapes[0], device=device)
    with RecordRawCalls() as recorded:
        gradients(case, sample, backend) if case.grad else run(case, sample, backend)
    assert recorded.calls, f"{case.id} called no raw operator"
    for function, (args, kwargs) in recorded.calls.items():
        torch.library.opcheck(function, args, kwargs)


@each(FUSED)
def test_compiles_whole_with_dynamic_shapes(case, device, backend):
    torch._dynamo.reset()
    kwargs = case.sample(case.shapes[0], device=device).kwargs

    def function(*args):
        return run(case, Sample(args, kwargs), backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in case.shapes[0], tuple(n + 1 if n > 1 else n for n in case.shapes[0]):
        sample = case.sample(shape, device=device)
        for f in function, compiled:
            args = [
                a.detach().requires_grad_() if i in case.grad else a
                for i, a in enumerate(sample.args)
            ]
            results = f(*args)
            grads = ()
            if case.grad:
                flowing = [r for r in results if r.requires_grad]
                grads = torch.autograd.grad(
                    flowing, [args[i] for i in case.grad], [torch.ones_like(r) for r in flowing]
                )
            if f is function:
                expected = (*results, *grads)
        for actual, wanted in zip((*results, *grads), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@each([row for row in FUSED if row[0].grad])
def test_torch_func(case, device, backend):
    """torch.func.grad equals autograd, and jacrev runs."""
    sample = case.sample(case.grad_shape, torch.float64, device)

    def loss(*wanted):
        args = list(sample.args)
        for i, value in zip(case.grad, wanted, strict=True):
            args[i] = value
        results = run(case, Sample(tuple(args), sample.kwargs), backend)
        return sum(r.square().sum() for r in results if r.is_floating_point())

    wanted = [sample.args[i] for i in case.grad]
    functional = torch.func.grad(loss, tuple(range(len(wanted))))(*wanted)
    leaves = [w.detach().requires_grad_() for w in wanted]
    for a, b in zip(functional, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)
    torch.func.jacrev(torch.func.grad(loss))(*wanted)


@pytest.mark.usefixtures("forward_mode")
@each([row for row in ALL if row[0].grad])
def test_forward_mode(case, device, backend):
    """The reference has it, and agrees with reverse mode; others refuse, never giving zeros."""
    sample = case.sample(case.grad_shape, torch.float64, device)

    def function(*wanted):
        args = list(sample.args)
        for i, value in zip(case.grad, wanted, strict=True):
            args[i] = value
        results = run(case, Sample(tuple(args), sample.kwargs), backend)
        return tuple(r for r in results if r.is_floating_point())

    primals = tuple(sample.args[i] for i in case.grad)
    tangents = tuple(torch.randn_like(p) for p in primals)
    if backend != "reference":
        for wanted in primals, [p.detach().requires_grad_() for p in primals]:
            with pytest.raises(NotImplementedError, match="forward mode"), forward_ad.dual_level():
                function(*map(forward_ad.make_dual, wanted, tangents))
        with pytest.raises(NotImplementedError, match="forward mode"):
            torch.func.jvp(function, primals, tangents)
        return
    results, pushed = torch.func.jvp(function, primals, tangents)
    _, pullback = torch.func.vjp(function, *primals)
    cotangents = tuple(torch.randn_like(r) for r in results)
    pulled = pullback(cotangents)
    torch.testing.assert_close(
        sum((a * b).sum() for a, b in zip(pushed, cotangents, strict=True)),
        sum((a * b).sum() for a, b in zip(pulled, tangents, strict=True)),
    )


class Slices:
    """Four samples of a row, stacked, and the op as a function of one slice of each argument."""

    def __init__(self, case, device, backend):
        samples = [case.sample(case.grad_shape, torch.float64, device, seed=s) for s in range(4)]
        self.case, self.backend, self.first = case, backend, samples[0]
        self.stacked = [torch.stack([s.args[i] for s in samples]) for i in case.vmap]
        self.wanted = tuple(n for n, i in enumerate(case.vmap) if i in case.grad)

    def function(self, *slices):
        args = list(self.first.args)
        for i, value in zip(self.case.vmap, slices, strict=True):
            args[i] = value
        return run(self.case, Sample(tuple(args), self.first.kwargs), self.backend)

    def loss(self, *slices, function=None):
        results = (self.function if function is None else function)(*slices)
        return sum(r.square().sum() for r in results if r.is_floating_point())

    def total(self, *stacked):
        """The loss of all slices, by vmap."""
        return self.loss(*stacked, function=torch.vmap(self.function))

    def nested(self, *stacked):
        """As `total`, by vmap in vmap over 2 x 2 slices."""
        split = [s.unflatten(0, (2, 2)) for s in stacked]
        return self.loss(*split, function=torch.vmap(torch.vmap(self.function), 1, 1))

    def one_by_one(self, function):
        """The results of `function`, a tensor or several, for each slice alone, stacked."""
        results = [outputs(function(*(s[n] for s in self.stacked))) for n in range(4)]
        return tuple(map(torch.stack, zip(*results, strict=True)))

    def leaves(self, tensors):
        return [t.clone().requires_grad_(n in self.wanted) for n, t in enumerate(tensors)]

    def gradient(self, loss, tensors, create_graph=False):
        """By autograd, without torch.func."""
        leaves = tensors if create_graph else self.leaves(tensors)
        wanted = [leaves[n] for n in self.wanted]
        return torch.autograd.grad(loss(*leaves), wanted, create_graph=create_graph)

    def second(self, loss, tensors):
        """By autograd, the gradient of the squared norm of the gradient."""
        return self.gradient(
            lambda *leaves: norm_of(self.gradient(loss, leaves, create_graph=True)), tensors
        )


def norm_of(gradient):
    return sum(g.square().sum() for g in gradient)


def assert_all_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


VMAPPED = [row for row in ALL if row[0].vmap]
VMAPPED_GRADIENTS = [row for row in VMAPPED if set(row[0].vmap) & set(row[0].grad)]


@each(VMAPPED)
def test_vmap(case, device, backend):
    """A vmapped op equals the op on each slice, whatever the dimension and in vmap too."""
    slices = Slices(case, device, backend)
    expected = slices.one_by_one(slices.function)
    assert_all_close(torch.vmap(slices.function)(*slices.stacked), expected)
    last = [s.movedim(0, -1) for s in slices.stacked]
    assert_all_close(torch.vmap(slices.function, -1)(*last), expected)
    split = [s.unflatten(0, (2, 2)) for s in slices.stacked]
    nested = torch.vmap(torch.vmap(slices.function), 1, 1)(*split)
    assert_all_close([r.flatten(0, 1) for r in nested], expected)


# PyTorch's index_add itself has no vmap over no slices.
@each([row for row in VMAPPED if (row[0].op, row[2]) != ("vq_codebook_stats", "reference")])
def test_vmap_over_no_slices(case, device, backend):
    slices = Slices(case, device, backend)
    none = [s[:0] for s in slices.stacked]
    for one, actual in zip(
        slices.function(*(s[0] for s in slices.stacked)),
        torch.vmap(slices.function)(*none),
        strict=True,
    ):
        assert (actual.shape, actual.dtype) == ((0, *one.shape), one.dtype)
    if slices.wanted:
        for n, gradient in zip(slices.wanted, slices.gradient(slices.total, none), strict=True):
            assert gradient.shape == none[n].shape


@each(VMAPPED_GRADIENTS)
def test_gradients_through_vmap(case, device, backend):
    """In every order of vmap and gradient they are those of each slice alone."""
    slices = Slices(case, device, backend)
    stacked, wanted = slices.stacked, slices.wanted
    expected = slices.one_by_one(lambda *s: slices.gradient(slices.loss, s))
    assert all(g.any() for g in expected)
    for loss in slices.total, slices.nested:
        assert_all_close(slices.gradient(loss, stacked), expected)
        assert_all_close(torch.func.grad(loss, wanted)(*stacked), expected)
    assert_all_close(torch.vmap(torch.func.grad(slices.loss, wanted))(*stacked), expected)

    def vmapped(*leaves):
        results = torch.vmap(slices.function)(*leaves)
        return torch.cat([r.flatten() for r in results if r.is_floating_point()])

    jacobian = torch.func.jacrev(vmapped, wanted)(*stacked)
    results = vmapped(*stacked)
    assert_all_close([torch.tensordot(2 * results, j, 1) for j in jacobian], expected)


@each([row for row in VMAPPED_GRADIENTS if len(row[0].vmap) > 1])
def test_gradients_of_what_slices_share(case, device, backend):
    """An argument outside the batch, as the parameters of a model: the sum over the slices."""
    slices = Slices(case, device, backend)
    for shared in slices.wanted:
        tensors = list(slices.stacked)
        tensors[shared] = tensors[shared][:1].expand_as(tensors[shared])
        every = slices.gradient(slices.total, tensors)[slices.wanted.index(shared)]
        tensors[shared] = tensors[shared][0]
        in_dims = tuple(None if n == shared else 0 for n in range(len(tensors)))
        function = torch.vmap(slices.function, in_dims)
        loss = functools.partial(slices.loss, function=function)
        for gradient in (
            slices.gradient(loss, tensors)[slices.wanted.index(shared)],
            torch.func.grad(loss, shared)(*tensors),
        ):
            torch.testing.assert_close(gradient, every.sum(0))


@each(VMAPPED_GRADIENTS)
def test_second_order_through_vmap(case, device, backend):
    slices = Slices(case, device, backend)
    stacked, wanted = slices.stacked, slices.wanted

    def penalty(loss):
        return lambda *leaves: norm_of(torch.func.grad(loss, wanted)(*leaves))

    expected = slices.one_by_one(lambda *s: slices.second(slices.loss, s))
    assert all(g.any() for g in expected)
    for loss in slices.total, slices.nested:
        assert_all_close(slices.second(loss, stacked), expected)
        assert_all_close(torch.func.grad(penalty(loss), wanted)(*stacked), expected)
    each_slice = torch.func.grad(penalty(slices.loss), wanted)
    assert_all_close(torch.vmap(each_slice)(*stacked), expected)

    def penalties(*leaves):
        return torch.vmap(penalty(slices.loss))(*leaves).sum()

    assert_all_close(torch.func.grad(penalties, wanted)(*stacked), expected)
    assert_all_close(slices.gradient(penalties, stacked), expected)


@each([row for row in VMAPPED_GRADIENTS if row[2] != "reference"])
def test_gradients_through_vmap_in_compiled_code(case, device, backend):
    """Traced whole: vmap in vmap for autograd, and torch.func's gradient between the two."""
    torch._dynamo.reset()
    slices = Slices(case, device, backend)
    split = [s.unflatten(0, (2, 2)) for s in slices.stacked]

    def function(leaves):
        between = torch.vmap(torch.func.grad(slices.total, slices.wanted))(*split)
        return slices.nested(*leaves), between

    leaves = slices.leaves(slices.stacked)
    loss, between = torch.compile(function, fullgraph=True, backend="aot_eager")(leaves)
    recorded = torch.autograd.grad(loss, [leaves[n] for n in slices.wanted])
    torch.testing.assert_close(loss, slices.one_by_one(slices.loss)[0].sum())
    expected = slices.one_by_one(lambda *s: slices.gradient(slices.loss, s))
    assert_all_close(recorded, expected)
    assert_all_close([g.flatten(0, 1) for g in between], expected)


@each([row for row in ALL if len(row[0].grad) > 1])
def test_autocast_promotes(case, device, backend):
    """Under autocast one bfloat16 argument among float32 ones gives what all-float32 gives."""
    sample = case.sample(case.shapes[0], device=device)
    args = list(sample.args)
    args[case.grad[0]] = args[case.grad[0]].bfloat16()
    widened = list(args)
    widened[case.grad[0]] = args[case.grad[0]].float()
    with torch.autocast(device, torch.bfloat16):
        mixed = run(case, Sample(tuple(args), sample.kwargs), backend)
    for a, b in zip(mixed, run(case, Sample(tuple(widened), sample.kwargs), backend), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- determinism -------------------------------------------------------------------------------


def everything(case, sample, backend):
    return (*run(case, sample, backend), *(gradients(case, sample, backend) if case.grad else ()))


@each(FUSED)
@each_dtype((torch.float32, torch.bfloat16))
def test_same_bits_for_every_thread_count(case, device, backend, dtype, threads):
    """On a GPU: the same bits for every run. Triton's interpreter has no threads."""
    interpreted = backend == "triton" and device == "cpu"
    for shape in (case.shapes[0],) if interpreted else (case.big_shape, case.shapes[0]):
        sample = case.sample(shape, dtype, device)
        threads(1)
        expected = everything(case, sample, backend)
        for count in (2, 3, 2) if backend == "cpu" else (1,):
            threads(count)
            for a, b in zip(everything(case, sample, backend), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@each([row for row in FUSED if row[2] == "cpu"])
@pytest.mark.parametrize("name", ("portable", "avx2", "avx512"))
@each_dtype((torch.float32, torch.float64, torch.bfloat16))
def test_every_instruction_set(case, device, backend, name, dtype, isa):
    if not isa(name):
        pytest.skip(f"this machine has no {name}")
    for shape in case.shapes:
        assert_matches_reference(case, backend, dtype, shape)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_arguments_are_named(case):
    """Not a tensor, not floating, on another device, an unknown backend: each is named."""
    sample = case.sample(case.shapes[0])
    function = getattr(ops, case.op)
    names = function.__code__.co_varnames
    for i, value in enumerate(sample.args):
        if not isinstance(value, torch.Tensor):
            continue

        def replaced(new, i=i):
            return [new if j == i else a for j, a in enumerate(sample.args)]

        with pytest.raises(TypeError, match=rf"^{names[i]}: expected .* got"):
            function(*replaced([1.0, 2.0]), **sample.kwargs)
        with pytest.raises(TypeError, match=r"^\w+: expected .* got"):
            function(*replaced(value.to(torch.complex64)), **sample.kwargs)
        if i > 0:
            with pytest.raises(
                ValueError, match=rf"^{names[i]}: expected the device of .* got meta"
            ):
                function(*replaced(value.to("meta")), **sample.kwargs)
    with pytest.raises(ValueError, match="backend: .* has .*; got 'gpu'"):
        function(*sample.args, **sample.kwargs, backend="gpu")


def unusual(value):
    """Tensors of the dtypes and layouts that no op takes, with the elements of `value`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield value.to(torch.float8_e4m3fn)
        yield value.to_sparse()
        yield torch.nested.nested_tensor([value, value])
        yield torch.nested.nested_tensor([value[None], value[None]], layout=torch.jagged)
        if value.dim() == 2:
            yield value.to_sparse_csr()
        if value.dtype == torch.float32:
            yield value.to_mkldnn()
            yield torch.quantize_per_tensor(value, 0.1, 0, torch.quint8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_unusual_tensors_are_named(case):
    sample = case.sample(case.grad_shape)
    function = getattr(ops, case.op)
    given = list(zip(function.__code__.co_varnames, sample.args, strict=False))
    for name, value in given + list(sample.kwargs.items()):
        if not isinstance(value, torch.Tensor):
            continue
        for new in unusual(value):
            for autocast in (False, True):
                with (
                    torch.autocast("cpu", torch.bfloat16, enabled=autocast),
                    pytest.raises(TypeError, match=rf"^{name}: expected .*, got "),
                ):
                    function(**dict(given) | sample.kwargs | {name: new})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_meta_tensors_have_the_right_shapes(case):
    """The fake kernels agree with the real ones on shape and dtype, through the public op."""
    sample = case.sample(case.shapes[0])
    real = run(case, sample)
    with contextlib.ExitStack() as stack:
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = stack.enter_context(FakeTensorMode())
        fake = run(case, sample.map(mode.from_tensor))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
