"""Toy densities: the sampler, the log-density and the entropy are of one distribution."""

import math

import pytest
import torch

from fastgen.data import TOYS, DataError, load_toy
from fastgen.data.toys import TOY_EXTENT

each_toy = pytest.mark.parametrize("density", TOYS.values(), ids=list(TOYS))

#: Cells of the grid of integration a side. A cell is a fraction of the least scale, 0.08, and the
#: midpoint rule converges exponentially on what is smooth; the board's edges are those of cells.
CELLS = 500


def grid():
    side = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS * 2 * TOY_EXTENT - TOY_EXTENT
    return torch.cartesian_prod(side, side), (2 * TOY_EXTENT / CELLS) ** 2


def sample(density, num=20_000):
    return density.sample(num, torch.Generator().manual_seed(1))


@each_toy
def test_density_integrates_to_one_and_to_its_entropy(density):
    points, area = grid()
    log_p = density.log_prob(points)
    p = log_p.exp()
    assert (p.sum() * area).item() == pytest.approx(1, abs=1e-8)
    entropy = -torch.where(p > 0, p * log_p, 0).sum().item() * area
    assert entropy == pytest.approx(density.entropy, abs=1e-6)


@each_toy
def test_samples_have_the_density(density):
    """Their mean log-density is that of the density, and so is the share of each of 100 cells."""
    drawn = sample(density)
    assert drawn.shape == (20_000, 2) and drawn.dtype == torch.float32
    log_p = density.log_prob(drawn)
    error = log_p.std().item() / math.sqrt(len(drawn))
    assert -log_p.mean().item() == pytest.approx(density.entropy, abs=4 * error + 1e-9)
    points, area = grid()
    cells = ((points + TOY_EXTENT) // 1).long()
    mass = torch.zeros(10, 10, dtype=torch.float64)
    mass.index_put_(tuple(cells.T), density.log_prob(points).exp() * area, accumulate=True)
    found = torch.zeros(10, 10, dtype=torch.float64)
    where = tuple(((drawn + TOY_EXTENT) // 1).long().T)
    found.index_put_(where, torch.full((20_000,), 1 / 20_000).double(), accumulate=True)
    spread = (mass * (1 - mass).clamp_min(0) / 20_000).sqrt()
    assert ((found - mass).abs() <= 4.5 * spread + 1e-9).all()


@each_toy
def test_samples_follow_the_generator(density):
    assert torch.equal(sample(density), sample(density))
    other = density.sample(20_000, torch.Generator().manual_seed(2))
    assert not torch.equal(sample(density), other)


def test_nothing_lies_off_the_board():
    board = TOYS["checkerboard"]
    points = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 5.0], [-1.0, -3.9], [-1.0, -4.1]])
    expected = [-math.log(32), -math.inf, -math.inf, -math.inf, -math.inf]
    assert board.log_prob(points).tolist() == pytest.approx(expected)
    assert board.log_prob(sample(board)).isfinite().all()


def test_moons_density_is_the_average_over_the_arcs():
    """Against 100,000 points of each arc instead of Gauss-Legendre nodes."""
    angle = math.pi * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
    arcs = 2 * torch.cat([upper, lower]) + torch.tensor([-1, -0.2], dtype=torch.float64)
    for point in sample(TOYS["moons"], 20).double():
        squares = (arcs - point).square().sum(-1)
        expected = (-squares / 0.08).exp().mean().log() - math.log(2 * math.pi * 0.04)
        found = TOYS["moons"].log_prob(point[None])
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-8)


def test_splits_are_fixed_and_differ():
    data, again = load_toy("moons"), load_toy("moons")
    sizes = [len(split) for split in (data.train, data.valid, data.test)]
    assert sizes == [500_000, 20_000, 100_000] and data.density is TOYS["moons"]
    for name in ("train", "valid", "test"):
        assert torch.equal(getattr(data, name).points, getattr(again, name).points)
    assert not torch.equal(data.train.points[:20_000], data.valid.points)
    assert not torch.equal(data.test.points[:20_000], data.valid.points)


def test_bad_requests():
    with pytest.raises(DataError, match="toy density 'spirals' is not known; known: eight-gauss"):
        load_toy("spirals")
    with pytest.raises(ValueError, match=r"points must be \(N, 2\), got \(3,\)"):
        TOYS["moons"].log_prob(torch.zeros(3))
