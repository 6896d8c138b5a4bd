"""What is special to reparam_kl: its noise, its accuracy near the prior, its extremes."""

import math

import pytest
import torch

from fastgen import ops, random

BACKENDS = ("cpu", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((7,), (3, 5), (2, 1027), (5, 3, 7, 11)))
def test_noise_is_that_of_the_key(backend, shape):
    """Whatever the row length, element i of the tensor takes value i of the stream."""
    key, zero = random.make_key(3, 2**32 - 2), torch.zeros(shape)
    z, _ = ops.reparam_kl(zero, zero, key=key, backend=backend)
    assert torch.equal(z, ops.normal(key, shape, backend=backend))


def test_noise_is_the_same_for_every_layout_and_thread_count(threads):
    key = random.make_key(12)
    mu, logvar = torch.randn(301, 77), torch.randn(301, 77)
    threads(1)
    z, kl = ops.reparam_kl(mu, logvar, key=key)
    for count in (2, 3, 4):
        threads(count)
        for m in (mu, mu.t().contiguous().t()):
            other_z, other_kl = ops.reparam_kl(m, logvar, key=key)
            assert torch.equal(z, other_z) and torch.equal(kl, other_kl)


def test_z_is_the_same_on_avx2_and_avx512(isa):
    mu, logvar, key = torch.randn(33, 129), torch.randn(33, 129), random.make_key(1)
    results = [ops.reparam_kl(mu, logvar, key=key)[0] for _ in filter(isa, ("avx2", "avx512"))]
    assert all(torch.equal(results[0], z) for z in results[1:])


