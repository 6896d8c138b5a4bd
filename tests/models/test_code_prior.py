import itertools
import math

import pytest
import torch

from fastgen.models import CodePrior


def make_prior(num_codes: int, grid_shape: tuple[int, ...]) -> CodePrior:
    torch.manual_seed(0)
    prior = CodePrior(num_codes, grid_shape, num_classes=2, width=16, layers=2, heads=2).eval()
    torch.nn.init.normal_(prior.head.weight, std=0.5)
    torch.nn.init.normal_(prior.position, std=0.5)
    torch.nn.init.normal_(prior.code_embedding.weight)
    torch.nn.init.normal_(prior.start_embedding.weight)
    return prior


@pytest.fixture
def prior() -> CodePrior:
    return make_prior(3, (2, 2))


def all_codes() -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)


def test_probabilities_sum_to_one(prior):
    codes = all_codes()
    for label in range(2):
        labels = torch.full((len(codes),), label)
        assert prior.log_prob(codes, labels).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_labels_matter(prior):
    codes = all_codes()
    zeros = torch.zeros(len(codes), dtype=torch.int64)
    difference = prior.log_prob(codes, zeros) - prior.log_prob(codes, zeros + 1)
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("position", range(4))
def test_causal(prior, position):
    codes = torch.tensor([[0, 1, 2, 0]])
    changed = codes.clone()
    changed[0, position] = (codes[0, position] + 1) % 3
    label = torch.tensor([0])
    before, after = prior(codes, label), prior(changed, label)
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    if position < 3:
        assert not torch.allclose(before[:, position + 1 :], after[:, position + 1 :])


@pytest.mark.parametrize("grid_shape", [(2, 2), (2, 3, 2), (1, 2, 3)])
def test_the_cache_changes_no_logits_and_no_sample(grid_shape):
    """Sampling by whole passes over all codes so far, from the same random numbers."""
    prior, seen = make_prior(5, grid_shape), []
    logits_of = prior._logits

    def recorded(hidden, first):
        seen.append(logits_of(hidden, first))
        return seen[-1]

    prior._logits = recorded
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    drawn = prior.sample(6, labels, generator=torch.Generator().manual_seed(2))
    assert drawn.shape == (6, *grid_shape)
    cached = torch.cat(seen, 1)
    assert cached.shape == (6, math.prod(grid_shape), 5)
    prior._logits = logits_of
    torch.testing.assert_close(cached, prior(drawn, labels), rtol=1e-4, atol=1e-5)
    generator, codes = torch.Generator().manual_seed(2), torch.empty(6, 0, dtype=torch.int64)
    for _ in range(math.prod(grid_shape)):
        probs = prior(codes, labels)[:, -1].softmax(-1)
        codes = torch.cat([codes, torch.multinomial(probs, 1, generator=generator)], 1)
    assert torch.equal(drawn.flatten(1), codes)


def test_sampling_attends_once_to_each_code(monkeypatch):
    prior, lengths = make_prior(5, (3, 4)), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, v, **options):
        lengths.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    prior.sample(2)
    assert lengths == [(1, n) for n in range(1, 13) for _ in range(2)]


def test_codes_of_one_position_have_codebooks_of_their_own():
    """Probabilities sum to one, later codes depend on all before, no code on a later one."""
    prior = make_prior(3, (1, 2, 2))
    codes = all_codes().view(-1, 1, 2, 2)
    labels = torch.zeros(len(codes), dtype=torch.int64)
    assert prior.log_prob(codes, labels).exp().sum().item() == pytest.approx(1, abs=1e-5)
    same = torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    with torch.no_grad():
        prior.position.zero_()
        prior.code_embedding.weight[3:] = prior.code_embedding.weight[:3]
        before = prior(same, labels[:1])
        prior.code_embedding.weight[3:] += torch.randn(3, 16)
    after = prior(same, labels[:1])
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2:], after[:, 2:])


@pytest.mark.parametrize("position", range(4))
def test_causal_with_two_codes_a_position(position):
    prior = make_prior(3, (1, 2, 2))
    codes = torch.tensor([[0, 1, 2, 0]])
    changed = codes.clone()
    changed[0, position] = (codes[0, position] + 1) % 3
    label = torch.tensor([0])
    before, after = prior(codes, label), prior(changed, label)
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    if position < 3:
        assert not torch.allclose(before[:, position + 1 :], after[:, position + 1 :])


def test_samples_follow_log_prob(prior):
    num = 20_000
    generator = torch.Generator().manual_seed(1)
    labels = torch.ones(num, dtype=torch.int64)
    drawn = prior.sample(num, labels, generator=generator).flatten(1)
    index = (drawn * torch.tensor([27, 9, 3, 1])).sum(1)
    observed = torch.bincount(index, minlength=81).double()
    expected = num * prior.log_prob(all_codes(), labels[:81]).detach().exp().double()
    common = expected >= 5
    chi_square = ((observed - expected) ** 2 / expected)[common].sum().item()
    degrees = int(common.sum())
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)
    # and not those of the other label
    other = num * prior.log_prob(all_codes(), 0 * labels[:81]).detach().exp().double()
    assert ((observed - other) ** 2 / other)[other >= 5].sum().item() > degrees + 50 * math.sqrt(
        degrees
    )


def test_sampling_repeats_and_spares_the_global_generator(prior):
    before = torch.get_rng_state()
    first, second = (prior.sample(5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (5, 2, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_low_temperature_takes_the_likeliest(prior):
    codes = prior.sample(4, torch.zeros(4, dtype=torch.int64), temperature=1e-4)
    assert (codes == codes[0]).all()


def test_untrained_is_uniform():
    prior = CodePrior(7, (3, 2), width=8, layers=1, heads=2).eval()
    log_prob = prior.log_prob(torch.randint(7, (4, 3, 2)))
    torch.testing.assert_close(log_prob, torch.full((4,), -6 * math.log(7)))


def test_bad_arguments(prior):
    codes, labels = torch.zeros(2, 2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels must be \(B,\) in \[0, 2\), got none"):
        prior.log_prob(codes)
    with pytest.raises(ValueError, match=r"labels must be none"):
        CodePrior(3, (2, 2), width=8, heads=2)(codes, labels)
    with pytest.raises(ValueError, match=r"codes must be \(B, \*\(2, 2\)\)"):
        prior.log_prob(codes[:, :1], labels)
    with pytest.raises(ValueError, match="at most 4 positions"):
        prior(torch.zeros(2, 5, dtype=torch.int64), labels)
    with pytest.raises(ValueError, match="temperature must be positive"):
        prior.sample(2, labels, temperature=0)
    with pytest.raises(ValueError, match=r"labels must be \(3,\)"):
        prior.sample(3, labels)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got \[0, 5\]"):
        prior.sample(2, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="width a multiple of heads"):
        CodePrior(3, (2, 2), width=9, heads=2)
