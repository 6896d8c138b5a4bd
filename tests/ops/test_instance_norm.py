"""What is special to instance_norm and adain: accuracy, layouts, planes that are not finite."""

import functools
import itertools

import pytest
import torch
from torch.nn import functional as F

from fastgen import ops
from fastgen.ops import _library
from fastgen.ops.instance_norm import instance_norm_with_stats, second_order_reference
from fastgen.testing import assert_accurate, backends_here

#: What runs by default here: under Triton's interpreter its kernels, else the CPU's.
FUSED = backends_here("instance_norm")[0]
ISAS = ("portable",) if _library.triton_interprets else ("portable", "avx2", "avx512")

REDUCED = (torch.float32, torch.float16, torch.bfloat16)
PLANES = ((2,), (3,), (4,), (5,), (257,), (33, 65), (4097,), (65537,), (512, 512))
SMALL_PLANES = (*range(1, 20), 32, 63, 64, 65)
SPATIAL = ((7, 9), (3, 5, 4), (130, 131))
EXACT_SIZES = (16, 1024, 65536)
EPSILONS = (1e-12, 1e-5, 10.0, 1e6)
if _library.triton_interprets:
    # What is long for the kernels of the CPU takes minutes there, and no other way.
    PLANES, SPATIAL, EXACT_SIZES = PLANES[:-1], SPATIAL[:-1], EXACT_SIZES[:-1]
    SMALL_PLANES = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65)
    EPSILONS = EPSILONS[::3]

of_the_cpu = pytest.mark.skipif(
    _library.triton_interprets, reason="of the CPU kernels: their threads, their way to memory"
)


def exact_instance_norm(x, weight, bias, eps):
    """The formula in float64 on the same values."""
    return ops.instance_norm(
        x.double(), weight.double(), bias.double(), eps=eps, backend="reference"
    )


def assert_no_worse(actual, plain, exact, backend, what="output"):
    """Within one unit in the last place of torch's own error; for the reference, a composition of
    float32 operations each of which rounds, within twice that and four units of the largest."""
    if backend == "reference":
        largest = exact.abs().amax().expand_as(exact)
        assert_accurate(actual, plain, exact, magnitude=largest, what=what)
    else:
        assert_accurate(actual, plain, exact, factor=1, ulps=1, what=what)


def affine(channels, dtype):
    return torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)


def with_leaves(*tensors):
    return [t.detach().requires_grad_() for t in tensors]


# --- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", backends_here("instance_norm"))
@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.parametrize("mean", (0.0, 1.0, 1e2, 1e4))
@pytest.mark.parametrize("plane", PLANES, ids=str)
def test_no_worse_than_torch(plane, mean, dtype, backend):
    """Within one unit in the last place of torch's own error, mean/std up to 1e4, gradients too."""
    x = (torch.randn(2, 3, *plane) + mean).to(dtype)
    weight, bias = affine(3, dtype)
    cotangent = torch.randn(x.shape).to(dtype)
    exact_leaves = with_leaves(x.double(), weight.double(), bias.double())
    plain_leaves, leaves = with_leaves(x, weight, bias), with_leaves(x, weight, bias)
    exact = exact_instance_norm(*exact_leaves, 1e-5)
    plain = F.instance_norm(plain_leaves[0], weight=plain_leaves[1], bias=plain_leaves[2])
    actual = ops.instance_norm(*leaves, backend=backend)
    assert_no_worse(actual, plain, exact, backend)
    grads = [
        torch.autograd.grad(y, inputs, cotangent.to(y.dtype))
        for y, inputs in ((actual, leaves), (plain, plain_leaves), (exact, exact_leaves))
    ]
    for name, results in zip(("x", "weight", "bias"), zip(*grads, strict=True), strict=True):
        assert_no_worse(*results, backend, f"gradient of {name}")


def first_and_second_order(function, x, scale, shift, grad_y, u, p, q):
    """Gradients by (x, scale, shift), and those of their products with (u, p, q) by (grad_y, x,
    scale)."""
    x, scale, shift, grad_y = with_leaves(x, scale, shift, grad_y)
    y = function(x, scale, shift)
    first = torch.autograd.grad(y, (x, scale, shift), grad_y, create_graph=True)
    loss = sum((g * t).sum() for g, t in zip(first, (u, p, q), strict=True))
    return *first, *torch.autograd.grad(loss, (grad_y, x, scale))


