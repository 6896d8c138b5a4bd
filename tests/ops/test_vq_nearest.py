"""vq_nearest is exact: zero wrong indices against a float64 oracle, on data made to be hard."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen import ops

ISAS = ("portable", "avx2", "avx512", "avx512bf16")


def oracle(x, codebook, metric="euclidean"):
    """The float64 argmin with the lowest index on ties, and its key, by numpy alone."""
    x, codebook = x.double().numpy(), codebook.double().numpy()
    keys = np.zeros((len(x), len(codebook)))
    for j in range(x.shape[1]):
        if metric == "euclidean":
            keys += (x[:, j, None] - codebook[:, j]) ** 2
        else:
            keys += x[:, j, None] * codebook[:, j]
    if metric == "cosine":
        squares = np.zeros(len(codebook))
        for j in range(x.shape[1]):
            squares += codebook[:, j] ** 2
        keys = -keys * np.abs(keys) / squares
    index = keys.argmin(1)
    return torch.from_numpy(index), torch.from_numpy(keys[np.arange(len(x)), index])


def assert_exact(x, codebook, metric="euclidean"):
    indices, distance = ops.vq_nearest(
        x, codebook, metric=metric, return_distance=True, backend="cpu"
    )
    expected, key = oracle(x, codebook, metric)
    wrong = (indices != expected).sum().item()
    assert wrong == 0, f"{wrong} of {len(x)} indices are wrong"
    if metric == "euclidean":
        assert torch.equal(distance, key.to(distance.dtype))


def gaussian(n, k, d):
    return torch.randn(n, d), torch.randn(k, d)


def near_duplicates(n, k, d):
    """Every code has neighbours one float32 rounding away, and rows lie on codes."""
    base = torch.randn(k // 4 + 1, d)
    codebook = base.repeat(4, 1)[:k] * (1 + torch.randint(-1, 2, (k, d)) * 2.0**-23)
    return codebook[torch.randint(k, (n,))] + 1e-7 * torch.randn(n, d), codebook


def duplicates(n, k, d):
    codebook = torch.randn(k // 3 + 1, d)[torch.randint(k // 3 + 1, (k,))]
    return torch.randn(n, d), codebook


def all_equal(n, k, d):
    return torch.randn(n, d), torch.randn(1, d).expand(k, d).contiguous()


def grid(n, k, d):
    """Rows half way between codes: exact ties everywhere."""
    return torch.randint(0, 3, (n, d)) * 0.5, torch.randint(0, 2, (k, d)).float()


def unit_sphere(n, k, d):
    """Rows at and near the centre of a sphere of codes, all about equally far."""
    codebook = torch.nn.functional.normalize(torch.randn(k, d), dim=1)
    return torch.randn(n, d) * 10.0 ** torch.randint(-12, 0, (n, 1)), codebook


def outliers(n, k, d):
    codebook = torch.randn(k, d)
    codebook[:: max(k // 3, 1)] *= 1e6
    return torch.randn(n, d), codebook


def tiny(n, k, d):
    return torch.randn(n, d) * 1e-30, torch.randn(k, d) * 1e-30


def huge(n, k, d):
    return torch.randn(n, d) * 1e30, torch.randn(k, d) * 1e30


def twins(n, k, d):
    """Rows about half way between two codes, nearer to one than float32 rounds by: bfloat16 cannot
    tell which."""
    half = torch.randn(k // 2 + 1, d)
    codebook = torch.cat([half, half + 0.05 * torch.randn_like(half)])[:k]
    which = torch.randint(max(k // 2 - 1, 1), (n, 1)).squeeze(1)
    a, b = codebook[which], codebook[(which + k // 2 + 1).clamp(max=k - 1)]
    return a + (b - a) * (0.5 + 0.02 * torch.randn(n, 1)), codebook


def near_codes(n, k, d):
    """What a trained codebook sees."""
    codebook = torch.randn(k, d)
    return codebook[torch.randint(k, (n,))] + 0.3 * torch.randn(n, d), codebook


def subnormal(n, k, d):
    return torch.randn(n, d) * 1e-40, torch.randn(k, d) * 1e-40


def signed_zeros(n, k, d):
    return torch.randn(n, d) * 0, torch.randn(k, d) * 0


DATA = (gaussian, near_duplicates, duplicates, all_equal, grid, unit_sphere, outliers, tiny, huge)
DATA += (twins, near_codes, subnormal)


@pytest.mark.parametrize("size", [*range(1, 18), 64, 100, 257])
@pytest.mark.parametrize("name", ISAS)
def test_every_size_is_exact(size, name, isa):
    if not isa(name):
        pytest.skip(f"this machine has no {name}")
    for count in 1, 33, 130:
        assert_exact(*gaussian(101, count, size))


@pytest.mark.parametrize("data", [*DATA, signed_zeros], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ISAS)
def test_hard_data_is_exact(data, name, isa):
    if not isa(name):
        pytest.skip(f"this machine has no {name}")
    for size, count in (2, 300), (16, 257), (24, 64), (67, 130):
        x, codebook = data(211, count, size)
        assert_exact(x, codebook)
        assert_exact(x.double(), codebook.double())


@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
@pytest.mark.parametrize("rows", (3, 48, 49))
def test_few_rows_are_exact(data, rows):
    """Up to some number of rows nothing is packed."""
    for size, count in (2, 300), (17, 257), (64, 130):
        x, codebook = data(rows, count, size)
        assert_exact(x, codebook)
        assert_exact(x.double(), codebook.double())
        assert_exact(x.bfloat16(), codebook.bfloat16())
        if data is not grid:
            assert_exact(x, codebook, "cosine")


@pytest.mark.parametrize("size", (4, 5, 64, 257))
@pytest.mark.parametrize("scale", (1.0, 1e-20, 1e-12, 1e15, 1e18))
@pytest.mark.parametrize("offset", (0.0, 100.0))
def test_what_bfloat16_gets_wrong(size, scale, offset):
    x, codebook = twins(700, 512, size)
    mean = codebook.mean(0)
    narrow_x, narrow = (x - mean).bfloat16().double(), (codebook - mean).bfloat16().double()
    scores = narrow.square().sum(1) - 2 * narrow_x @ narrow.T
    wrong = (scores.argmin(1) != oracle(x, codebook)[0]).double().mean()
    assert wrong > 0.03, "these rows prove nothing"
    assert_exact((x + offset) * scale, (codebook + offset) * scale)


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_rows_of_all_kinds_in_one_call(metric):
    """Blocks that bfloat16 cannot settle are followed by such that it can."""
    codebook = torch.nn.functional.normalize(torch.randn(512, 16), dim=1)
    clean = codebook[torch.randint(512, (3000,))] * 1.01
    central = 1e-4 * torch.randn(2000, 16)
    padding = torch.zeros(300, 16)
    broken = torch.randn(5, 16)
    broken[0, 0], broken[2, 1], broken[4, 2] = float("nan"), float("inf"), float("-inf")
    x = torch.cat([central, clean, padding, broken, central, clean])
    finite = x.isfinite().all(1)
    got = ops.vq_nearest(x, codebook, metric=metric, backend="cpu")
    assert torch.equal(got[finite], oracle(x[finite], codebook, metric)[0])
    assert not got[~finite].any()


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 300),
    codes=st.integers(1, 700),
    size=st.integers(1, 40),
    scales=st.tuples(st.integers(-25, 17), st.integers(-25, 17)),
    offset=st.sampled_from((0.0, 1.0, 1e3)),
    data=st.sampled_from(DATA),
    metric=st.sampled_from(("euclidean", "cosine")),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_scale(rows, codes, size, scales, offset, data, metric, dtype, seed):
    torch.manual_seed(seed)
    x, codebook = data(rows, codes, size)
    x = ((x + offset) * 10.0 ** scales[0]).to(dtype)
    codebook = ((codebook + offset) * 10.0 ** scales[1]).to(dtype)
    finite = x.isfinite().all(1) & codebook.isfinite().all()
    x = x[finite]
    index = ops.vq_nearest(x, codebook, metric=metric, backend="cpu")
    reference = ops.vq_nearest(x, codebook, metric=metric, backend="reference")
    assert torch.equal(index, reference)


@pytest.mark.parametrize("data", (gaussian, twins, near_codes, near_duplicates))
@pytest.mark.parametrize("size", (8, 64))
def test_never_farther_than_faiss(data, size):
    faiss = pytest.importorskip("faiss")
    x, codebook = data(3000, 700, size)
    ours, (_, theirs) = ops.vq_nearest(x, codebook), faiss.knn(x.numpy(), codebook.numpy(), 1)
    theirs = torch.from_numpy(theirs[:, 0])
    differ = ours != theirs
    x, codebook = x.double()[differ], codebook.double()
    distances = [(x - codebook[i[differ]]).square().sum(1) for i in (ours, theirs)]
    assert (distances[0] <= distances[1]).all()


@pytest.mark.parametrize("data", [*DATA[:4], *DATA[5:]], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_cosine_is_exact(data, dtype):
    for size, count in (2, 300), (16, 257), (67, 130):
        x, codebook = data(211, count, size)
        assert_exact(x.to(dtype), codebook.to(dtype), "cosine")


def test_cosine_of_extreme_float64_lengths():
    x, codebook = gaussian(50, 40, 8)
    for a, b in (1e-100, 1.0), (1.0, 1e-100), (1e90, 1e90), (1e-65, 1e-65):
        scaled = ops.vq_nearest(x.double() * a, codebook.double() * b, metric="cosine")
        reference = ops.vq_nearest(
            x.double() * a, codebook.double() * b, metric="cosine", backend="reference"
        )
        assert torch.equal(scaled, reference)


@pytest.mark.parametrize("mean", (1.0, 100.0, 1e4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_common_offset(mean, dtype):
    x, codebook = gaussian(500, 300, 16)
    assert_exact((x + mean).to(dtype), (codebook + mean).to(dtype))


def test_rows_far_from_the_codes():
    x, codebook = gaussian(500, 300, 16)
    assert_exact(x + 1e4, codebook)
    assert_exact(x, codebook + 1e4)


def test_cosine_by_the_textbook():
    x, codebook = gaussian(300, 77, 20)
    indices, distance = ops.vq_nearest(x, codebook, metric="cosine", return_distance=True)
    similarity = torch.nn.functional.cosine_similarity(
        x.double()[:, None], codebook.double(), dim=-1
    )
    assert torch.equal(indices, similarity.argmax(1))
    expected = 2 - 2 * similarity.max(1).values
    torch.testing.assert_close(distance.double(), expected, rtol=1e-6, atol=1e-7)


def test_cosine_of_a_code_with_itself_is_not_negative():
    x = torch.randn(500, 13)
    _, distance = ops.vq_nearest(x, x, metric="cosine", return_distance=True)
    assert (distance >= 0).all() and distance.max() < 1e-6


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_cosine_of_zero_vectors(backend):
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    indices, distance = ops.vq_nearest(
        x, codebook, metric="cosine", return_distance=True, backend=backend
    )
    assert indices.tolist() == [1, 2, 0, 0]
    assert distance.tolist() == [0.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_rows_that_are_not_finite(backend, dtype, metric):
    x, codebook = gaussian(50, 40, 7)
    x[3, 2], x[10, 0], x[11, 6] = float("nan"), float("inf"), float("-inf")
    x, codebook = x.to(dtype), codebook.to(dtype)
    indices, distance = ops.vq_nearest(
        x, codebook, metric=metric, return_distance=True, backend=backend
    )
    special = torch.tensor([3, 10, 11])
    assert indices[special].tolist() == [0, 0, 0]
    assert distance[3].isnan()
    assert (~distance[special].isfinite()).all()
    rest = torch.ones(50, dtype=torch.bool).index_fill(0, special, False)
    assert torch.equal(indices[rest], oracle(x[rest], codebook, metric)[0])
    assert distance[rest].isfinite().all()


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_codes_that_are_not_finite_never_win(backend, metric):
    x, codebook = gaussian(200, 40, 7)
    bad = torch.tensor([0, 7, 39])
    codebook[0, 1], codebook[7, 2], codebook[39] = float("nan"), float("inf"), float("-inf")
    good = torch.ones(40, dtype=torch.bool).index_fill(0, bad, False)
    expected = good.nonzero()[:, 0][oracle(x, codebook[good], metric)[0]]
    assert torch.equal(ops.vq_nearest(x, codebook, metric=metric, backend=backend), expected)
    nothing = torch.full((5, 7), float("nan"))
    indices, distance = ops.vq_nearest(
        x, nothing, metric=metric, return_distance=True, backend=backend
    )
    assert not indices.any() and distance.isnan().all()


@pytest.mark.parametrize("rows", (0, 1, 2, 11, 12, 13, 239, 240, 241, 997, 4099))
def test_row_counts(rows, threads):
    x, codebook = gaussian(rows, 50, 9)
    for count in 1, 2:
        threads(count)
        assert_exact(x, codebook)


@pytest.mark.parametrize("data", (gaussian, near_duplicates, grid, unit_sphere))
def test_identical_on_every_path(data, threads, isa):
    x, codebook = data(3001, 333, 20)
    results = []
    for name in ISAS:
        if not isa(name):
            continue
        for count in 1, 2:
            threads(count)
            results.append(ops.vq_nearest(x, codebook, return_distance=True))
    results.append(ops.vq_nearest(x, codebook, return_distance=True, backend="reference"))
    for indices, distance in results:
        assert torch.equal(indices, results[0][0]) and torch.equal(distance, results[0][1])


def test_channels_first_views_are_read_where_they_lie():
    images = torch.randn(2, 16, 9, 11)
    codebook = torch.randn(40, 16)
    last = images.permute(0, 2, 3, 1)
    indices = ops.vq_nearest(last, codebook)
    assert indices.shape == (2, 9, 11)
    assert torch.equal(indices, ops.vq_nearest(last.contiguous(), codebook))
    broadcast = torch.randn(1, 16).expand(300, 16)
    assert ops.vq_nearest(broadcast, codebook).unique().numel() == 1


def test_no_gradient():
    x, codebook = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    indices, distance = ops.vq_nearest(x, codebook, return_distance=True)
    assert not indices.requires_grad and not distance.requires_grad


@pytest.mark.parametrize(
    ("x", "codebook", "options", "error", "message"),
    [
        ((5, 3), (4, 2), {}, ValueError, r"codebook: expected vectors of 3 elements.*\(4, 2\)"),
        ((5, 3), (0, 3), {}, ValueError, r"codebook: expected at least one code.*\(0, 3\)"),
        ((5, 3), (3,), {}, ValueError, r"codebook: expected \(K, D\) or \(H, K, D\).*\(3,\)"),
        ((3,), (4, 3), {}, ValueError, r"x: expected at least two dimensions.*\(3,\)"),
        ((5, 3), (2, 4, 3), {}, ValueError, r"x: expected \(H, N, D\).*\(5, 3\)"),
        ((3, 5, 3), (2, 4, 3), {}, ValueError, r"codebook: expected 3 heads.*\(2, 4, 3\)"),
        ((5, 3), (4, 3), {"metric": "dot"}, ValueError, r"metric: expected one of.*'dot'"),
    ],
)
def test_errors_name_the_argument(x, codebook, options, error, message):
    with pytest.raises(error, match=message):
        ops.vq_nearest(torch.randn(x), torch.randn(codebook), **options)


def test_mixed_dtypes_are_an_error():
    with pytest.raises(TypeError, match="codebook: expected the dtype of x, float32, got float64"):
        ops.vq_nearest(torch.randn(5, 3), torch.randn(4, 3).double())


def test_raw_operator_checks_what_it_reads():
    raw = torch.ops.fastgen.vq_nearest_fwd
    for x, codebook in (
        (torch.randn(5, 3), torch.randn(4, 2)),
        (torch.randn(5, 3), torch.randn(0, 3)),
        (torch.randn(2, 5, 3), torch.randn(3, 4, 3)),
        (torch.randn(5, 3), torch.randn(4, 3).double()),
    ):
        with pytest.raises(RuntimeError, match="vq_nearest: codebook must"):
            raw(x, codebook, "euclidean", False)
    with pytest.raises(RuntimeError, match="unknown metric"):
        raw(torch.randn(5, 3), torch.randn(4, 3), "dot", False)


MEMORY = """
import resource, torch
from fastgen import ops
x, codebook = torch.randn({n}, 64), torch.randn({k}, 64)
ops.{call}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
result = ops.{whole}
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("call", "outputs"),
    [
        ("vq_nearest({x}, codebook, return_distance=True)", 65536 * 12),
        ("vq_quantize({x}, codebook)", 65536 * (64 * 4 + 8)),
    ],
)
def test_memory_does_not_grow_with_rows_times_codes(call, outputs):
    """At N = 65536, K = 8192 the scores alone would be 2 GiB."""
    script = MEMORY.format(n=65536, k=8192, call=call.format(x="x[:64]"), whole=call.format(x="x"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= outputs + 64 * 2**20
