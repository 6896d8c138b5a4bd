import math

import pytest
import torch

from fastgen.metrics import FeatureMoments, frechet_distance


def samples(count, dim, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return scale * torch.randn(count, dim, generator=generator) @ mixing + shift


def with_moments(mean, covariance, count=400):
    """Features whose sample mean and covariance are exactly these."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1)))
    return x @ whiten.T @ torch.linalg.cholesky(covariance).T + mean


def test_against_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = samples(500, 16), samples(700, 16, seed=1, scale=1.5, shift=0.3)
    covariances = [torch.cov(x.double().T) for x in (a, b)]
    root = torch.from_numpy(linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real)
    expected = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected += sum(c.trace() for c in covariances) - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_commuting_gaussians_by_hand():
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.1, 0.5]).double()
    m1, m2 = torch.zeros(3).double(), torch.tensor([1.0, -2.0, 0.0]).double()
    a, b = with_moments(m1, torch.diag(s1**2)), with_moments(m2, torch.diag(s2**2))
    assert frechet_distance(a, b) == pytest.approx(5 + 4 + 1.9**2, rel=1e-9)


@pytest.mark.parametrize("count", [5, 40])
def test_fewer_samples_than_features(count):
    """A rotation of low-rank covariances: by hand in the space that they span."""
    low_a, low_b = samples(count, 3), samples(count, 3, seed=1, scale=2.0)
    basis = torch.linalg.qr(samples(64, 64, seed=2).double()).Q[:3]
    embedded = frechet_distance(low_a.double() @ basis, low_b.double() @ basis)
    assert embedded == pytest.approx(frechet_distance(low_a, low_b), rel=1e-6)
    assert math.isfinite(embedded) and embedded > 0.1


@pytest.mark.parametrize("count", [3, 50, 500])
def test_a_set_against_itself(count):
    x = samples(count, 128)
    scale = torch.cov(x.double().T).trace().item()
    assert frechet_distance(x, x) <= 1e-9 * scale
    assert frechet_distance(x, x[torch.randperm(count)]) <= 1e-9 * scale


def test_constant_features_have_a_distance():
    a, b = torch.zeros(10, 4), torch.full((10, 4), 2.0)
    assert frechet_distance(a, b) == pytest.approx(16)


def test_symmetric_and_growing():
    a, b, c = samples(300, 8), samples(300, 8, shift=1.0), samples(300, 8, shift=2.0)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(8, rel=1e-4)
    assert frechet_distance(a, c) == pytest.approx(32, rel=1e-4)


@pytest.mark.parametrize("sizes", [[300], [1, 299], [7, 100, 193]])
def test_moments_of_parts_add_up(sizes):
    x = samples(300, 6, shift=1e3)
    first, *rest = (FeatureMoments.of(part) for part in x.split(sizes))
    for part in rest:
        first = first.merge(part)
    assert first.count == 300
    torch.testing.assert_close(first.covariance, torch.cov(x.double().T))
    other = samples(100, 6, seed=3)
    assert frechet_distance(first, other) == pytest.approx(frechet_distance(x, other), rel=1e-9)


def test_bad_input():
    with pytest.raises(ValueError, match=r"features must be \(N >= 1, D\), got \(3, 4, 5\)"):
        frechet_distance(torch.zeros(3, 4, 5), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="one dimension, got 4 and 5"):
        frechet_distance(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(3, 4))
