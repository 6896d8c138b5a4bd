"""Every op once at small sizes on the GPU, forward and backward, for tools that watch memory:
`compute-sanitizer --tool memcheck python -m benchmarks.small_cases`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from fastgen import testing

DTYPES = (torch.float32, torch.bfloat16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: runs and prints each case; 2 where there is no such device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_cases", description=__doc__)
    parser.add_argument("--device", default="cuda", help="default cuda")
    device = parser.parse_args(arguments).device
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "there is no NVIDIA GPU that PyTorch can use here\n")
    for case in testing.CASES:
        for backend in testing.backends_here(case.op, device):
            if backend == "reference":
                continue
            for dtype in DTYPES:
                for shape in case.shapes[:3]:
                    sample = case.sample(shape, dtype, device)
                    testing.run(case, sample, backend)
                    if case.grad:
                        testing.gradients(case, sample, backend)
                if device == "cuda":
                    torch.cuda.synchronize()
            print(f"{case.id}, {backend}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
