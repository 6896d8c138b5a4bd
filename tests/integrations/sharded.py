"""One of two ranks (`sharded.py RANK STORE`): fails unless a model is patched and unpatched whose
layers have a class that torch.distributed derived from their own."""

import os
import sys

import torch
import torch.distributed as dist
from examples import EXAMPLES
from torch.distributed.fsdp import fully_shard

import fastgen


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    example = EXAMPLES["torch.nn"]
    own, model = (example.objective(torch.float64) for _ in range(2))
    x = example.batch(4, dtype=torch.float64)
    expected = own(x)
    report = fastgen.patch(model)
    paths = [piece.path for piece in report.replaced]
    mesh = dist.init_device_mesh("cpu", (2,))
    for path in paths:
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    for patched in (True, False, True):
        assert [piece.path for piece in fastgen.explain(model).replaced] == paths * patched
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        if patched:
            fastgen.unpatch(model)
        else:
            assert fastgen.patch(model).replaced == report.replaced
    dist.destroy_process_group()
    # gloo's threads, which the mesh keeps, would sometimes abort when the interpreter ends
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2])
