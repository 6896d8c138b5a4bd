"""One of two ranks (`two_ranks.py RANK STORE`): fails unless both hold what one process would."""

import copy
import sys

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, which it would keep for ever
from gloo_group import joined

from fastgen import nn
from fastgen.nn._kmeans import agree, all_reduce, candidates


def same_on_both(module):
    for key, value in module.state_dict().items():
        value = value.to(torch.float64).contiguous()
        other = value.clone()
        dist.broadcast(other, 0)
        assert torch.equal(value, other), key


def part_of(x, rank, cut):
    return x[cut:] if rank else x[:cut]


def assert_states_close(shared, one):
    for (key, got), expected in zip(
        shared.state_dict().items(), one.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(got, expected, msg=lambda m, k=key: f"{k}: {m}")


def alone(module):
    one = copy.deepcopy(module)
    for each in one.modules():
        if hasattr(each, "sync"):
            each.sync = False
    return one


def joint_batch(rank, make, seed=0):
    """Both ranks on parts of a batch, and one process on the whole: same results and state.

    Rank 1 has nothing at first, another generator, and rows that are not finite. With equal parts
    the mean of the ranks' losses is the loss.
    """
    torch.manual_seed(0)
    shared = make()
    one = alone(shared)
    batches = torch.Generator().manual_seed(seed)
    for step in range(8):
        x = torch.randn(40, 4, dtype=torch.float64, generator=batches)
        cut = (40, 26, 20, 3)[step % 4]
        if step in (3, 5):
            x[-2:, step % 4] = float("nan")
        torch.manual_seed(100 * rank + step)
        ours = shared(part_of(x, rank, cut))
        torch.manual_seed(step)
        expected = one(x)
        assert torch.equal(ours.indices, part_of(expected.indices, rank, cut))
        torch.testing.assert_close(
            ours.quantized, part_of(expected.quantized, rank, cut), equal_nan=True
        )
        if cut == 20:
            loss = ours.loss.detach().clone()
            dist.all_reduce(loss)
            torch.testing.assert_close(loss / 2, expected.loss)
        assert_states_close(shared, one)
        same_on_both(shared)


def nothing_to_start_from(rank, make):
    """Until there is a row on any rank none starts; no rank waits for another."""
    torch.manual_seed(0)
    layer = make()
    rows = torch.randn(20, 4, dtype=torch.float64)
    for x in (rows[:0], rows * float("nan")):
        layer(x)
        assert not any(value for key, value in layer.state_dict().items() if "initialized" in key)
    one = alone(layer)
    torch.manual_seed(rank)
    layer(rows * float("nan") if rank == 0 else rows)
    torch.manual_seed(0)
    one(rows)
    assert_states_close(layer, one)


def started_on_one_rank(rank, make, loading, wrapped):
    """A checkpoint loaded by one rank alone is where all go on from, and draws nothing for it."""
    torch.manual_seed(7)
    trained, x = make(), torch.randn(40, 4, dtype=torch.float64)
    for each in trained.modules():
        if hasattr(each, "sync"):
            each.sync = False
    trained(x)
    torch.manual_seed(rank)
    layer = make()
    if rank == loading:
        layer.load_state_dict(trained.state_dict())
    model = layer
    if wrapped:  # which gives all ranks what rank 0 has
        model = torch.nn.Sequential(torch.nn.Linear(4, 4).double(), layer)
        torch.nn.init.eye_(model[0].weight), torch.nn.init.zeros_(model[0].bias)
        model = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(3):
        torch.manual_seed(step)
        model(part_of(x, rank, 15))
        torch.manual_seed(step)
        trained(x)
        assert_states_close(layer, trained)
    same_on_both(layer)


def rows_come_from_both_ranks(rank):
    """Each code is offered one whole row of the joint batch, and none twice."""
    rows = torch.arange(40.0).view(20, 2) + 100 * rank
    valid = torch.ones(20, dtype=torch.bool)
    draw = agree(valid.sum(), 16, sync=True)
    offers = all_reduce(candidates(rows, valid, draw), sync=True)
    assert (offers[:, -1] == 1).all()
    offers = offers[:, :-1]
    assert torch.equal(offers[:, 1], offers[:, 0] + 1) and (offers[:, 0] % 100 < 40).all()
    assert len(set(offers[:, 0].tolist())) == 16
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
    drawing = [
        lambda: nn.VectorQuantizer(16, 4, **revive),
        lambda: nn.VectorQuantizer(16, 4, metric="cosine", **revive),
        lambda: nn.VectorQuantizer(16, 4, codebook="gradient", **revive),
        lambda: nn.ResidualVQ(2, 16, 4, **revive),
    ]
    for make in drawing:
        for seed in range(3):
            joint_batch(rank, make, seed)
        nothing_to_start_from(rank, make)
        for loading in (0, 1):
            started_on_one_rank(rank, make, loading, wrapped=False)
        started_on_one_rank(rank, make, 0, wrapped=True)
    rows_come_from_both_ranks(rank)
    wrapped(rank)
    print("all checks ran", flush=True)


def main(rank, store):
    with joined(rank, store):
        every_check(rank)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2])
