"""The CUDA backend of the vq ops on a GPU, against the CPU backend: exact, deterministic, on any
stream, in a graph, beyond 2^31 elements."""

import pytest
import torch

from fastgen import ops

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def data(rows, codes, size, dtype=torch.float32, heads=()):
    x, codebook = torch.randn(*heads, rows, size), torch.randn(*heads, codes, size)
    return x.to(dtype), codebook.to(dtype)


def assert_same(x, codebook, **options):
    indices = ops.vq_nearest(x.cuda(), codebook.cuda(), backend="cuda", **options)
    expected = ops.vq_nearest(x, codebook, backend="cpu", **options)
    assert torch.equal(indices.cpu(), expected)


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (1, 3, 8, 16, 20, 32, 48, 64, 100, 128, 256, 330, 512, 700))
def test_nearest(size, dtype, metric):
    for rows, codes in (1, 1), (100, 129), (5000, 1031):
        assert_same(*data(rows, codes, size, dtype), metric=metric)


def test_nearest_of_many_rows_and_codes():
    assert_same(*data(300_000, 4096, 8))
    assert_same(*data(4096, 65_536, 64))


@pytest.mark.parametrize("offset", (0, 100, 1e4))
def test_nearest_where_half_precision_cannot_tell(offset):
    codebook = torch.randn(1024, 64).repeat(4, 1) * (1 + torch.rand(4096, 64) * 2.0**-14)
    x = codebook[torch.randint(4096, (5000,))] + 1e-7 * torch.randn(5000, 64)
    assert_same(x + offset, codebook + offset)


def test_nearest_not_finite_and_collapsed():
    x, codebook = data(3000, 500, 20)
    x[7], x[100, 3], codebook[0, 0], codebook[30] = torch.nan, torch.inf, torch.nan, -torch.inf
    assert_same(x, codebook)
    assert_same(x, codebook[50].expand(500, -1))
    assert_same(x, torch.full_like(codebook, torch.nan))


def test_heads_and_strides():
    x, codebook = data(1000, 300, 24, heads=(5,))
    assert_same(x, codebook)
    assert_same(x.transpose(1, 2).contiguous().transpose(1, 2), codebook.flip(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", ((), (3,)))
def test_quantize_and_its_gradients(dtype, heads):
    x, codebook = data(2000, 100, 33, dtype, heads)
    results = []
    for device in "cuda", "cpu":
        inputs = [t.to(device).requires_grad_() for t in (x, codebook)]
        result = ops.vq_quantize(*inputs, backend=device)
        cotangent = torch.linspace(-1, 1, x.numel(), dtype=dtype).view_as(x).to(device)
        total = (result.quantized * cotangent).sum() + 3 * result.loss
        results.append([*result, *torch.autograd.grad(total, inputs)])
    for gpu, cpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu)


def test_codebook_stats():
    for rows, codes, size in (1, 1, 1), (70_000, 5, 3), (5000, 70_000, 7), (100_000, 1024, 64):
        x, indices = torch.randn(rows, size), torch.randint(codes, (rows,))
        gpu = ops.vq_codebook_stats(x.cuda(), indices.cuda(), codes, backend="cuda")
        cpu = ops.vq_codebook_stats(x, indices, codes, backend="cpu")
        for a, b in zip(gpu, cpu, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)


def test_the_same_bits_every_time():
    x, codebook = (t.cuda().requires_grad_() for t in data(20_000, 512, 64))

    def run():
        result = ops.vq_quantize(x, codebook)
        grads = torch.autograd.grad(result.quantized.sum() + result.loss, (x, codebook))
        return [*result, *grads, *ops.vq_codebook_stats(x.detach(), result.indices, 512)]

    expected = run()
    for _ in range(1000):
        assert all(torch.equal(a, b) for a, b in zip(expected, run(), strict=True))


def test_on_another_stream_and_in_a_graph():
    x, codebook = (t.cuda() for t in data(5000, 700, 40))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        indices = ops.vq_nearest(x, codebook)
    stream.synchronize()
    assert torch.equal(indices.cpu(), ops.vq_nearest(x.cpu(), codebook.cpu()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantized, indices, loss = ops.vq_quantize(x, codebook)
        counts, sums = ops.vq_codebook_stats(x, indices, 700)
    for _ in range(2):
        x.normal_()
        codebook.normal_()
        graph.replay()
        expected = ops.vq_quantize(x, codebook)
        assert torch.equal(indices, expected.indices) and torch.equal(loss, expected.loss)
        assert torch.equal(sums, ops.vq_codebook_stats(x, indices, 700)[1])


def test_beyond_32_bit_offsets():
    rows, size = 2**31 // 64 + 1000, 64
    x = torch.zeros(rows, size, dtype=torch.bfloat16, device="cuda")
    codebook = torch.eye(size, dtype=torch.bfloat16, device="cuda")
    wanted = torch.arange(rows, device="cuda") % size
    x[torch.arange(rows, device="cuda"), wanted] = 1
    result = ops.vq_quantize(x, codebook)
    assert torch.equal(result.indices, wanted) and result.loss == 0
    assert torch.equal(result.quantized[-5000:], x[-5000:])
    counts, sums = ops.vq_codebook_stats(x, result.indices, size)
    assert torch.equal(counts, torch.bincount(wanted).float())
    assert torch.equal(sums, torch.diag(counts))


def test_raw_operators_check_their_arguments():
    x, codebook = (t.cuda() for t in data(10, 4, 3))
    with pytest.raises(RuntimeError, match="vq_nearest: codebook must have the device and dtype"):
        torch.ops.fastgen.vq_nearest_fwd(x, codebook.double(), "euclidean", False)
    with pytest.raises(RuntimeError, match="vq_nearest: codebook must have vectors of the size"):
        torch.ops.fastgen.vq_nearest_fwd(x, codebook[:, :2], "euclidean", False)
    with pytest.raises(RuntimeError, match="vq_nearest: unknown metric"):
        torch.ops.fastgen.vq_nearest_fwd(x, codebook, "l1", False)
    with pytest.raises(RuntimeError, match="vq_codebook_stats: indices has the wrong"):
        torch.ops.fastgen.vq_codebook_stats_fwd(x, torch.zeros(9, dtype=torch.int64).cuda(), 4)
