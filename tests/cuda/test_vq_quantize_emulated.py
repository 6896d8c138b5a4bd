"""The CUDA kernels of vq_quantize and vq_codebook_stats on the host emulator against the CPU's."""

import pytest
import torch

from fastgen import ops
from fastgen.ops._autograd import accumulate_dtype

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: 70 000 codes take a third digit; 7 codes have several pieces each.
STATS_SIZES = ((1, 1, 1), (300, 7, 5), (700, 300, 33), (200, 70_000, 3), (100, 9, 140))


def assert_stats(vq, x, indices, codes):
    expected = ops.vq_codebook_stats(x, indices, codes)
    for ours, cpu in zip(vq.codebook_stats(x, indices, codes), expected, strict=True):
        torch.testing.assert_close(ours, cpu, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,codes,size", STATS_SIZES)
def test_stats(rows, codes, size, dtype, vq):
    assert_stats(vq, torch.randn(rows, size).to(dtype), torch.randint(codes, (rows,)), codes)


def test_stats_of_collapsed_and_sorted_codes(vq):
    x = torch.randn(5000, 3)
    assert_stats(vq, x, torch.full((5000,), 2), 4)
    assert_stats(vq, x, torch.arange(5000) // 64, 80)
    assert_stats(vq, x, torch.arange(5000).flip(0) % 257, 257)


def test_stats_of_no_rows(vq):
    counts, sums = vq.codebook_stats(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), 5)
    assert not counts.any() and not sums.any()


@pytest.mark.parametrize("wrong", (-1, 4, 2**40))
def test_an_index_out_of_range_ends_the_kernel(wrong, vq):
    with pytest.raises(RuntimeError, match="__trap"):
        vq.codebook_stats(torch.randn(4, 3), torch.tensor([0, 3, wrong, 1]), 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(dtype, vq):
    x, codebook = torch.randn(90, 20).to(dtype), torch.randn(40, 20).to(dtype)
    x[5, 3] = torch.nan
    result = vq.search(x, codebook, quantize=True)
    cpu = ops.vq_quantize(x, codebook)
    assert torch.equal(result.indices, cpu.indices)
    torch.testing.assert_close(result.quantized, cpu.quantized, rtol=0, atol=0, equal_nan=True)
    e = codebook.double()[result.indices]
    expected = (x.double() - e).square().sum(1)
    torch.testing.assert_close(result.errors, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("rows", (0, 1, 4096, 10_000))
def test_loss(rows, dtype, vq):
    errors = torch.rand(rows, dtype=torch.float64)
    torch.testing.assert_close(vq.loss(errors, 0.5, dtype), 0.5 * errors.sum().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", (3, 16, 300))
def test_backward(size, dtype, vq):
    x, grad = torch.randn(2, 2, 90, size).to(dtype).unbind()
    codebook, indices = torch.randn(2, 11, size).to(dtype), torch.randint(11, (2, 90))
    grad_loss = torch.tensor(1.7, dtype=accumulate_dtype(dtype))
    inputs = (grad, grad_loss, x, codebook, indices)
    expected = torch.ops.fastgen.vq_quantize_bwd(*inputs, 0.3, 1.2, True)
    for ours, cpu in zip(vq.backward(*inputs, 0.3, 1.2), expected, strict=True):
        torch.testing.assert_close(ours, cpu)
