"""One of two ranks (`two_ranks.py RANK STORE`): fails unless, in DistributedDataParallel, patched
models train as their libraries' own do there, and in one process on the joint batch."""

import sys

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which it would keep for ever
from examples import EXAMPLES, installed
from gloo_group import joined
from torch import nn

import fastgen
from fastgen.integrations import _coupling


def compare(rank, example, one):
    """Three steps; `one` is the library's own model and was made before there was a group."""
    own, patched = (example.objective(torch.float64) for _ in range(2))
    assert not fastgen.patch(patched).left
    ranks, own_ranks = map(nn.parallel.DistributedDataParallel, (patched, own))
    assert fastgen.explain(ranks).replaced and not fastgen.explain(own_ranks).replaced
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (patched, own, one)]
    close = {"rtol": example.rounding, "atol": example.rounding}
    for step in range(3):
        x = example.batch(8, seed=step, dtype=torch.float64)
        half = x[4:] if rank else x[:4]
        for model, batch in ((ranks, half), (own_ranks, half), (one, x)):
            model.zero_grad()
            model(batch).backward()
        grads, *expected = ([p.grad for p in m.parameters()] for m in (patched, own, one))
        assert any(grad is not None and grad.any() for grad in grads)
        for other in expected:
            torch.testing.assert_close(grads, other, **close)
        for optimizer in optimizers:
            optimizer.step()
        for other in (own, one) if example.buffers_join else (own,):
            torch.testing.assert_close(list(patched.buffers()), list(other.buffers()), **close)
    weights = list(patched.parameters())
    for parameter in weights:
        first = parameter.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, 0)
        assert torch.equal(parameter, first)


def main(rank, store):
    _coupling.CPU_FROM.update(dict.fromkeys(_coupling.CPU_FROM, 0))
    names = list(installed())
    alone = {name: EXAMPLES[name].objective(torch.float64) for name in names}
    with joined(rank, store):
        for name in names:
            compare(rank, EXAMPLES[name], alone[name])
            print(name, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2])
