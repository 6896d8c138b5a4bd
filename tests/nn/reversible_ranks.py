"""One of two ranks (`reversible_ranks.py RANK STORE`): fails unless DistributedDataParallel gives a
reversible chain the gradients of a plain one."""

import copy
import sys

import torch
import torch.distributed.nn.functional  # before there is a group, which it would keep for ever
from gloo_group import joined
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastgen.models.flow_layers import FlowBatchNorm, Permutation
from fastgen.nn import AffineCoupling, InvertibleChain

DIM = 6


def conditioner():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, DIM))


def steps(chain, rank, unused):
    """Gradients of two steps, of two batches each, the first of which is not exchanged."""
    parallel = DistributedDataParallel(chain, find_unused_parameters=unused)
    found = []
    for step in range(2):
        torch.manual_seed(10 * rank + step)
        chain.zero_grad()
        first, second = torch.randn(2, 12, DIM, dtype=torch.float64)
        with parallel.no_sync():
            y, log_det = parallel(first)
            (y.square().sum() - log_det.sum()).backward()
        y, log_det = parallel(second)
        (y.square().sum() - log_det.sum()).backward()
        found += [p.grad.clone() for p in chain.parameters()]
        found += [b.clone() for b in chain.buffers()]
    return found


def main(rank, store):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [AffineCoupling(conditioner(), swap=i % 2 == 1) for i in range(3)]
    layers += [FlowBatchNorm(DIM), Permutation(torch.randperm(DIM))]
    plain = InvertibleChain(layers).double()
    with joined(rank, store):
        for unused in (False, True):
            one = copy.deepcopy(plain)
            other = InvertibleChain(copy.deepcopy(plain.layers), reversible=True)
            for a, b in zip(steps(other, rank, unused), steps(one, rank, unused), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    print("the same gradients", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
