"""normal, philox_words and reparam_kl in CUDA, on the host emulator, against the reference."""

import math

import pytest
import torch

from fastgen import ops, random
from fastgen.ops.reparam_kl import reparam_kl_reference
from fastgen.testing import assert_accurate

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KEY = random.make_key(1234567, 2**32 - 3)
#: (rows, elements of a row): single elements, several short rows of one block, rows of whole
#: vectors and not, one row over several blocks.
SHAPES = ((1, 1), (3, 5), (37, 8), (2, 256), (3, 257), (2, 1032), (1, 16392), (2, 8193))
EMPTY = ((0, 4), (3, 0))


@pytest.fixture(scope="module")
def kernels(native):
    return native("emulation/noise", "-O1")


def name(dtype):
    return str(dtype).removeprefix("torch.")


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Outputs:
    """Fresh tensors full of NaN, with memory behind each that must stay as it is."""

    GUARD = 64

    def __init__(self):
        self.storages = []

    def new(self, shape, dtype):
        count = math.prod(shape)
        storage = torch.full((count + self.GUARD,), torch.nan, dtype=dtype)
        self.storages.append((storage, count))
        return storage[:count].view(shape)

    def check(self):
        assert all(s[count:].isnan().all() for s, count in self.storages), "a write out of bounds"


def rows(t):
    """What the binding takes for a tensor of rows."""
    return None if t is None else (t.data_ptr(), t.stride(0) if t.shape[0] > 1 else t.shape[1])


def address(t):
    return 0 if t is None else t.data_ptr()


def forward(kernels, mu, logvar, noise, key, seed=0):
    out = Outputs()
    z, kl = out.new(mu.shape, mu.dtype), out.new(mu.shape[:1], wide(mu.dtype))
    given = [rows(t) for t in (mu, logvar, noise)]
    written = [address(t) for t in (z, kl)]
    kernels.forward(name(mu.dtype), *mu.shape, *given, address(key), *written, seed)
    out.check()
    return z, kl


def backward(kernels, grad_z, grad_kl, mu, logvar, noise, key, seed=0):
    out = Outputs()
    grads = [out.new(mu.shape, mu.dtype) for _ in range(2 if noise is None else 3)]
    given = [rows(t) for t in (mu, logvar, noise)]
    written = [address(g) for g in (*grads, None)[:3]]
    kernels.backward(
        name(mu.dtype),
        *mu.shape,
        rows(grad_z),
        address(grad_kl),
        *given,
        address(key),
        *written,
        seed,
    )
    out.check()
    return grads


def laid_out(t, layout):
    """The same rows, elsewhere: "dense", on no vector boundary, or part of longer rows."""
    count, size = t.shape
    before, after = {"dense": (0, 0), "shifted": (1, 0), "apart": (8, 8), "odd": (3, 2)}[layout]
    storage = torch.full((count * (size + after) + before,), torch.nan, dtype=t.dtype)
    # 16-byte alignment is that of torch's allocations.
    placed = storage[before:].as_strided(t.shape, (size + after, 1), before)
    return placed.copy_(t)


def sample(shape, dtype, makes_noise, layout="dense"):
    generator = torch.Generator().manual_seed(sum(shape))
    mu, logvar, noise, grad_z = (
        laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), layout)
        for _ in range(4)
    )
    grad_kl = torch.randn(shape[0], generator=generator, dtype=wide(dtype))
    return grad_z, grad_kl, mu, logvar, None if makes_noise else noise, KEY if makes_noise else None


def with_reference(dtype, grad_z, grad_kl, mu, logvar, noise, key):
    """Outputs and gradients of plain PyTorch, computed in `dtype`."""
    made = random.normal_reference(KEY, mu.shape, wide(dtype)) if noise is None else noise
    inputs = [t.to(dtype).requires_grad_() for t in (mu, logvar)]
    inputs.append(made.to(wide(dtype) if noise is None else dtype).requires_grad_())
    z, kl = reparam_kl_reference(*inputs, None)
    cotangents = (grad_z.to(z.dtype), grad_kl.to(kl.dtype))
    grads = torch.autograd.grad((z, kl), inputs, cotangents)
    return [t.detach() for t in (z, kl, *grads[: 2 if noise is None else 3])]


def check(kernels, args, dtype, seed=0):
    grad_z, grad_kl, *inputs = args
    actual = [*forward(kernels, *inputs, seed), *backward(kernels, *args, seed)]
    plain, exact = with_reference(dtype, *args), with_reference(torch.float64, *args)
    for i, results in enumerate(zip(actual, plain, exact, strict=True)):
        assert_accurate(*results, what=f"result {i}")
    return actual


# --- reparam_kl --------------------------------------------------------------------------------


@pytest.mark.parametrize("makes_noise", (True, False), ids=("key", "noise"))
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_results_and_gradients(kernels, dtype, shape, makes_noise):
    check(kernels, sample(shape, dtype, makes_noise), dtype)


