import pytest
import torch

from fastgen import nn, ops, random


@pytest.mark.parametrize(
    "shape,dim", (((4, 6), 1), ((4, 6), -1), ((2, 6, 5, 3), 1), ((2, 5, 6), 2))
)
def test_cut_input_equals_halves(shape, dim):
    both = torch.randn(shape)
    key = random.make_key(3)
    mu, logvar = both.chunk(2, dim)
    layer = nn.GaussianReparam(dim)
    for actual, wanted in zip(layer(both, key=key), layer(mu, logvar, key=key), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    z, kl = ops.reparam_kl(mu.contiguous(), logvar.contiguous(), key=key)
    torch.testing.assert_close(layer(both, key=key)[0], z, rtol=0, atol=0)
    torch.testing.assert_close(layer(both, key=key)[1], kl, rtol=0, atol=0)


def test_gradients_reach_the_whole_input():
    both = torch.randn(4, 6, requires_grad=True)
    z, kl = nn.GaussianReparam()(both)
    (z.square().sum() + kl.sum()).backward()
    assert (both.grad != 0).all()


def test_evaluation_samples_by_default_and_gives_the_mean_on_request():
    mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
    for mean_in_eval in (False, True):
        layer = nn.GaussianReparam(mean_in_eval=mean_in_eval)
        assert not torch.equal(layer(mu, logvar)[0], mu)
        z, kl = layer.eval()(mu, logvar)
        assert torch.equal(z, mu) == mean_in_eval
        torch.testing.assert_close(kl, ops.reparam_kl(mu, logvar)[1], rtol=0, atol=0)


def test_manual_seed_and_generator_govern_the_sample():
    layer, mu = nn.GaussianReparam(), torch.zeros(2, 3)
    torch.manual_seed(5)
    first, second = layer(mu, mu)[0], layer(mu, mu)[0]
    torch.manual_seed(5)
    assert torch.equal(layer(mu, mu)[0], first) and not torch.equal(first, second)
    from_generator = [layer(mu, mu, generator=torch.Generator().manual_seed(7))[0] for _ in "ab"]
    assert torch.equal(*from_generator)


def test_state_is_empty_and_options_show():
    layer = nn.GaussianReparam(2, mean_in_eval=True)
    assert not layer.state_dict()
    assert repr(layer) == "GaussianReparam(dim=2, mean_in_eval=True)"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"dim: expected .* got 0"):
        nn.GaussianReparam(0)
    layer = nn.GaussianReparam()
    with pytest.raises(ValueError, match=r"mu: expected an even size .* got shape \(4, 5\)"):
        layer(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"mu: expected .* along dimension 1, got shape \(4,\)"):
        layer(torch.zeros(4))
    with pytest.raises(ValueError, match="logvar: expected shape"):
        layer(torch.zeros(4, 5), torch.zeros(4, 6))
