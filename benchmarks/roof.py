"""What the machine can do at most, measured in the process that is timed.

Two limits: memory, as the bandwidth of a copy, and arithmetic, as the rate of multiply-adds that
wait for nothing, with the threads and the instruction set in use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

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
    """

    bandwidth: float
    flops: float
    bf16_flops: float = 0.0

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
        )

    def __str__(self) -> str:
        bf16 = f", bfloat16 dot {self.bf16_flops / 1e9:.0f} GFLOP/s" if self.bf16_flops else ""
        copy, fma = self.bandwidth / 1e9, self.flops / 1e9
        return f"copy {copy:.1f} GB/s, float32 multiply-add {fma:.0f} GFLOP/s{bf16}"


def _best_rate(probe: Callable[[int], float], seconds: float = 0.02) -> float:
    """Work a second of `probe(repeats) -> work done`: the best of some rounds, as a limit is."""
    repeats, rounds, best = 1, 0, 0.0
    while rounds < ROUNDS:
        start = time.perf_counter()
        done = probe(repeats)
        elapsed = time.perf_counter() - start
        if elapsed < seconds:
            repeats *= 2
            continue
        best = max(best, done / elapsed)
        rounds += 1
    return best


def measure_roof(device: torch.device) -> Roof:
    """Measures the limits for the threads and the instruction set that are set now."""
    x = torch.ones(32 << 20, device=device)
    out = torch.empty_like(x)
    cuda = device.type == "cuda"

    def copy(repeats: int) -> float:
        for _ in range(repeats):
            out.copy_(x)
        if cuda:
            torch.cuda.synchronize(device)
        return 2.0 * x.nbytes * repeats

    bandwidth = _best_rate(copy)
    if cuda:
        return Roof(bandwidth, _matrix_product_rate(device))
    probes, threads = torch.ops.fastgen, torch.get_num_threads()
    has_bf16 = probes.bf16_dot_probe(1, 1) > 0
    return Roof(
        bandwidth,
        _best_rate(lambda repeats: probes.fma_probe(threads, repeats)),
        _best_rate(lambda repeats: probes.bf16_dot_probe(threads, repeats)) if has_bf16 else 0.0,
    )


def _matrix_product_rate(device: torch.device) -> float:
    a = torch.randn(4096, 4096, device=device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False

    def product(repeats: int) -> float:
        for _ in range(repeats):
            a @ a
        torch.cuda.synchronize(device)
        return 2.0 * a.shape[0] ** 3 * repeats

    try:
        return _best_rate(product)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
