"""What the machine can do at most, measured in the process that is timed.

`python -m benchmarks.roof` prints it.

Two limits: memory, as the bandwidth of a copy, and arithmetic, as the rate of multiply-adds that
wait for nothing, with the threads and the instruction set in use; on a GPU that of large matrix
products, of random numbers: of zeros they are faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.clock import in_turn, sets_of_inputs, timed

ROUNDS = 7


@dataclass(frozen=True)
class Roof:
    """The limits of the machine.

    Attributes:
        bandwidth: bytes/s, read plus write, of a copy larger than the caches.
        flops: float32 operations/s: on a CPU chains of multiply-adds in registers, on a GPU a large
            matrix product without TF32.
        bf16_flops: the same for bfloat16 dot products accumulated in float32; 0 where the CPU or
            the chosen instruction set has none.
        tf32_flops: the same for TF32; 0 on a CPU.
    """

    bandwidth: float
    flops: float
    bf16_flops: float = 0.0
    tf32_flops: float = 0.0

    def share(self, bytes_: int, flops: int, seconds: float, bandwidth: float) -> float:
        """Fraction of the limit that `seconds` reached, NaN where no work is counted.

        The limit is the larger of the time for the bytes at `bandwidth` and for the operations at
        the float32 rate. What scores in bfloat16 and stays exact can pass 1.
        """
        if not bytes_ and not flops:
            return float("nan")
        return max(bytes_ / bandwidth, flops / self.flops) / seconds

    def or_more(self, other: Roof) -> Roof:
        """The higher of each limit: what another process takes away is no limit."""
        return Roof(
            max(self.bandwidth, other.bandwidth),
            max(self.flops, other.flops),
            max(self.bf16_flops, other.bf16_flops),
            max(self.tf32_flops, other.tf32_flops),
        )

    def __str__(self) -> str:
        bf16 = f", bfloat16 dot {self.bf16_flops / 1e9:.0f} GFLOP/s" if self.bf16_flops else ""
        tf32 = f", TF32 {self.tf32_flops / 1e9:.0f} GFLOP/s" if self.tf32_flops else ""
        copy, fma = self.bandwidth / 1e9, self.flops / 1e9
        return f"copy {copy:.1f} GB/s, float32 multiply-add {fma:.0f} GFLOP/s{bf16}{tf32}"


def _best_rate(probe: Callable[[int], float], device: torch.device, seconds: float = 0.02) -> float:
    """Work a second of `probe(repeats) -> work done`: the best of some rounds, as a limit is."""
    repeats, rounds, best, done = 1, 0, 0.0, 0.0

    def run() -> None:
        nonlocal done
        done = probe(repeats)

    while rounds < ROUNDS:
        elapsed = timed(run, device)
        if elapsed < seconds:
            repeats *= 2
            continue
        best = max(best, done / elapsed)
        rounds += 1
    return best


def measure_roof(device: torch.device) -> Roof:
    """Measures the limits for the threads and the instruction set that are set now."""
    count = 32 << 20
    inputs = [torch.ones(count, device=device) for _ in range(sets_of_inputs(4 * count, device))]
    out = torch.empty_like(inputs[0])
    copies = in_turn([lambda x=x: out.copy_(x) for x in inputs])

    def copy(repeats: int) -> float:
        for _ in range(repeats):
            copies()
        return 2.0 * out.nbytes * repeats

    bandwidth = _best_rate(copy, device)
    if device.type == "cuda":
        products = [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
        return Roof(bandwidth, *(_matrix_product_rate(device, *which) for which in products))
    # It brings the probes; on a GPU the roofs are measured without it, whatever it can do there.
    import fastgen.ops  # noqa: F401

    probes, threads = torch.ops.fastgen, torch.get_num_threads()
    has_bf16 = probes.bf16_dot_probe(1, 1) > 0
    return Roof(
        bandwidth,
        _best_rate(lambda n: probes.fma_probe(threads, n), device),
        _best_rate(lambda n: probes.bf16_dot_probe(threads, n), device) if has_bf16 else 0.0,
    )


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _matrix_product_rate(device: torch.device, dtype: torch.dtype, tf32: bool) -> float:
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product(repeats: int) -> float:
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        return 2.0 * a.shape[0] ** 3 * repeats

    with _tf32(tf32):
        return _best_rate(product, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: prints the limits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roof", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = torch.device(parser.parse_args(arguments).device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: {measure_roof(device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