def plain_adain(x, scale, shift):
    return F.instance_norm(x) * scale[..., None, None] + shift[..., None, None]


def plain_instance_norm(x, weight, bias):
    return F.instance_norm(x, weight=weight, bias=bias)


GRADIENTS = ("x", "scale", "shift", "grad_y, second", "x, second", "scale, second")
NORMS = {
    ops.adain: (plain_adain, lambda shape: shape[:2]),
    ops.instance_norm: (plain_instance_norm, lambda shape: shape[1:2]),
}


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("backend", [*ISAS, "reference"])
@pytest.mark.parametrize("mean", (1.0, 1e2, 1e3, 1e4))
@pytest.mark.parametrize("op", NORMS)
def test_second_order_is_no_worse_than_torch(op, mean, backend, channels_last, isa):
    """The fused backend on every instruction set, and the reference."""
    if backend != "reference" and not isa(backend):
        pytest.skip(f"this machine has no {backend}")
    backend = "reference" if backend == "reference" else FUSED
    plain_function, parameter_shape = NORMS[op]
    for shape in (2, 3, 16, 16), (2, 20, 33, 35):
        x, grad_y, u = torch.randn(shape) + mean, torch.randn(shape), torch.randn(shape)
        arguments = (x, *torch.randn(2, *parameter_shape(shape)), grad_y, u)
        arguments += tuple(torch.randn(2, *parameter_shape(shape)))
        doubles = [t.double() for t in arguments]
        exact = first_and_second_order(functools.partial(op, backend="reference"), *doubles)
        plain = first_and_second_order(plain_function, *arguments)
        if channels_last:
            arguments = [
                t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
                for t in arguments
            ]
        actual = first_and_second_order(functools.partial(op, backend=backend), *arguments)
        for name, results in zip(GRADIENTS, zip(actual, plain, exact, strict=True), strict=True):
            assert_no_worse(*results, backend, f"gradient of {name}")


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("mean", (0.0, 1e2, 1e4, 1e6))
def test_error_does_not_grow_with_the_mean(mean, isa_name, channels_last, isa):
    if not isa(isa_name):
        pytest.skip(f"this machine has no {isa_name}")
    x = torch.randn(2, 20, 61, 67) + mean
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    exact = ops.instance_norm(x.double(), backend="reference")
    error = (ops.instance_norm(x, backend=FUSED).double() - exact).abs()
    # Four roundings: of x - mean, of the factor, of the product and, without fma, of the sum.
    assert (error <= 4 * 2.0**-24 * exact.abs() + 1e-12).all()


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("dtype", (*REDUCED, torch.float64))
def test_small_planes(dtype, isa_name, isa):
    """Planes that are lanes of vectors, and those just too large for it; 35 leave lanes unused."""
    if not isa(isa_name):
        pytest.skip(f"this machine has no {isa_name}")
    for size in SMALL_PLANES:
        base = torch.randn(5, 8, size).to(dtype) * 2 + 3
        cotangent = torch.randn(5, 7, size).to(dtype)
        for x in base[:, 1:].contiguous(), base[:, 1:]:
            scale, shift = torch.randn(5, 7).to(dtype), torch.randn(5, 7).to(dtype)
            leaves, exact_leaves = (
                with_leaves(x, scale, shift),
                with_leaves(x.double(), scale.double(), shift.double()),
            )
            y = ops.adain(*leaves, backend=FUSED)
            exact = ops.adain(*exact_leaves, backend="reference")
            tolerance = 64 * torch.finfo(dtype).eps
            torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
            grads = torch.autograd.grad(y, leaves, cotangent)
            expected = torch.autograd.grad(exact, exact_leaves, cotangent.double())
            for a, b in zip(grads, expected, strict=True):
                # Planes of two or three elements can be nearly constant, and 1 / std large.
                bound = tolerance * max(1.0, b.abs().max().item())
                torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=bound)


