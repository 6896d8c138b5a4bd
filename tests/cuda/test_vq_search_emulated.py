"""The CUDA search on the host emulator: zero wrong indices against a float64 oracle, on data made
to be hard for half precision, by both screens."""

import pytest
import torch

SCREENS = {"mma": False, "wgmma": True}


@pytest.fixture(params=SCREENS)
def hopper(request):
    return SCREENS[request.param]


def assert_exact(vq, x, codebook, **options):
    result = vq.search(x, codebook, **options)
    expected, _ = vq.oracle(x, codebook, options.get("cosine", False))
    wrong = (result.indices != expected).sum().item()
    assert wrong == 0, f"{wrong} of {len(x)} indices are wrong"
    return result


def gaussian(n, k, d):
    return torch.randn(n, d), torch.randn(k, d)


def half_twins(n, k, d):
    """Codes that are one in half precision, and rows on them: only float64 tells them apart."""
    codebook = torch.randn(k // 4 + 1, d).repeat(4, 1)[:k] * (1 + torch.rand(k, d) * 2.0**-14)
    return codebook[torch.randint(k, (n,))] + 1e-7 * torch.randn(n, d), codebook


def float_twins(n, k, d):
    codebook = torch.randn(k // 4 + 1, d).repeat(4, 1)[:k]
    codebook = codebook * (1 + torch.randint(-1, 2, (k, d)) * 2.0**-23)
    return codebook[torch.randint(k, (n,))] + 1e-7 * torch.randn(n, d), codebook


def duplicates(n, k, d):
    return torch.randn(n, d), torch.randn(k // 3 + 1, d)[torch.randint(k // 3 + 1, (k,))]


def collapsed(n, k, d):
    return torch.randn(n, d), torch.randn(1, d).repeat(k, 1)


def grid(n, k, d):
    """Rows half way between codes: exact ties everywhere."""
    return torch.randint(0, 3, (n, d)) * 0.5, torch.randint(0, 2, (k, d)).float()


def sphere(n, k, d):
    """Rows at and near the centre of a sphere of codes, all about equally far."""
    codebook = torch.nn.functional.normalize(torch.randn(k, d), dim=1)
    return torch.randn(n, d) * 10.0 ** torch.randint(-12, 0, (n, 1)), codebook


def outliers(n, k, d):
    codebook = torch.randn(k, d)
    codebook[::3] *= 1e6
    return torch.randn(n, d), codebook


def far_rows(n, k, d):
    return torch.randn(n, d) + 1e5, torch.randn(k, d)


def tiny(n, k, d):
    return torch.randn(n, d) * 1e-30, torch.randn(k, d) * 1e-30


def subnormal(n, k, d):
    return torch.randn(n, d) * 1e-40, torch.randn(k, d) * 1e-40


def huge(n, k, d):
    return torch.randn(n, d) * 1e30, torch.randn(k, d) * 1e30


def zeros(n, k, d):
    return torch.randn(n, d) * 0, torch.randn(k, d) * 0


HARD = (half_twins, float_twins, duplicates, collapsed, grid, sphere, outliers, far_rows, tiny)
HARD += (subnormal, huge, zeros)


@pytest.mark.parametrize("size", (1, 2, 3, 8, 13, 14, 16, 17, 29, 30, 32, 33, 64, 67, 100))
def test_sizes(size, vq, hopper):
    for rows, codes in (3, 1), (70, 129):
        assert_exact(vq, *gaussian(rows, codes, size), hopper=hopper)


@pytest.mark.parametrize("warpgroups,size", ((4, 200), (2, 330)))
def test_many_blocks_of_columns(warpgroups, size, vq, hopper):
    """More blocks than the ring holds; rows that leave room for two warpgroups only."""
    assert_exact(vq, *gaussian(65, 140, size), hopper=hopper)


@pytest.mark.parametrize("data", HARD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("cosine", (False, True), ids=("euclidean", "cosine"))
def test_hard_data(data, cosine, vq):
    for hopper, (size, codes) in zip(
        (False, True, False), ((2, 140), (24, 64), (67, 130)), strict=True
    ):
        x, codebook = data(40, codes, size)
        assert_exact(vq, x, codebook, cosine=cosine, hopper=hopper)
        if size == 24:
            assert_exact(vq, x.double(), codebook.double(), cosine=cosine, hopper=hopper)


@pytest.mark.parametrize("mean", (1.0, 100.0, 1e4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_common_offset(mean, dtype, vq):
    x, codebook = gaussian(60, 130, 16)
    assert_exact(vq, (x + mean).to(dtype), (codebook + mean).to(dtype))


def test_the_screen_decides_for_almost_all_rows(vq, hopper):
    """Without this, everything could take the slow way and still be right."""
    for size in 8, 64:
        x, codebook = gaussian(256, 512, size)
        assert assert_exact(vq, x, codebook, hopper=hopper).open_rows <= 8
        far = assert_exact(vq, x + 1000, codebook + 1000, hopper=hopper)
        assert far.open_rows <= 8
        # As codebooks begin in many VQ-VAEs, and beyond the range of half precision.
        for scale in 1e-4, 1e-6:
            start = assert_exact(vq, x, scale * torch.rand(512, size), hopper=hopper)
            assert start.open_rows <= 16
    x, codebook = collapsed(64, 256, 8)
    assert assert_exact(vq, x, codebook, hopper=hopper).open_rows == 0


def test_screen_alone_would_be_wrong(vq):
    """half_twins are what they are called: rounded to half, the nearest code is another one."""
    x, codebook = half_twins(200, 64, 16)
    expected, _ = vq.oracle(x, codebook)
    rounded, _ = vq.oracle(x.half(), codebook.half())
    assert (expected != rounded).sum() > 50
    assert_exact(vq, x, codebook)


@pytest.mark.parametrize("wrong", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("cosine", (False, True), ids=("euclidean", "cosine"))
def test_not_finite(wrong, cosine, vq, hopper):
    x, codebook = gaussian(50, 40, 6)
    x[7, 2], x[20] = wrong, wrong
    codebook[[0, 13], 3], codebook[31] = wrong, wrong
    result = assert_exact(vq, x, codebook, cosine=cosine, hopper=hopper, distance=True)
    bad = torch.zeros(50, dtype=torch.bool)
    bad[[7, 20]] = True
    assert not result.indices[bad].any() and result.distance[bad].isfinite().sum() == 0
    assert result.distance[~bad].isfinite().all()
    none = vq.search(x, torch.full_like(codebook, wrong), cosine=cosine, hopper=hopper)
    assert not none.indices.any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
def test_distance(dtype, vq):
    x, codebook = (t.to(dtype) for t in gaussian(60, 50, 20))
    result = assert_exact(vq, x, codebook, distance=True)
    _, key = vq.oracle(x, codebook)
    torch.testing.assert_close(result.distance, key.to(result.distance.dtype), rtol=1e-6, atol=0)
    result = assert_exact(vq, x, codebook, distance=True, cosine=True)
    cosine = torch.nn.functional.cosine_similarity(x.double(), codebook.double()[result.indices])
    torch.testing.assert_close(result.distance.double(), 2 - 2 * cosine, rtol=1e-5, atol=1e-6)


def test_cosine_of_zero_rows_and_extreme_lengths(vq):
    x, codebook = (t.double() for t in gaussian(40, 30, 8))
    x[3], codebook[5], codebook[0, 0] = 0, 0, torch.nan
    result = assert_exact(vq, x, codebook, cosine=True, distance=True)
    assert result.indices[3] == 1 and result.distance[3] == 2
    codebook[0, 0] = 1
    for a, b in (1e-100, 1.0), (1.0, 1e-100), (1e90, 1e90), (1e-65, 1e-65), (1e-200, 1e-200):
        assert_exact(vq, x * a, codebook * b, cosine=True)


def test_float64_beyond_float32(vq):
    for scale in 1e-300, 1e-100, 1e100, 1e160:
        x, codebook = (t.double() * scale for t in gaussian(30, 40, 5))
        assert_exact(vq, x, codebook)


def test_heads(vq, hopper):
    x, codebook = (
        torch.randn(3, 40, 20),
        torch.randn(3, 130, 20) * torch.tensor([1.0, 30, 1e-3])[:, None, None],
    )
    result = vq.search(x, codebook, hopper=hopper)
    for h in range(3):
        assert torch.equal(result.indices[h], vq.oracle(x[h], codebook[h])[0])


def test_rows_in_several_launches(vq, hopper):
    x, codebook = half_twins(600, 70, 9)
    assert_exact(vq, x, codebook, hopper=hopper, image_bytes=1)


def test_the_order_of_threads_does_not_matter(vq, hopper):
    x, codebook = half_twins(100, 200, 16)
    expected = vq.search(x, codebook, hopper=hopper, quantize=True)
    for seed in 1, 2, 3:
        again = vq.search(x, codebook, hopper=hopper, quantize=True, seed=seed * 1000)
        for a, b in zip(expected[:4], again[:4], strict=True):
            assert torch.equal(a, b)


def test_no_rows_and_no_elements(vq, hopper):
    assert vq.search(torch.empty(0, 3), torch.randn(4, 3), hopper=hopper).indices.shape == (0,)
    empty = vq.search(torch.empty(5, 0), torch.empty(4, 0), hopper=hopper, distance=True)
    assert not empty.indices.any() and not empty.distance.any()


def test_within_the_memory_of_the_tensors(run_program):
    done = run_program("asan", "vq_run")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_no_races(run_program):
    done = run_program("tsan", "vq_run", "small")
    assert done.returncode == 0, done.stdout + done.stderr
