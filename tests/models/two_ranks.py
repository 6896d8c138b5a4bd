"""One of two ranks (`two_ranks.py RANK STORE`): fails unless what is of the whole batch is the same
as in one process."""

import sys

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which it would keep for ever
from gloo_group import joined

from fastgen.models import VAE, StyleGANGenerator
from fastgen.models.flow_layers import FlowBatchNorm
from fastgen.nn import InvertibleChain, _ranks

ROWS, CUT = 12, 7


def own(rank, x, cut=CUT):
    return x[cut:] if rank else x[:cut]


def batch_norms(sync, **options):
    layers = [FlowBatchNorm(3, sync=sync), FlowBatchNorm(3, momentum=0.5, sync=sync)]
    return InvertibleChain(layers, **options).double()


def energy(y, log_det):
    return (y.pow(3) * torch.arange(1.0, 4.0).view(3, 1, 1)).sum() - log_det.sum()


def a_batch_norm_counts_all_rows(rank, reversible):
    """Values, log-determinants, running averages and gradients; parts of unequal size and far from
    zero."""
    torch.manual_seed(0)
    shared, one = batch_norms(True, reversible=reversible), batch_norms(False)
    for _ in range(3):
        x = (torch.randn(ROWS, 3, 2, 2, dtype=torch.float64) + 1000).requires_grad_()
        part = own(rank, x.detach()).clone().requires_grad_()
        y, log_det = one(x)
        found, found_log_det = shared(part)
        torch.testing.assert_close(found, own(rank, y))
        torch.testing.assert_close(found_log_det, own(rank, log_det))
        energy(y, log_det).backward()
        energy(found, found_log_det).backward()
        torch.testing.assert_close(part.grad, own(rank, x.grad))
        for name, value in shared.state_dict().items():
            torch.testing.assert_close(value, one.state_dict()[name])
            other = value.clone()
            dist.broadcast(other, 0)
            assert torch.equal(value, other), name
    back, undone = shared.inverse(found)
    torch.testing.assert_close(back, one.inverse(own(rank, y))[0])
    torch.testing.assert_close(undone, one.inverse(own(rank, y))[1])
    alone = batch_norms(True).eval()
    if rank == 0:  # or it would wait for ever
        alone(part)


def its_second_derivative_does_too(rank):
    def penalty(layer, x):
        (grad,) = torch.autograd.grad(energy(*layer(x)), x, create_graph=True)
        return grad.square().sum()

    torch.manual_seed(0)
    x = torch.randn(ROWS, 3, 2, 2, dtype=torch.float64).requires_grad_()
    part = own(rank, x.detach()).clone().requires_grad_()
    (whole,) = torch.autograd.grad(penalty(batch_norms(False), x), x)
    (found,) = torch.autograd.grad(penalty(batch_norms(True), part), part)
    torch.testing.assert_close(found, own(rank, whole))


def without_sync_a_part_counts_alone(rank):
    x = torch.randn(ROWS, 3, 2, 2, dtype=torch.float64) + rank
    layer = batch_norms(False)
    layer(x)
    torch.testing.assert_close(layer.layers[0].mean, x.mean((0, 2, 3)))


def free_bits_are_of_the_joint_batch(rank):
    """A latent is paid for where its KL over all rows is below, whatever that of a part is."""
    torch.manual_seed(0)
    model = VAE((1, 4, 4), latent_dim=6, width=8, layers=1).double()
    images = torch.rand(ROWS, 1, 4, 4, dtype=torch.float64)
    images[ROWS // 2 :] *= 5
    noise = torch.randn(ROWS, 6, dtype=torch.float64)
    halves = [t.chunk(2)[rank] for t in (images, noise)]
    group = _ranks.shared
    _ranks.shared = lambda sync=True: False
    mu, logvar = model.encode(images)
    per_latent = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean(0)
    floor = per_latent.median().item()
    whole = model.elbo(images, noise=noise, free_bits=floor)
    alone = model.elbo(halves[0], noise=halves[1], free_bits=floor)
    _ranks.shared = group
    (wanted,) = torch.autograd.grad(whole.bound.mean(), model.encoder[1].weight)
    found = model.elbo(halves[0], noise=halves[1], free_bits=floor)
    (grad,) = torch.autograd.grad(found.bound.mean(), model.encoder[1].weight)
    torch.testing.assert_close(_ranks.mean(grad), wanted)
    torch.testing.assert_close(_ranks.mean(found.bound.mean()), whole.bound.mean())
    assert not torch.allclose(found.bound.mean(), alone.bound.mean())


def the_mean_of_w_is_that_of_all_latents(rank):
    torch.manual_seed(0)
    generator = StyleGANGenerator(8, latent_dim=4, channel_base=16, channel_max=4)
    z = torch.randn(ROWS, 4)
    generator(z.chunk(2)[rank])
    expected = 0.9 * generator.mapping(z).mean(0)  # a first average is mostly the first mean
    torch.testing.assert_close(generator.w_mean, expected)


def main(rank, store):
    with joined(rank, store):
        for reversible in (False, True):
            a_batch_norm_counts_all_rows(rank, reversible)
        its_second_derivative_does_too(rank)
        without_sync_a_part_counts_alone(rank)
        free_bits_are_of_the_joint_batch(rank)
        the_mean_of_w_is_that_of_all_latents(rank)
        print("all checks ran", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2])
