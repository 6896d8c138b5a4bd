import pytest
import torch

from fastgen.metrics import precision_recall_density_coverage as prdc


def by_definition(real, fake, k):
    """The sums of the papers, with the whole matrices."""

    def radius(x):
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1).values

    between = torch.cdist(real, fake, compute_mode="donot_use_mm_for_euclid_dist")
    in_real, in_fake = between <= radius(real)[:, None], between <= radius(fake)
    return (
        in_real.any(0).double().mean().item(),
        in_fake.any(1).double().mean().item(),
        in_real.double().sum().item() / (k * len(fake)),
        in_real.any(1).double().mean().item(),
    )


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
@pytest.mark.parametrize("k", [1, 5])
def test_against_the_definition(chunk, k):
    real = torch.randn(60, 4, dtype=torch.float64) + 100
    fake = 0.8 * torch.randn(45, 4, dtype=torch.float64) + 100.3
    found = prdc(real, fake, neighbours=k, chunk=chunk)
    expected = by_definition(real, fake, k)
    assert tuple(found) == pytest.approx(expected, abs=1e-12)
    assert all(0 < value < 2 for value in found) and len(set(found)) >= 3


def test_far_from_the_origin_in_float32():
    real, fake = torch.randn(80, 3) + 1e3, torch.randn(80, 3) + 1e3
    expected = by_definition(real.double(), fake.double(), 5)
    assert tuple(prdc(real, fake)) == pytest.approx(expected, abs=1e-12)


def test_the_same_set():
    x = torch.randn(100, 5)
    found = prdc(x, x.clone())
    assert found.precision == found.recall == found.coverage == 1
    assert found.density == pytest.approx(1.2)  # its own 5 neighbours and itself, over 5


def test_disjoint_sets():
    x = torch.randn(100, 5)
    assert tuple(prdc(x, x + 1000)) == (0, 0, 0, 0)


def test_dropped_modes_cost_recall_and_coverage_not_precision():
    modes = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    real = torch.cat([mode + torch.randn(200, 2) for mode in modes])
    found = prdc(real, modes[0] + torch.randn(400, 2))
    assert found.precision > 0.95 and 0.4 < found.coverage < 0.55 and 0.4 < found.recall < 0.55


def test_an_outlier_moves_precision_more_than_density():
    """Naeem et al., section 3.1: one real outlier has a ball over all the fakes."""
    real, fake = torch.randn(100, 2), torch.randn(100, 2) + torch.tensor([30.0, 0.0])
    real[0] = torch.tensor([60.0, 0.0])
    found = prdc(real, fake)
    assert found.precision == 1 and found.density == pytest.approx(0.2) and found.coverage <= 0.01


def test_bad_input():
    x = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"\(N, D\) and \(M, D\), got \(5, 3\) and \(5, 4\)"):
        prdc(x, torch.zeros(5, 4))
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"neighbours must be in \[1, 4\] .* got {k}"):
            prdc(x, x, neighbours=k)
