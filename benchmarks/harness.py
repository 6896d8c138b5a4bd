"""What a benchmark case is, and how one is timed.

Everything of a case is timed in one process, interleaved round by round, so that what disturbs the
machine disturbs all alike; the median is reported with the 20 % and 80 % quantiles. Times are wall
clock; on a GPU the device is synchronised around each call.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: name in `fastgen.ops`.
        size: what the table prints, e.g. "65536x512x64".
        make: makes the positional tensors.
        call: the public op, called as `call(*tensors, backend=...)`; a `functools.partial` where it
            takes keywords.
        grad: positions of the inputs that get gradients; empty for forward only.
        bytes: fewest bytes the forward must move, inputs once and outputs once.
        flops: fewest floating point operations of the forward, 0 where memory is all that counts.
        peers: other libraries doing the same on the same tensors, by name. A peer that raises
            ImportError is reported as not installed.
        compiled: whether to time torch.compile of the reference; False where the reference is
            written out over a dimension that makes compiling it take minutes.
    """

    op: str
    size: str
    make: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Any]
    grad: tuple[int, ...] = ()
    bytes: int = 0
    flops: int = 0
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    compiled: bool = True


@dataclass(frozen=True)
class Timing:
    """Seconds of one provider in one mode, with 20 % and 80 % quantiles; or why there are none."""

    provider: str
    mode: str
    seconds: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    note: str = ""


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Wall seconds of one call."""
    _synchronise(device)
    start = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - start


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    budget: float = 4.0,
    least: int = 3,
    most: int = 200,
) -> dict[str, list[float]]:
    """Times each function once a round, `least` to `most` rounds, for about `budget` seconds."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc_was_on = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        for done in range(most):
            for name, function in functions.items():
                times[name].append(timed(function, device))
            if done + 1 >= least and time.perf_counter() - start > budget:
                break
    finally:
        if gc_was_on:
            gc.enable()
    return times


def providers(case: Case) -> dict[str, Callable[..., Any]]:
    """Name -> callable on the case's tensors: ours, reference, compiled reference, peers."""

    def ours(*tensors: Tensor) -> Any:
        return case.call(*tensors)

    def reference(*tensors: Tensor) -> Any:
        return case.call(*tensors, backend="reference")

    # A fresh compilation a case: recompiling for a new size would count against torch.compile.
    torch._dynamo.reset()
    compiled = {"torch.compile": torch.compile(reference)} if case.compiled else {}
    return {"fastgen": ours, "reference": reference, **compiled, **case.peers}


def _forward_backward(
    function: Callable[..., Any], tensors: tuple[Tensor, ...], grad: tuple[int, ...]
) -> Callable[[], Any]:
    inputs = [t.detach().requires_grad_() if i in grad else t for i, t in enumerate(tensors)]
    cotangents: list[Tensor] = []

    def step() -> Any:
        result = function(*inputs)
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        flowing = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
        if not cotangents:
            cotangents.extend(torch.ones_like(r) for r in flowing)
        return torch.autograd.grad(flowing, [inputs[i] for i in grad], cotangents)

    return step


def _forward(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Callable[[], Any]:
    def step() -> Any:
        with torch.no_grad():
            return function(*tensors)

    return step


def run_case(case: Case, budget: float = 4.0) -> Iterator[Timing]:
    """Times a case: forward, then forward and backward where it has gradients."""
    tensors = case.make()
    device = tensors[0].device
    for mode in ("forward", "forward+backward") if case.grad else ("forward",):
        steps: dict[str, Callable[[], Any]] = {}
        for name, function in providers(case).items():
            step = (
                _forward(function, tensors)
                if mode == "forward"
                else _forward_backward(function, tensors, case.grad)
            )
            try:
                step()
            except ImportError as error:
                yield Timing(name, mode, note=f"not installed: {error.name or error}")
                continue
            steps[name] = step
        if mode == "forward":
            # The floor of any op that reads and writes: one copy of the first tensor.
            steps["x.clone()"] = lambda: tensors[0].clone()
        for name, times in interleaved(steps, device, budget=budget).items():
            low, *_, high = quantiles(times, n=5)
            yield Timing(name, mode, median(times), low, high)


@dataclass(frozen=True)
class Roof:
    """What the machine can do, measured in the same process.

    Attributes:
        bandwidth: bytes/s, read plus write, of `x.clone()` for a tensor larger than the caches.
        flops: float32 operations/s of a large matrix product.
    """

    bandwidth: float
    flops: float


def measure_roof(device: torch.device) -> Roof:
    """Measures the machine's copy bandwidth and matrix-product rate."""
    x = torch.randn(64 << 20, device=device)
    out = torch.empty_like(x)
    a = torch.randn(2048, 2048, device=device)
    times = interleaved(
        {"copy": lambda: out.copy_(x), "product": lambda: a @ a}, device, budget=3.0
    )
    return Roof(2 * x.nbytes / median(times["copy"]), 2 * 2048**3 / median(times["product"]))


def share_of_roof(case: Case, seconds: float, roof: Roof) -> float:
    """Fraction of the limit reached: the larger of memory and arithmetic time over `seconds`."""
    return max(case.bytes / roof.bandwidth, case.flops / roof.flops) / seconds
