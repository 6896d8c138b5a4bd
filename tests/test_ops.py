"""The generated suite: every check x every row of fastgen.testing.CASES x every usable backend."""

import contextlib
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


@each([row for row in FUSED if row[0].vmap])
def test_vmap(case, device, backend):
    """A vmapped op equals the op on each slice, and so do its gradients."""
    samples = [case.sample(case.grad_shape, torch.float64, device, seed=s) for s in range(3)]
    stacked = [torch.stack([s.args[i] for s in samples]) for i in case.vmap]

    def function(*batched):
        args = list(samples[0].args)
        for i, value in zip(case.vmap, batched, strict=True):
            args[i] = value
        return run(case, Sample(tuple(args), samples[0].kwargs), backend)

    def loss(*batched):
        return sum(r.square().sum() for r in function(*batched) if r.is_floating_point())

    looped = [function(*(s[n] for s in stacked)) for n in range(3)]
    for i, actual in enumerate(torch.func.vmap(function)(*stacked)):
        torch.testing.assert_close(actual, torch.stack([results[i] for results in looped]))
    if case.grad and case.vmap[0] in case.grad:
        per_slice = torch.stack([torch.func.grad(loss)(*(s[n] for s in stacked)) for n in range(3)])
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(*stacked), per_slice)


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
