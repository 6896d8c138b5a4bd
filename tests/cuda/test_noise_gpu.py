"""normal and reparam_kl on a GPU: against the reference, in graphs, beyond 2^31 elements."""

import pytest
import torch

from fastgen import ops, random
from fastgen.ops.reparam_kl import reparam_kl_reference
from fastgen.testing import assert_accurate

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = ((4096, 7), (4096, 32), (512, 1000), (64, 4096), (9, 100_003), (2, 3, 1_000_000))


def with_gradients(function, mu, logvar, grad_z, grad_kl):
    mu, logvar = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
    z, kl = function(mu, logvar)
    grads = torch.autograd.grad((z, kl), (mu, logvar), (grad_z.to(z), grad_kl.to(kl)))
    return [t.detach() for t in (z, kl, *grads)]


def inputs(shape, dtype):
    mu, logvar, grad_z = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    return mu, logvar, grad_z, torch.randn(shape[0], device="cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients(shape, dtype):
    key = random.make_key(3, 2**32 - 5, device="cuda")
    values = inputs(shape, dtype)

    def plain(m, lv):
        return reparam_kl_reference(m, lv, None, key)

    actual = with_gradients(lambda m, lv: ops.reparam_kl(m, lv, key=key), *values)
    expected = with_gradients(plain, *values)
    exact = with_gradients(plain, *(t.double() for t in values))
    for i, results in enumerate(zip(actual, expected, exact, strict=True)):
        assert_accurate(*results, what=f"result {i}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_same_bits_again_on_other_streams_and_under_load(dtype):
    key = random.make_key(5, device="cuda")
    values = inputs((33, 20_000), dtype)
    first = with_gradients(lambda m, lv: ops.reparam_kl(m, lv, key=key), *values)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for i in range(100):
        with torch.cuda.stream(streams[i % 4]):
            results.append(with_gradients(lambda m, lv: ops.reparam_kl(m, lv, key=key), *values))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


def test_a_graph_replays_with_the_key_it_finds():
    key = random.make_key(5, device="cuda")
    mu, logvar, grad_z, grad_kl = inputs((16, 9000), torch.bfloat16)

    def step():
        z, kl = torch.ops.fastgen.reparam_kl_fwd(mu, logvar, None, key)
        raw = torch.ops.fastgen.reparam_kl_bwd(grad_z, grad_kl, mu, logvar, None, key, False)
        return z, kl, *raw[:2], torch.ops.fastgen.normal(key, (1001,), torch.float32)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    seen = []
    for offset in (0, 10**6):
        key[1] = offset
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
        seen.append(replayed[0].clone())
    assert not torch.equal(*seen)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_normal_values_are_those_of_the_definition(dtype):
    key = random.make_key(42, -3, device="cuda")
    values = ops.normal(key, (2**22 + 3,), dtype=dtype).cpu()
    exact = ops.normal(key.cpu(), (2**22 + 3,), dtype=torch.float64, backend="reference")
    rounded = exact.to(dtype).abs()
    spacing = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=dtype)) - rounded
    error = (values.double() - exact).abs() / spacing.double()
    assert error.max() <= (4 if dtype == torch.float32 else 8)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_values_are_near_those_of_the_definition(dtype):
    key = random.make_key(6, device="cuda")
    values = ops.normal(key, (2**24,), dtype=dtype).double()
    exact = ops.normal(key, (2**24,), dtype=torch.float64)
    radius = exact.view(-1, 2).norm(dim=1).repeat_interleave(2)
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + torch.where(radius < 0.02, 5e-4, 1e-5)
    assert ((values - exact).abs() <= allowed).all()


def test_beyond_2_to_the_31_elements():
    count, key = 2**31 + 1000, random.make_key(11, device="cuda")
    values = ops.normal(key, (count,), dtype=torch.bfloat16)
    later = ops.normal(
        random.make_key(11, 2**29 - 100, device="cuda"), (1400,), dtype=torch.bfloat16
    )
    assert torch.equal(values[-1400:], later)
    assert all(chunk.isfinite().all() for chunk in values.split(2**28))
    zero = torch.zeros(1, device="cuda", dtype=torch.bfloat16).expand(count).contiguous()[None]
    z, kl = ops.reparam_kl(zero, zero, key=key)
    assert torch.equal(z[0], values) and kl.item() == 0
