"""One of two ranks (`two_ranks.py RANK STORE`): fails unless both hold what one process would."""

import copy
import sys

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which it would keep for ever
from gloo_group import joined

from fastgen import nn
from fastgen.nn._kmeans import all_reduce, candidates


def same_on_both(module):
    for key, value in module.state_dict().items():
        value = value.to(torch.float64).contiguous()
        other = value.clone()
        dist.broadcast(other, 0)
        assert torch.equal(value, other), key


def joint_batch(rank, make, rows=40):
    """Both ranks on halves of a batch, and one process on the whole: same codebook and usage."""
    torch.manual_seed(0)
    shared = make()
    one = copy.deepcopy(shared)
    for module in one.modules():
        if hasattr(module, "sync"):
            module.sync = False
    for _ in range(5):
        x = torch.randn(rows, 4, dtype=torch.float64)
        cut = 2 * rows // 3
        shared(x[cut:] if rank else x[:cut])
        one(x)
        for (key, got), expected in zip(
            shared.state_dict().items(), one.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(got, expected, msg=lambda m, k=key: f"{k}: {m}")
        same_on_both(shared)


def random_choices(rank, make):
    """k-means and revival draw differently on each rank, with a rank that comes without vectors."""
    torch.manual_seed(0)
    layer = make()
    torch.manual_seed(rank)
    for step in range(12):
        x = torch.randn(20, 4, dtype=torch.float64)
        layer(x[:0] if step in (0, 7) and rank == 1 else x)
        same_on_both(layer)
    return layer


def candidates_come_from_both_ranks(rank):
    """Each code is offered one whole row, of either rank."""
    rows = torch.arange(40.0).view(20, 2) + 100 * rank
    offers = all_reduce(candidates(rows, None, 16, sync=True), sync=True)
    assert (offers[:, -1] == 1).all()
    offers = offers[:, :-1]
    assert torch.equal(offers[:, 1], offers[:, 0] + 1) and (offers[:, 0] % 100 < 40).all()
    assert set((offers[:, 0] // 100).tolist()) == {0.0, 1.0}


def one_collective(rank, make):
    """A training step sends all its statistics at once."""
    layer, sent = make(), []
    reduce = dist.all_reduce
    dist.all_reduce = lambda tensor: (sent.append(tensor.numel()), reduce(tensor))
    try:
        layer(torch.randn(30, 4, dtype=torch.float64))
    finally:
        dist.all_reduce = reduce
    assert len(sent) == 1, sent


def wrapped(rank):
    """In DistributedDataParallel, whose buffers it broadcasts, with gradients averaged."""
    torch.manual_seed(0)
    vq = nn.VectorQuantizer(6, 4, kmeans_init=True, dtype=torch.float64)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4).double(), vq)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    for _ in range(3):
        result = parallel(torch.randn(20, 4, dtype=torch.float64))
        (result.quantized.square().mean() + result.loss).backward()
        same_on_both(model)
        assert model[0].weight.grad.isfinite().all()


def every_check(rank):
    wide = {"dtype": torch.float64}
    layers = [
        lambda: nn.VectorQuantizer(6, 4, decay=0.8, **wide),
        lambda: nn.VectorQuantizer(6, 4, metric="cosine", **wide),
        lambda: nn.VectorQuantizer(6, 4, codebook="gradient", **wide),
        lambda: nn.ResidualVQ(3, 6, 4, **wide),
    ]
    for make in layers:
        joint_batch(rank, make)
        one_collective(rank, make)
    revive = {"kmeans_init": True, "decay": 0.3, "revive_after": 1, "revive_threshold": 0.9, **wide}
    random_choices(rank, lambda: nn.VectorQuantizer(16, 4, **revive))
    random_choices(rank, lambda: nn.VectorQuantizer(16, 4, codebook="gradient", **revive))
    random_choices(rank, lambda: nn.ResidualVQ(2, 16, 4, **revive))
    candidates_come_from_both_ranks(rank)
    wrapped(rank)
    print("all checks ran", flush=True)


def main(rank, store):
    with joined(rank, store):
        every_check(rank)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2])
