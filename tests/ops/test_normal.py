"""What normal values must be beyond parity: their distribution, and the same bits everywhere."""

import functools
import math

import pytest
import torch
from scipy import stats

from fastgen import ops, random
from fastgen.testing import backends_here

N = 2**22
INSTRUCTION_SETS = ("portable", "avx2", "avx512")


@pytest.fixture(scope="module")
def sample():
    return ops.normal(random.make_key(2024, 11), (N,)).double()


def ulps_apart(a, b):
    """Distance of float32 values in units in the last place, across zero too."""

    def ordered(t):
        bits = t.view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return (ordered(a) - ordered(b)).abs().max().item()


def test_within_4_ulp_of_the_definition(isa):
    key = random.make_key(42, -3)
    exact = ops.normal(key, (N,), dtype=torch.float64, backend="reference")
    spacing = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)) - exact.float().abs()
    for name in filter(isa, INSTRUCTION_SETS):
        error = (ops.normal(key, (N,)).double() - exact).abs() / spacing.double()
        assert error.max() <= 4, name


def test_same_bits_on_avx2_and_avx512(isa):
    key, values = random.make_key(8, 2**32 - 7), {}
    for name in filter(isa, INSTRUCTION_SETS):
        values[name] = ops.normal(key, (100_003,))
    if "avx512" in values:
        assert torch.equal(values["avx2"], values["avx512"])
    if "avx2" in values:
        assert ulps_apart(values["portable"], values["avx2"]) <= 4


def test_same_bits_for_every_thread_count_shape_and_length(threads):
    key, count = random.make_key(5), 200_001
    threads(1)
    expected = ops.normal(key, (count,))
    for number in (2, 3, 4):
        threads(number)
        assert torch.equal(ops.normal(key, (count,)), expected)
    assert torch.equal(ops.normal(key, (3, 66_667)), expected.view(3, 66_667))
    for shorter in (1, 2, 3, 5, 63, 65, 1023, 131_071):
        assert torch.equal(ops.normal(key, (shorter,)), expected[:shorter])
    later = ops.normal(random.make_key(5, 25), (1000,))
    assert torch.equal(later, expected[100:1100])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_rounds_float32(dtype):
    key = random.make_key(6)
    for backend in ("cpu", "reference"):
        expected = ops.normal(key, (4099,), backend=backend).to(dtype)
        assert torch.equal(ops.normal(key, (4099,), dtype=dtype, backend=backend), expected)


def test_distribution(sample):
    assert stats.kstest(sample.numpy(), "norm").pvalue > 1e-3
    for half in (sample[0::2], sample[1::2]):
        assert stats.kstest(half.numpy(), "norm").pvalue > 1e-3
    assert (sample != 0).all()


def test_moments(sample):
    """The first eight moments, within five standard errors."""
    for order in range(1, 9):
        expected = 0 if order % 2 else math.prod(range(1, order, 2))
        variance = math.prod(range(1, 2 * order, 2)) - expected**2
        error = sample.pow(order).mean().item() - expected
        assert abs(error) < 5 * math.sqrt(variance / N), f"moment {order}: off by {error}"


@pytest.mark.parametrize("sigmas", (3.0, 4.0, 5.0))
def test_tail_counts(sample, sigmas):
    """Each tail is Poisson; five standard deviations, and never empty where many are expected."""
    for tail in (sample, -sample):
        expected = N * stats.norm.sf(sigmas)
        count = (tail > sigmas).sum().item()
        low, high = stats.poisson.interval(1 - 1e-6, expected)
        assert low <= count <= high, f"{count} beyond {sigmas} sigma, expected {expected:.1f}"


def test_tails_reach_beyond_24_bit_uniforms():
    """2^28 values have one beyond 5.9 sigma: 24-bit radii end at 5.77."""
    largest = max(
        ops.normal(random.make_key(31), (2**24,)).abs().max().item(),
        ops.normal(random.make_key(31, 2**22), (2**24,)).abs().max().item(),
    )
    assert 5 < largest < 6.77


def test_no_correlation(sample):
    """Of neighbours, of Box-Muller partners and their squares, of streams of nearby keys."""
    bound = 5 / math.sqrt(N / 2)
    for lag in (1, 2, 3, 4, 5, 8, 16, 64, 256, 1024, 4096):
        assert abs((sample[:-lag] * sample[lag:]).mean().item()) < bound, f"lag {lag}"
    even, odd = sample[0::2], sample[1::2]
    squares = ((even.square() - 1) * (odd.square() - 1)).mean().item() / 2
    products = (even * odd).mean().item()
    assert abs(squares) < bound and abs(products) < bound
    for key in (random.make_key(2025, 11), random.make_key(2024, 11 + N), random.make_key(2024)):
        other = ops.normal(key, (N,)).double()
        assert abs((sample * other).mean().item()) < bound


def test_pairs_fill_the_plane(sample):
    """Chi-square of (Phi(even), Phi(odd)) on a grid of 64 x 64 cells."""
    uniform = torch.special.ndtr(sample)
    cells = (uniform[0::2] * 64).long().clamp(max=63) * 64
    cells += (uniform[1::2] * 64).long().clamp(max=63)
    counts = torch.bincount(cells, minlength=4096).double()
    expected = N / 2 / 4096
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert 1e-4 < stats.chi2.sf(chi_square, 4095) < 1 - 1e-4


def test_bad_arguments_are_named():
    key = random.make_key(0)
    with pytest.raises(TypeError, match="dtype: expected float32, .* got torch.int32"):
        ops.normal(key, (2,), dtype=torch.int32)
    with pytest.raises(ValueError, match=r"size: expected no negative entries, got \(2, -1\)"):
        ops.normal(key, (2, -1))
    with pytest.raises(RuntimeError, match="normal: size must not be negative"):
        torch.ops.fastgen.normal(key, (-1,), torch.float32)
    with pytest.raises(RuntimeError, match="normal: key has the wrong device, dtype or shape"):
        torch.ops.fastgen.normal(torch.zeros(3, dtype=torch.int64), (1,), torch.float32)


def test_vmap_uses_each_key():
    keys = random.fold_in(random.make_key(4), torch.arange(3))
    values = torch.vmap(lambda key: ops.normal(key, (5,)))(keys)
    assert torch.equal(values, torch.stack([ops.normal(key, (5,)) for key in keys]))


def test_vmap_over_no_keys():
    keys = torch.empty(0, 2, dtype=torch.int64)
    for backend in backends_here("normal"):
        function = functools.partial(ops.normal, size=(5, 2), dtype=torch.half, backend=backend)
        values = torch.vmap(function)(keys)
        assert (values.shape, values.dtype) == ((0, 5, 2), torch.half)
    assert torch.vmap(lambda key: torch.ops.fastgen.philox_words(key, 3))(keys).shape == (0, 3)