@pytest.mark.parametrize("name", ("portable", "avx2", "avx512"))
def test_rows_of_every_length_in_every_layout(name, isa):
    """Rows shorter than a vector share vectors where they follow each other in memory."""
    if not isa(name):
        pytest.skip(f"this machine has no {name}")
    key = random.make_key(3)
    for size in (1, 2, 15, 16, 17, 63, 64, 65, 4097):
        mu, logvar, grad_z = torch.randn(77, 3 * size).chunk(3, 1)
        grad_kl = torch.randn(77)
        noise = ops.normal(key, (77, size))
        outcomes = []
        for convert, given in (
            (lambda t: t, (None, key)),
            (lambda t: t.contiguous(), (None, key)),
            (lambda t: t.double(), (noise.double(), None)),
        ):
            inputs = [convert(t).detach().requires_grad_() for t in (mu, logvar)]
            results = ops.reparam_kl(*inputs, given[0], key=given[1])
            grads = (convert(grad_z), grad_kl.to(results[1].dtype))
            outcomes.append((*results, *torch.autograd.grad(results, inputs, grads)))
        for strided, dense, exact in zip(*outcomes, strict=True):
            assert torch.equal(strided, dense), size
            torch.testing.assert_close(dense.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_uses_float32_noise(dtype):
    mu, logvar = torch.randn(9, 13).to(dtype), torch.randn(9, 13).to(dtype)
    key = random.make_key(2)
    z, kl = ops.reparam_kl(mu, logvar, key=key)
    wide, wide_kl = ops.reparam_kl(mu.float(), logvar.float(), key=key)
    assert torch.equal(z, wide.to(dtype))
    assert torch.equal(kl, wide_kl) and kl.dtype == torch.float32


def test_manual_seed_governs_and_samples_differ():
    mu = torch.zeros(4, 5)
    torch.manual_seed(1)
    first, second = ops.reparam_kl(mu, mu)[0], ops.reparam_kl(mu, mu)[0]
    torch.manual_seed(1)
    assert torch.equal(ops.reparam_kl(mu, mu)[0], first) and not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_makes_the_same_noise_again(backend):
    mu, logvar = (torch.randn(6, 35, dtype=torch.float64, requires_grad=True) for _ in "ml")
    key = random.make_key(5)
    z, _ = ops.reparam_kl(mu, logvar, key=key, backend=backend)
    (grad,) = torch.autograd.grad(z.sum(), logvar)
    torch.testing.assert_close(grad, 0.5 * (z - mu).detach(), rtol=1e-9, atol=1e-12)


def test_nothing_of_the_size_of_the_noise_is_kept():
    mu, logvar = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.reparam_kl(mu, logvar)
    assert sum(t.numel() for t in saved) == 2 * 64 * 64 + 2


@pytest.mark.parametrize("scale", (1e-1, 1e-3, 1e-5, 1e-8))
def test_kl_is_accurate_near_the_prior(scale):
    mu, logvar = scale * torch.randn(50, 40), scale * torch.randn(50, 40)
    kl = ops.reparam_kl(mu, logvar)[1].double()
    m, lv = mu.double(), logvar.double()
    # expm1(x) - x by its series: in float64 the difference itself would cancel.
    series = sum(lv**k / math.factorial(k) for k in range(2, 12))
    torch.testing.assert_close(kl, 0.5 * (m**2 + series).sum(1), rtol=5e-7, atol=0)
    assert (kl > 0).all()


def test_kl_gradient_is_accurate_near_the_prior():
    logvar = (1e-6 * torch.randn(50, 40)).requires_grad_()
    (grad,) = torch.autograd.grad(ops.reparam_kl(torch.zeros(50, 40), logvar)[1].sum(), logvar)
    expected = 0.5 * torch.expm1(logvar.detach().double())
    torch.testing.assert_close(grad.double(), expected, rtol=5e-7, atol=0)


def test_kl_is_that_of_torch_distributions():
    mu, logvar = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    posterior = torch.distributions.Normal(mu, torch.exp(logvar / 2))
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    expected = torch.distributions.kl_divergence(posterior, prior).sum(1)
    torch.testing.assert_close(ops.reparam_kl(mu, logvar)[1], expected)


def test_long_rows_are_added_up_accurately():
    mu, logvar = torch.randn(2, 300_000) + 3, torch.randn(2, 300_000)
    exact = ops.reparam_kl(mu.double(), logvar.double(), backend="reference")[1]
    torch.testing.assert_close(ops.reparam_kl(mu, logvar)[1].double(), exact, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", ("portable", "avx2", "avx512"))
def test_extremes_equal_plain_pytorch(name, isa):
    if not isa(name):
        pytest.skip(f"this machine has no {name}")
    inf, nan = math.inf, math.nan
    values = [-inf, -1e30, -1e9, -300, -100, -1, 0, 1, 60, 88, 100, 170, 200, inf, nan]
    logvar = torch.tensor(values).repeat(3).requires_grad_()
    mu = torch.tensor([0, 1e20, -inf]).repeat_interleave(len(values)).requires_grad_()
    noise = torch.full_like(mu, 0.5)
    results = {}
    for backend in BACKENDS:
        z, kl = ops.reparam_kl(mu, logvar, noise, backend=backend)
        grads = torch.autograd.grad(
            (z, kl), (mu, logvar), (torch.ones_like(z), torch.ones_like(kl))
        )
        results[backend] = (z, kl, *grads)
    for ours, plain in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, plain, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_sample_has_the_moments_of_the_posterior():
    mu, logvar = torch.full((2000, 500), 1.5), torch.full((2000, 500), -0.8)
    z, _ = ops.reparam_kl(mu, logvar, key=random.make_key(9))
    sigma = math.exp(-0.4)
    assert abs(z.double().mean().item() - 1.5) < 5 * sigma / 1e3
    assert abs(z.double().var().item() / sigma**2 - 1) < 5 * math.sqrt(2) / 1e3


# --- vmap and compile --------------------------------------------------------------------------


def test_vmap_shares_the_noise_of_a_shared_key_and_splits_it_for_batched_keys():
    mu, zero = torch.zeros(3, 4, 5), torch.zeros(4, 5)
    key = random.make_key(8)
    shared = torch.vmap(lambda m: ops.reparam_kl(m, zero, key=key)[0])(mu)
    assert torch.equal(shared, ops.normal(key, (4, 5)).expand(3, 4, 5))
    keys = random.fold_in(key, torch.arange(3))
    split = torch.vmap(lambda m, k: ops.reparam_kl(m, zero, key=k)[0])(mu, keys)
    assert torch.equal(split, torch.stack([ops.normal(k, (4, 5)) for k in keys]))


def test_vmap_randomness_governs_drawn_keys():
    mu, zero = torch.zeros(3, 4, 5), torch.zeros(4, 5)

    def draw(m):
        return ops.reparam_kl(m, zero)[0]

    same = torch.vmap(draw, randomness="same")(mu)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(draw, randomness="different")(mu)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(draw)(mu)


def test_compiled_without_a_key_draws_in_the_graph():
    torch._dynamo.reset()
    compiled = torch.compile(ops.reparam_kl, fullgraph=True, backend="aot_eager")
    mu, logvar = (torch.randn(4, 5, requires_grad=True) for _ in "ml")
    torch.manual_seed(1)
    first, second = compiled(mu, logvar)[0], compiled(mu, logvar)[0]
    torch.manual_seed(1)
    assert torch.equal(compiled(mu, logvar)[0], first) and not torch.equal(first, second)
    key = random.make_key(2)
    assert torch.equal(compiled(mu, logvar, key=key)[0], ops.reparam_kl(mu, logvar, key=key)[0])


# --- bad input ---------------------------------------------------------------------------------


def test_bad_noise_is_named():
    mu, key = torch.zeros(2, 3), random.make_key(0)
    with pytest.raises(ValueError, match=r"noise: expected shape \(2, 3\) .* got \(2, 4\)"):
        ops.reparam_kl(mu, mu, torch.zeros(2, 4))
    with pytest.raises(TypeError, match="noise: expected the dtype of mu, float32, got float64"):
        ops.reparam_kl(mu, mu, mu.double())
    for several in ({"key": key}, {"generator": torch.Generator()}):
        with pytest.raises(ValueError, match="noise: expected at most one of noise, key and gen"):
            ops.reparam_kl(mu, mu, mu, **several)
    with pytest.raises(TypeError, match="key: expected dtype int64, got int32"):
        ops.reparam_kl(mu, mu, key=key.int())
    with pytest.raises(ValueError, match="key: expected the device of the input, cpu, got meta"):
        ops.reparam_kl(mu, mu, key=key.to("meta"))


def test_raw_operators_check_their_arguments():
    mu, key = torch.zeros(2, 3), random.make_key(0)
    raw = torch.ops.fastgen
    for noise, k in ((None, None), (mu, key)):
        with pytest.raises(RuntimeError, match="reparam_kl: expected either noise or key"):
            raw.reparam_kl_fwd(mu, mu, noise, k)
    with pytest.raises(RuntimeError, match="reparam_kl: logvar has the wrong"):
        raw.reparam_kl_fwd(mu, torch.zeros(2, 2), None, key)
    with pytest.raises(RuntimeError, match="reparam_kl: key has the wrong"):
        raw.reparam_kl_fwd(mu, mu, None, key[:1])
    with pytest.raises(RuntimeError, match="reparam_kl: noise has the wrong"):
        raw.reparam_kl_fwd(mu, mu, mu.double(), None)
    with pytest.raises(RuntimeError, match="reparam_kl: grad_kl has the wrong"):
        raw.reparam_kl_bwd(mu, torch.zeros(3), mu, mu, None, key, False)


def test_explain_draws_no_key():
    from fastgen import explain

    state = torch.get_rng_state()
    assert explain("reparam_kl", torch.zeros(2, 3), torch.zeros(2, 3)).chosen == "cpu"
    assert torch.equal(torch.get_rng_state(), state)
