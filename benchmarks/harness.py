"""How a benchmark case is timed.

Everything of a case is timed in one process, interleaved round by round, so that what disturbs the
machine disturbs all alike; the median is reported with the 20 % and 80 % quantiles. Times are wall
clock; on a GPU the device is synchronised around each call. The memory of a call is measured
afterwards, in a call of its own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import COPY, FORWARD, Case, Provider, Timing
from benchmarks.memory import peak_bytes
from benchmarks.roof import Roof


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
    most: int = 1000,
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


def providers(case: Case, wanted: Collection[str] | None = None) -> dict[str, Provider]:
    """Ours, the reference, the compiled reference and the peers, by name; `wanted` of them."""

    def reference(*arguments: Any) -> Any:
        return case.call(*arguments, backend="reference")

    # A fresh compilation a case: recompiling for a new size would count against torch.compile.
    torch._dynamo.reset()
    found = {"fastgen": Provider(case.call), "reference": Provider(reference)}
    if case.compiled:
        found["torch.compile"] = Provider(torch.compile(reference))
    for name, peer in case.peers.items():
        found[name] = peer if isinstance(peer, Provider) else Provider(peer)
    return {name: p for name, p in found.items() if wanted is None or name in wanted}


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """The tensors that a function returned."""
    results = (result,) if isinstance(result, Tensor) else tuple(result)
    return tuple(r for r in results if isinstance(r, Tensor))


def check_same(case: Case, name: str, provider: Provider) -> None:
    """Raises ValueError where a peer does not compute what fastgen computes.

    Both start from the same arguments, made anew because a layer changes its state.
    """
    if provider.tolerance is None:
        return
    if case.small is None:
        raise ValueError(f"{case.op} {case.size}: {name} has a tolerance, the case no small inputs")
    torch.manual_seed(0)
    ours = tensors_of(case.call(*case.small()))
    torch.manual_seed(0)
    theirs = tensors_of(provider.function(*provider.inputs(case.small())))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        try:
            torch.testing.assert_close(b, a, rtol=provider.tolerance, atol=provider.tolerance)
        except AssertionError as error:
            message = f"{case.op} {case.size}: {name} computes something else (result {i}): {error}"
            raise ValueError(message) from None


def make_step(
    function: Callable[..., Any], arguments: tuple[Any, ...], grad: tuple[int, ...], mode: str
) -> Callable[[], Any]:
    """A call without arguments that does what `mode` says."""

    def forward() -> Any:
        with torch.no_grad():
            return function(*arguments)

    if mode == FORWARD:
        return forward
    inputs = [t.detach().requires_grad_() if i in grad else t for i, t in enumerate(arguments)]
    cotangents: list[Tensor] = []

    def forward_backward() -> Any:
        flowing = [r for r in tensors_of(function(*inputs)) if r.requires_grad]
        if not cotangents:
            cotangents.extend(torch.ones_like(r) for r in flowing)
        return torch.autograd.grad(flowing, [inputs[i] for i in grad], cotangents)

    return forward_backward


def run_case(
    case: Case, roof: Roof, *, budget: float = 4.0, wanted: Collection[str] | None = None
) -> Iterator[Timing]:
    """Times a case: forward, then forward and backward where it has gradients.

    Args:
        case: what to time.
        roof: the machine's limits; the copy of the case's own first argument is another one.
        budget: seconds of each mode.
        wanted: names of providers, all by default; fastgen is always among them.

    Raises:
        ValueError: a peer computes something else than fastgen.
    """
    torch.manual_seed(0)
    arguments = case.make()
    x, device = arguments[0], arguments[0].device
    available, missing = _installed(case, None if wanted is None else {"fastgen", *wanted})
    bandwidth = roof.bandwidth
    for mode in case.modes:
        for name, note in missing.items():
            yield Timing(name, mode, note=note)
        steps = {
            name: make_step(
                p.function, p.inputs(arguments), case.grad if p.grad is None else p.grad, mode
            )
            for name, p in available.items()
        }
        # The floor of any op that reads and writes: one copy of the first tensor.
        steps[COPY] = lambda: x.clone()
        times = interleaved(steps, device, budget=budget)
        bandwidth = max(bandwidth, 2 * x.nbytes / median(times[COPY]))
        for name, seconds in times.items():
            low, *_, high = quantiles(seconds, n=5, method="inclusive")
            middle = median(seconds)
            share = (
                roof.share(*case.work(mode), middle, bandwidth) if name != COPY else float("nan")
            )
            package = available[name].version if name != COPY else ""
            peak = peak_bytes(steps[name], device)
            yield Timing(name, mode, middle, low, high, peak, share, package)


def _installed(
    case: Case, wanted: Collection[str] | None
) -> tuple[dict[str, Provider], dict[str, str]]:
    """The providers that can run, compared with fastgen; and why the others cannot."""
    available, missing = {}, {}
    for name, provider in providers(case, wanted).items():
        try:
            check_same(case, name, provider)
            with torch.no_grad():
                provider.function(*provider.inputs(case.make()))
        except ImportError as error:
            missing[name] = f"not installed: {error.name or error}"
        else:
            available[name] = provider
    return available, missing
