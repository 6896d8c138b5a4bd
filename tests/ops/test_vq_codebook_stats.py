"""What is special to vq_codebook_stats: range errors, accuracy of long sums, heads."""

import pytest
import torch

from fastgen import ops


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("wrong", (-1, 4, 2**40))
def test_an_index_out_of_range_is_named(backend, wrong):
    indices = torch.tensor([0, 3, wrong, 1])
    with pytest.raises(ValueError, match=rf"^indices: expected values in \[0, 4\), got {wrong}$"):
        ops.vq_codebook_stats(torch.randn(4, 3), indices, 4, backend=backend)


@pytest.mark.parametrize("size", (0, -3))
def test_codebook_size_is_checked(size):
    empty = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"codebook_size: expected a positive int, got {size}"):
        ops.vq_codebook_stats(torch.empty(0, 3), empty, size)
    with pytest.raises(TypeError, match="codebook_size: expected a positive int, got float"):
        ops.vq_codebook_stats(torch.empty(0, 3), empty, 4.0)


def test_indices_must_fit_x():
    with pytest.raises(ValueError, match=r"indices: expected shape \(5,\).*got \(4,\)"):
        ops.vq_codebook_stats(torch.randn(5, 3), torch.zeros(4, dtype=torch.int64), 4)
    with pytest.raises(TypeError, match="indices: expected dtype int64, got int32"):
        ops.vq_codebook_stats(torch.randn(5, 3), torch.zeros(5, dtype=torch.int32), 4)


def test_long_sums_are_as_good_as_float64():
    x = torch.rand(100_000, 3)
    counts, sums = ops.vq_codebook_stats(x, torch.zeros(100_000, dtype=torch.int64), 2)
    assert counts.tolist() == [100_000.0, 0.0]
    assert torch.equal(sums[0], x.double().sum(0).float()) and not sums[1].any()


def test_heads_by_offset_indices():
    x, codebook = torch.randn(3, 50, 5), torch.randn(3, 7, 5)
    indices = ops.vq_nearest(x, codebook)
    offset = indices + 7 * torch.arange(3)[:, None]
    counts, sums = ops.vq_codebook_stats(x, offset, 3 * 7)
    for h in range(3):
        expected = ops.vq_codebook_stats(x[h], indices[h], 7)
        assert torch.equal(counts.view(3, 7)[h], expected[0])
        assert torch.equal(sums.view(3, 7, 5)[h], expected[1])


def test_unequal_use_is_the_same_for_every_thread_count(threads):
    x = torch.randn(20_000, 33)
    indices = (torch.rand(20_000) ** 8 * 500).long()
    threads(1)
    expected = ops.vq_codebook_stats(x, indices, 501)
    for count in 2, 3:
        threads(count)
        for a, b in zip(ops.vq_codebook_stats(x, indices, 501), expected, strict=True):
            assert torch.equal(a, b)


def test_channels_first_rows():
    x = torch.randn(4, 6, 30)
    indices = torch.randint(0, 5, (4, 30))
    strided = ops.vq_codebook_stats(x.transpose(1, 2), indices, 5)
    dense = ops.vq_codebook_stats(x.transpose(1, 2).contiguous(), indices, 5)
    assert torch.equal(strided[0], dense[0]) and torch.equal(strided[1], dense[1])


def test_gradient_is_a_gather():
    x = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(0, 5, (40,))
    counts, sums = ops.vq_codebook_stats(x, indices, 5)
    assert not counts.requires_grad
    cotangent = torch.randn(5, 3, dtype=torch.float64)
    (grad,) = torch.autograd.grad(sums, x, cotangent)
    assert torch.equal(grad, cotangent[indices])
