"""What a row is given does not depend on how the joint batch is cut."""

import pytest
import torch

from fastgen import ops
from fastgen.random import derive_key
from fastgen.training.draws import Draws

KEY = derive_key(0, 5)
SHAPES = [(), (1,), (3,), (50,), (4, 2)]


def every_kind(draws, shape):
    yield draws.normal(*shape)
    yield draws.uniform(*shape)
    yield draws.integers(-3, 4, *shape)
    yield draws.bernoulli(torch.full((draws.count, *shape), 0.3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", (1, 2, 3, 6))
def test_parts_have_their_rows_of_the_whole(shape, count):
    whole = list(every_kind(Draws(12, KEY), shape))
    parts = [every_kind(Draws(count, KEY, first), shape) for first in range(0, 12, count)]
    for expected, *found in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(found), expected)


def test_a_draw_is_that_of_the_key():
    draws = Draws(3, KEY, 2)
    assert torch.equal(draws.normal(5), ops.normal(KEY, (10, 5))[2:5])
    assert not torch.equal(draws.normal(5), ops.normal(KEY, (10, 5))[2:5])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", (0, 1, 4))
def test_the_source_of_a_draw_gives_that_draw(shape, first):
    """As a key where the rows begin with a block; the draws after it are the same either way."""
    plain, sources = Draws(5, KEY, first), Draws(5, KEY, first)
    for _ in range(2):
        expected, source = plain.normal(*shape), sources.normal_source(*shape)
        zeros = torch.zeros(5, *shape)
        found, _ = ops.reparam_kl(zeros, zeros, **source)
        torch.testing.assert_close(found, expected)
        if first % 4 == 0:
            assert source.keys() == {"key"}
    assert torch.equal(plain.uniform(3), sources.uniform(3))


def test_distributions():
    draws = Draws(200_000, KEY)
    values = draws.uniform()
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 20, 0, 1)
    assert ((counts - 10_000).square() / 10_000).sum() < 45
    numbers = draws.integers(3, 10)
    assert numbers.dtype == torch.int64 and numbers.min() == 3 and numbers.max() == 9
    assert ((numbers.bincount()[3:] - 200_000 / 7).abs() < 700).all()
    share = draws.bernoulli(torch.tensor(0.3).expand(200_000)).mean().item()
    assert share == pytest.approx(0.3, abs=0.005)
    assert (draws.bernoulli(torch.ones(200_000)) == 1).all()
    assert (draws.bernoulli(torch.zeros(200_000)) == 0).all()


def test_torchs_generator_is_asked_for_nothing_but_a_key():
    before = torch.get_rng_state()
    for value in every_kind(Draws(4, KEY), (3,)):
        assert len(value) == 4
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    first = Draws(4).normal(2)
    torch.manual_seed(1)
    assert torch.equal(Draws(4).normal(2), first) and not torch.equal(Draws(4).normal(2), first)