@pytest.mark.parametrize("layout", ("shifted", "apart", "odd"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
def test_layouts(kernels, dtype, layout):
    for shape in (3, 24), (2, 520):
        for makes_noise in (True, False):
            args = sample(shape, dtype, makes_noise, layout)
            assert (layout == "shifted") == args[2].is_contiguous()
            check(kernels, args, dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
def test_noise_is_that_of_normal_wherever_rows_begin(kernels, dtype):
    for shape in (5, 3), (2, 24), (3, 1031), (1, 8200):
        values = torch.empty(shape, dtype=dtype)
        kernels.normal(name(dtype), address(KEY), values.numel(), address(values), 0)
        zero = torch.zeros(shape, dtype=dtype)
        assert torch.equal(forward(kernels, zero, zero, None, KEY)[0], values)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
def test_results_depend_neither_on_the_order_of_threads_nor_on_other_rows(kernels, dtype):
    grad_z, grad_kl, *inputs = args = sample((2, 8200), dtype, True)
    first = [*forward(kernels, *inputs), *backward(kernels, *args)]
    again = [*forward(kernels, *inputs, 9), *backward(kernels, *args, 9)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    one_row = [t[:1] for t in inputs[:2]]
    assert torch.equal(forward(kernels, *one_row, None, KEY)[1], first[1][:1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=name)
@pytest.mark.parametrize("scale", (1e-1, 1e-3, 1e-5))
def test_kl_and_its_gradient_are_accurate_near_the_prior(kernels, dtype, scale):
    grad_z, grad_kl, mu, logvar, *source = sample((5, 40), dtype, True)
    mu, logvar, grad_z = (scale * mu).to(dtype), (scale * logvar).to(dtype), 0 * grad_z
    kl = forward(kernels, mu, logvar, *source)[1].double()
    m, lv = mu.double(), logvar.double()
    # expm1(x) - x by its series: in float64 the difference itself would cancel.
    series = sum(lv**k / math.factorial(k) for k in range(2, 12))
    torch.testing.assert_close(kl, 0.5 * (m**2 + series).sum(1), rtol=1e-6, atol=1e-12)
    grad_logvar = backward(kernels, grad_z, torch.ones(5), mu, logvar, *source)[1]
    ulp = {torch.float32: 5e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(grad_logvar.double(), 0.5 * torch.expm1(lv), rtol=ulp, atol=1e-7)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=name)
def test_extremes_equal_plain_pytorch(kernels, dtype):
    inf, nan = math.inf, math.nan
    values = [-inf, -1e30, -1e9, -300, -100, -1, 0, 1, 60, 88, 100, 170, 200, inf, nan]
    logvar = torch.tensor(values, dtype=dtype).repeat(3)[:, None]
    mu = torch.tensor([0, 1e20, -inf], dtype=dtype).repeat_interleave(len(values))[:, None]
    noise, ones = torch.full_like(mu, 0.5), torch.ones_like(mu)
    args = (ones, ones[:, 0].to(wide(dtype)), mu, logvar, noise, None)
    actual = [*forward(kernels, *args[2:]), *backward(kernels, *args)]
    for ours, plain in zip(actual, with_reference(dtype, *args), strict=True):
        torch.testing.assert_close(ours, plain, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_gradcheck(kernels):
    class Composed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, mu, logvar, noise):
            ctx.save_for_backward(mu, logvar, noise)
            return forward(kernels, mu, logvar, noise, None)

        @staticmethod
        def backward(ctx, grad_z, grad_kl):
            grads = (grad_z.contiguous(), grad_kl.contiguous())
            return tuple(backward(kernels, *grads, *ctx.saved_tensors, None))

    inputs = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(Composed.apply, inputs)


# --- normal and philox_words -------------------------------------------------------------------


@pytest.mark.parametrize("count", (1, 3, 4, 5, 1023, 4097))
def test_words_are_those_of_the_cpu(kernels, count):
    out = torch.empty(count, dtype=torch.int64)
    kernels.words(address(KEY), count, address(out), 0)
    assert torch.equal(out, torch.ops.fastgen.philox_words(KEY, count))


@pytest.mark.parametrize("count", (1, 7, 8, 4099, 33000))
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_normal_values(kernels, dtype, count):
    out = Outputs()
    values = out.new((count,), dtype)
    kernels.normal(name(dtype), address(KEY), count, address(values), 0)
    out.check()
    exact = ops.normal(KEY, (count,), dtype=torch.float64, backend="reference")
    error = (values.double() - exact).abs()
    if dtype in (torch.float32, torch.float64):
        rounded = exact.to(dtype).abs()
        spacing = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=dtype)) - rounded
        assert (error <= (4 if dtype == torch.float32 else 8) * spacing.double()).all()
    else:
        # The radius comes from u rounded to float32: coarse where u is nearly 1.
        half_ulp = torch.finfo(dtype).eps / 2 * exact.abs()
        pair = exact.view(-1)[: count // 2 * 2].view(-1, 2).norm(dim=1).repeat_interleave(2)
        radius = torch.cat([pair, exact.new_full((count % 2,), 0.0)])
        allowed = half_ulp + torch.where(radius < 0.02, 5e-4, 1e-5)
        assert (error <= allowed).all()


# --- sanitizers --------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ("asan", "tsan"))
def test_sanitizers_find_nothing(build, run_program):
    done = run_program(build, "noise_run")
    assert done.returncode == 0, done.stderr[-4000:]