def test_an_outlier_at_the_start_does_not_spoil_the_variance():
    """The first element is the origin of the sums: the worst case for cancellation."""
    for n in 200, 100_000:
        x = torch.randn(1, 1, n, dtype=torch.float64)
        x[..., 0] = 1e6
        expected = ops.instance_norm(x, backend="reference")
        torch.testing.assert_close(
            ops.instance_norm(x, backend=FUSED), expected, rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize("dtype", (*REDUCED, torch.float64))
@pytest.mark.parametrize("value", (0.0, 0.1, -3e4))
def test_constant_planes_give_the_bias(value, dtype):
    x = torch.full((2, 3, 37, 19), value, dtype=dtype)
    bias = torch.tensor([0.5, -1.0, 0.0], dtype=dtype)
    expected = bias[:, None, None].expand(x.shape)
    for layout in torch.contiguous_format, torch.channels_last:
        y = ops.instance_norm(x.contiguous(memory_format=layout), None, bias, eps=1e-12)
        assert torch.equal(y, expected)


def test_a_single_element_gives_the_bias_and_no_gradient():
    x, bias = with_leaves(torch.randn(3, 4, 1), torch.randn(4))
    y = ops.instance_norm(x, None, bias)
    assert torch.equal(y, bias[:, None].expand(3, 4, 1))
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
    assert torch.equal(grad_x, torch.zeros_like(x))
    assert torch.equal(grad_bias, torch.full((4,), 3.0))


def signs(*shape):
    """Values in {-1, 0, 1}: with a power of two of them, mean and variance are exact in float64."""
    return torch.randint(-1, 2, shape).float()


@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.parametrize("size", EXACT_SIZES)
def test_order_does_not_matter_where_sums_are_exact(size, dtype):
    """Bitwise: any order of elements, any layout, any width of vectors."""
    x = signs(2, 8, size, 1).to(dtype)
    scale, shift = torch.randn(2, 8).to(dtype), torch.randn(2, 8).to(dtype)
    expected = ops.adain(x, scale, shift)
    order = torch.randperm(size)
    assert torch.equal(ops.adain(x[:, :, order], scale, shift), expected[:, :, order])
    last = x.view(2, 8, 16, -1).contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.adain(last, scale, shift).reshape(x.shape), expected)


@pytest.mark.parametrize("isa_name", ISAS)
def test_exact_values(isa_name, isa):
    """Mean 1, variance 4, eps 12: rstd is 1/4 and every value is exact."""
    if not isa(isa_name):
        pytest.skip(f"this machine has no {isa_name}")
    for dtype in (*REDUCED, torch.float64):
        x = torch.tensor([3.0, -1.0], dtype=dtype).repeat(2, 3, 1000)
        scale = torch.tensor([[4.0, 8.0, -2.0], [0.0, 1.0, 16.0]], dtype=dtype)
        shift = torch.tensor([[0.5, 1.0, 2.0], [-3.0, 0.0, 0.25]], dtype=dtype)
        expected = (x - 1) / 4 * scale[..., None] + shift[..., None]
        assert torch.equal(ops.adain(x, scale, shift, eps=12.0), expected)


# --- values that are not finite, or nearly not --------------------------------------------------


@pytest.mark.parametrize("position", (0, 300, 20_000))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("channels_last", (False, True))
def test_a_bad_element_spoils_its_plane_only(value, position, channels_last):
    x = torch.randn(2, 4, 150, 150)
    x[1, 2].view(-1)[position] = value
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y, expected = ops.instance_norm(x), F.instance_norm(x)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert y[1, 2].isnan().all() and y.isnan().sum() == 150 * 150


@pytest.mark.parametrize(
    "values",
    (
        [3e38, 3e38, 3e38, -3e38],
        [3e38, -3e38, 0.0, 1.0],
        [1e30, 2e30, 3e30, 4e30],
        [1e-40, 2e-40, 3e-40, 4e-40],
        [1e-45, 0.0, 0.0, 0.0],
    ),
    ids=str,
)
def test_extreme_values_stay_finite(values):
    if FUSED == "triton" and max(values) > 1e38:
        pytest.skip("sums and differences overflow float32, as in torch on a GPU")
    x = torch.tensor(values).repeat(1, 1, 100)
    exact = ops.instance_norm(x.double(), backend="reference")
    y = ops.instance_norm(x, backend=FUSED)
    assert F.instance_norm(x).isfinite().all() and y.isfinite().all()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("size", (25, 1000))
@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("backend", [*ISAS, "reference"])
@pytest.mark.parametrize("op", NORMS)
def test_gradients_of_a_tiny_deviation(op, backend, channels_last, size, isa):
    """Powers of 1 / std leave the range of float32, gradients of first and second order do not."""
    if backend != "reference" and not isa(backend):
        pytest.skip(f"this machine has no {backend}")
    backend = "reference" if backend == "reference" else FUSED
    shape, eps = (2, 3, size, 1), 1e-45
    x, grad_y, u = torch.randn(shape) * 1e-20, torch.randn(shape), torch.randn(shape) * 1e-20
    if channels_last:
        x = x.expand(2, 3, size, 2).contiguous(memory_format=torch.channels_last)
        grad_y, u = grad_y.expand_as(x), u.expand_as(x)
    parameter_shape = NORMS[op][1](shape)
    arguments = [x, *torch.randn(2, *parameter_shape), grad_y, u, *torch.randn(2, *parameter_shape)]
    doubles = [t.double() for t in arguments]
    exact = first_and_second_order(functools.partial(op, eps=eps, backend="reference"), *doubles)
    actual = first_and_second_order(functools.partial(op, eps=eps, backend=backend), *arguments)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=1e-6 * e.abs().max().item())


# --- layouts and threads ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*REDUCED, torch.float64))
@pytest.mark.parametrize("channels", (2, 3, 16, 17, 130))
@pytest.mark.parametrize("spatial", SPATIAL)
def test_channels_last_is_kept(spatial, channels, dtype):
    layout = torch.channels_last if len(spatial) == 2 else torch.channels_last_3d
    base = (torch.randn(2, channels, *spatial) * 3 + 5).to(dtype)
    scale, shift = torch.randn(2, channels).to(dtype), torch.randn(2, channels).to(dtype)
    cotangent = torch.randn(base.shape).to(dtype)
    results = []
    for x, grad_y in (
        (base, cotangent),
        (base.contiguous(memory_format=layout), cotangent),
        (base.contiguous(memory_format=layout), cotangent.contiguous(memory_format=layout)),
    ):
        leaves = with_leaves(x, scale, shift)
        y = ops.adain(*leaves, backend=FUSED)
        grads = torch.autograd.grad(y, leaves, grad_y)
        assert y.stride() == x.stride() and grads[0].stride() == x.stride()
        results.append((y, *grads))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            tolerance = (256 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_planes_with_gaps_are_read_as_they_lie():
    x = torch.randn(4, 6, 9, 11)
    scale, shift = torch.randn(4, 6), torch.randn(4, 6)
    expected = ops.adain(x, scale, shift)
    assert torch.equal(ops.adain(x[:, ::2], scale[:, ::2], shift[:, ::2]), expected[:, ::2])
    assert torch.equal(ops.adain(x[1::2], scale[1::2], shift[1::2]), expected[1::2])
    assert torch.equal(ops.adain(x.flip(0), scale.flip(0), shift.flip(0)), expected.flip(0))
    swapped = x.transpose(2, 3)
    assert torch.equal(
        ops.adain(swapped, scale, shift), ops.adain(swapped.contiguous(), scale, shift)
    )
    one = x[:1, :1].expand(3, 2, 9, 11)
    ones = torch.ones(3, 2)
    assert torch.equal(ops.adain(one, ones, ones), ops.adain(one.contiguous(), ones, ones))


@of_the_cpu
@pytest.mark.parametrize(
    "shape,channels_last",
    (((1, 1, 700, 701), False), ((1, 5, 300, 301), True), ((3, 2, 200, 201), True)),
)
def test_few_large_planes_do_not_depend_on_threads(shape, channels_last, threads):
    x = torch.randn(shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    cotangent = torch.randn(shape)
    results = []
    for count in 1, 2, 3, 8:
        threads(count)
        leaves = with_leaves(x, torch.ones(shape[1]), torch.zeros(shape[1]))
        y = ops.instance_norm(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, cotangent)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@of_the_cpu
def test_parameter_gradients_of_many_planes_do_not_depend_on_threads(threads):
    x, cotangent = torch.randn(80, 513, 5), torch.randn(80, 513, 5)
    results = []
    for count in 1, 2, 3:
        threads(count)
        weight = torch.ones(513, requires_grad=True)
        results.append(torch.autograd.grad(ops.instance_norm(x, weight), weight, cotangent)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# --- parameters, statistics, second order --------------------------------------------------------


def test_weight_and_bias_are_independent():
    x = torch.randn(2, 3, 5, 5)
    weight, bias = affine(3, torch.float32)
    plain = ops.instance_norm(x)
    torch.testing.assert_close(ops.instance_norm(x, weight), plain * weight[:, None, None])
    torch.testing.assert_close(ops.instance_norm(x, None, bias), plain + bias[:, None, None])


@pytest.mark.parametrize("backend", backends_here("instance_norm"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_input_takes_float32_parameters(dtype, backend):
    x, weight, bias = with_leaves(
        torch.randn(2, 3, 20, 20).to(dtype), torch.randn(3), torch.randn(3)
    )
    y = ops.instance_norm(x, weight, bias, backend=backend)
    expected = F.instance_norm(x.float(), weight=weight, bias=bias)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)
    grads = torch.autograd.grad(y.float().square().sum(), (x, weight, bias))
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("backend", backends_here("instance_norm"))
def test_statistics(backend):
    x = (torch.randn(2, 3, 40, 41) * 2 + 100).requires_grad_()
    y, mean, var = instance_norm_with_stats(x, backend=backend)
    assert torch.equal(y, ops.instance_norm(x, backend=backend))
    torch.testing.assert_close(mean.double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)
    expected = x.double().var((2, 3), correction=0)
    torch.testing.assert_close(var.double(), expected, rtol=1e-5, atol=0)
    assert y.requires_grad and not mean.requires_grad and not var.requires_grad


@pytest.mark.parametrize("eps", EPSILONS)
@pytest.mark.parametrize("op", ("instance_norm", "bare", "adain"))
def test_second_order_for_any_eps(op, eps):
    x = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    shape = {"instance_norm": (2,), "adain": (2, 2), "bare": ()}[op]
    scale, shift = with_leaves(*torch.randn(2, *shape, dtype=torch.float64))

    def function(x, *parameters):
        function = ops.adain if op == "adain" else ops.instance_norm
        return function(x, *parameters, eps=eps, backend=FUSED)

    inputs = (x,) if op == "bare" else (x, scale, shift)
    torch.autograd.gradcheck(function, inputs)
    torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("in_dims", ((0, None, None), (None, 0, 1), (2, 1, None)))
def test_vmap_over_some_arguments(in_dims):
    """Weight and bias (C,) may be shared by the vmapped inputs, or the input by them."""
    tensors = [torch.randn(3, 5, 6, 2), torch.randn(5), torch.randn(5)]
    for i, dim in enumerate(in_dims):
        if dim is not None:
            tensors[i] = torch.stack([tensors[i] + k for k in range(4)], dim)

    def loss(*args):
        return ops.instance_norm(*args, backend=FUSED).pow(3).sum()

    function = torch.func.grad(loss, (0, 1, 2))
    slices = zip(
        *([t] * 4 if d is None else t.unbind(d) for t, d in zip(tensors, in_dims, strict=True)),
        strict=True,
    )
    expected = [torch.stack(parts) for parts in zip(*(function(*s) for s in slices), strict=True)]
    for a, b in zip(torch.func.vmap(function, in_dims)(*tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradient_penalty_equals_the_reference():
    """The use of second order: a penalty on the input gradient, differentiated by everything."""
    x, scale, shift = with_leaves(torch.randn(2, 3, 6, 6), torch.randn(2, 3), torch.randn(2, 3))
    results = []
    for backend in FUSED, "reference":
        y = ops.adain(x, scale, shift, backend=backend).tanh()
        (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad_x.square().sum(), (x, scale, shift)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def second_order_arguments(shape, dtype, per_plane, channels_last=False):
    """Arguments of raw operator instance_norm_bwd_bwd."""
    grad_y, x, u = (torch.randn(shape).to(dtype) + k for k in range(3))
    if channels_last:
        grad_y, x, u = (t.contiguous(memory_format=torch.channels_last) for t in (grad_y, x, u))
    scale, p, q = torch.randn(3, *(shape[:2] if per_plane else shape[1:2])).to(dtype)
    _, mean, var = torch.ops.fastgen.instance_norm_fwd(x, None, None, 1e-3)
    return [grad_y, x, mean, var, scale, u, p, q, 1e-3]


def check_second_order(args):
    exact_args = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    exact = second_order_reference(*exact_args)
    results = torch.ops.fastgen.instance_norm_bwd_bwd(*args)
    for a, b in zip(results, exact, strict=True):
        tolerance = 64 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item()
        )
    assert all(r.stride() == args[1].stride() for r in results[:2])


@pytest.mark.parametrize("absent", ((), (4,), (5,), (6, 7), (4, 6, 7)), ids=str)
@pytest.mark.parametrize("per_plane", (False, True))
@pytest.mark.parametrize("dtype", (*REDUCED, torch.float64))
def test_second_order_is_the_formula(dtype, per_plane, absent):
    """Any of scale and the gradients by the backward's results may be absent."""
    for channels_last in False, True:
        args = second_order_arguments((3, 5, 6, 7), dtype, per_plane, channels_last)
        check_second_order([None if i in absent else a for i, a in enumerate(args)])


@pytest.mark.parametrize("per_plane", (False, True))
def test_second_order_operator_is_sound(per_plane):
    args = second_order_arguments((2, 3, 4, 5), torch.float32, per_plane)
    torch.library.opcheck(torch.ops.fastgen.instance_norm_bwd_bwd.default, tuple(args))
    empty = second_order_arguments((2, 3, 0, 5), torch.float32, per_plane)
    assert torch.ops.fastgen.instance_norm_bwd_bwd(*empty)[2].eq(0).all()


def test_third_order():
    x = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    scale, shift = with_leaves(*torch.randn(2, 2, 2, dtype=torch.float64))
    cotangent = torch.randn(x.shape, dtype=torch.float64, requires_grad=True)

    def gradient(*inputs):
        y = ops.adain(*inputs[:3], backend=FUSED)
        return torch.autograd.grad(y, inputs[:3], inputs[3], create_graph=True)

    torch.autograd.gradgradcheck(gradient, (x, scale, shift, cotangent))


# --- the ways of the Triton kernels ---------------------------------------------------------------

interpreted = pytest.mark.skipif(
    not _library.triton_interprets, reason="for Triton's interpreter, TRITON_INTERPRET=1"
)
#: What makes small planes take each way: elements of a whole plane and of a tile, programs wanted.
WAYS = {"whole": (16384, 16384, 1024), "swept": (1, 128, 1), "cut": (1, 128, 16)}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    from fastgen.kernels import instance_norm as kernels

    whole, tile, programs = WAYS[request.param]
    monkeypatch.setattr(kernels, "_WHOLE", whole)
    monkeypatch.setattr(kernels, "_CHUNK", (tile,) * 3)
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    plan, taken = kernels._plan, []
    monkeypatch.setattr(kernels, "_plan", lambda *a: taken.append(plan(*a)) or taken[-1])
    yield request.param
    assert {p.phase for p in taken} >= {request.param}


@interpreted
@pytest.mark.parametrize("dtype", (*REDUCED, torch.float64))
def test_every_way_gives_the_same(way, dtype):
    """Sizes that leave parts of tiles, of groups of planes and of cuts empty."""
    shapes = (2, 3, 17, 19), (1, 70, 5, 13)
    layouts = (torch.contiguous_format, torch.channels_last)[: 1 if way == "swept" else 2]
    for shape, layout in itertools.product(shapes, layouts):
        x = (torch.randn(shape) * 2 + 3).to(dtype).contiguous(memory_format=layout)
        leaves = with_leaves(x, *torch.randn(2, *shape[:2]).to(dtype))
        exact_leaves = with_leaves(*(t.double() for t in leaves))
        y, exact = ops.adain(*leaves), ops.adain(*exact_leaves, backend="reference")
        cotangent = torch.randn(shape).to(dtype)
        results = (y, *torch.autograd.grad(y, leaves, cotangent))
        expected = (exact, *torch.autograd.grad(exact, exact_leaves, cotangent.double()))
        for a, b in zip(results, expected, strict=True):
            tolerance = 32 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item()
            )
        last = layout == torch.channels_last
        check_second_order(second_order_arguments(shape, dtype, True, last))


@interpreted
@pytest.mark.parametrize("mean", (1e2, 1e4, 1e6))
def test_every_way_survives_a_mean_and_an_outlier(way, mean):
    x = torch.randn(1, 3, 900) + mean
    x[0, 1, 0] = 4 * mean
    exact = ops.instance_norm(x.double(), backend="reference")
    torch.testing.assert_close(ops.instance_norm(x).double(), exact, rtol=1e-5, atol=1e-5)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,error,message",
    (
        ({"x": torch.ones(2, 3)}, ValueError, r"x: expected at least three dimensions.* \(2, 3\)"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(3,\) .* got \(4,\)"),
        ({"bias": torch.ones(2, 3)}, ValueError, r"bias: expected shape \(3,\) .* got \(2, 3\)"),
        ({"weight": torch.ones(3).half()}, TypeError, "weight: expected the dtype of x, float32"),
        ({"eps": 0}, ValueError, "eps: expected a positive number, got 0"),
        ({"eps": -1e-5}, ValueError, "eps: expected a positive number, got -1e-05"),
        ({"eps": float("nan")}, ValueError, "eps: expected a positive number, got nan"),
        ({"eps": "small"}, TypeError, "eps: expected a positive number, got str"),
    ),
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, error, message):
    arguments = {"x": torch.ones(2, 3, 4), "weight": torch.ones(3), "bias": torch.ones(3)}
    with pytest.raises(error, match=message):
        ops.instance_norm(**{**arguments, **change})


@of_the_cpu
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("shape", ((4, 32, 256, 256), (4, 31, 261, 260)), ids=str)
def test_results_stored_past_the_caches(shape, layout):
    """32 MiB and more, aligned and not: the bits of the samples one by one, which are smaller."""
    x, grad = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    scale, bias = torch.randn(shape[:2]), torch.randn(shape[:2])

    def outcome(x, scale, bias, grad):
        leaves = with_leaves(x, scale, bias)
        y = ops.adain(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    assert x.numel() * x.element_size() >= 1 << 25
    whole = outcome(x, scale, bias, grad)
    parts = [outcome(*(t[i : i + 1] for t in (x, scale, bias, grad))) for i in range(len(x))]
    for of_all, of_each in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(of_all, torch.cat(of_each))


def test_adain_wants_one_parameter_for_each_plane():
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"scale: expected shape \(2, 3\) .* got \(3,\)"):
        ops.adain(x, torch.ones(3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"shift: expected shape \(2, 3\) .* got \(2, 4\)"):
        ops.adain(x, torch.ones(2, 3), torch.ones(2, 4))


def test_raw_operators_check_what_they_read():
    raw = torch.ops.fastgen
    x, stats = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="scale"):
        raw.instance_norm_fwd(x, torch.ones(4), None, 1e-5)
    with pytest.raises(RuntimeError, match="shift"):
        raw.instance_norm_fwd(x, None, torch.ones(3, 2), 1e-5)
    with pytest.raises(RuntimeError, match="scale"):
        raw.instance_norm_bwd(x, x, stats, stats, torch.ones(3, dtype=torch.float64), 1e-5)
    with pytest.raises(RuntimeError, match="expected"):
        raw.instance_norm_fwd(torch.ones(2, 3), None, None, 1e-5)
    with pytest.raises(RuntimeError, match="expected float32"):
        raw.instance_norm_fwd(x.long(), None, None, 1e-5)
    for bad in stats.float(), stats[:1], stats[:, :2]:
        with pytest.raises(RuntimeError, match="mean"):
            raw.instance_norm_bwd(x, x, bad, stats, None, 1e-5)
        with pytest.raises(RuntimeError, match="var"):
            raw.instance_norm_bwd(x, x, stats, bad, None, 1e-5)
    with pytest.raises(RuntimeError, match="grad_y"):
        raw.instance_norm_bwd(x[..., :3], x, stats, stats, None, 1e-5)


@of_the_cpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_convolutions_share_their_layout_with_the_op():
    """Inductor's convolutions are channels_last, and no copies stand between them and the op."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    convolutions = [torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)]
    x, scale, shift = torch.randn(4, 16, 8, 8), torch.randn(4, 16), torch.randn(4, 16)

    def f(x):
        return convolutions[1](ops.adain(convolutions[0](x), scale, shift)).square().sum()

    def gradients(f):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)[0]

    compiled = torch.compile(f, fullgraph=True)
    with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        y, codes = run_and_get_code(compiled, x)
        torch.testing.assert_close(y, f(x))
        torch.testing.assert_close(gradients(compiled), gradients(f), rtol=1e-4, atol=1e-4)
    of_op_and_after = codes[0].split("instance_norm_fwd.default(", 1)[1].split("return (")[0]
    assert "(1024, 1, 128, 16)" in of_op_and_after
    assert "(1024, 64, 8, 1)" not in of_op_and_after
