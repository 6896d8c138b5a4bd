"""How a benchmark case is timed.

Everything of a case is timed in one process, interleaved round by round, so that what disturbs the
machine disturbs all alike; the median is reported with the 20 % and 80 % quantiles. On a CPU a
round is one call by the wall clock. On a GPU it is as many calls as keep the device busy for some
milliseconds, between two events of the device, and inputs take turns so that none is found in the
cache; of small cases that is what launching them costs. The memory of a call is measured
afterwards, in a call of its own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import BACKWARD, COPY, FORWARD, SECOND, Case, Provider, Timing
from benchmarks.clock import calls_of_batch, in_turn, sets_of_inputs, time_limit, timed
from benchmarks.memory import peak_bytes
from benchmarks.roof import Roof

CPU = torch.device("cpu")


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
    calls = {name: calls_of_batch(function, device) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc_was_on = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        for done in range(most):
            for name, function in functions.items():
                times[name].append(timed(function, device, calls[name]))
            if done + 1 >= least and time.perf_counter() - start > budget:
                break
    finally:
        if gc_was_on:
            gc.enable()
    return times


def providers(
    case: Case, wanted: Collection[str] | None = None, device: torch.device = CPU
) -> dict[str, Provider]:
    """Ours, the reference, the compiled reference and the peers that run on the device, by name;
    `wanted` of them."""

    def reference(*arguments: Any) -> Any:
        return case.call(*arguments, backend="reference")

    # A fresh compilation a case: recompiling for a new size would count against torch.compile.
    torch._dynamo.reset()
    # Compiled gradients would else refuse to run twice over one graph, as BACKWARD does.
    torch._functorch.config.donated_buffer = False
    found = {"fastgen": Provider(case.call), "reference": Provider(reference)}
    if case.compiled:
        found["torch.compile"] = Provider(torch.compile(reference))
    for name, peer in case.peers.items():
        found[name] = peer if isinstance(peer, Provider) else Provider(peer)
    return {
        name: p
        for name, p in found.items()
        if (wanted is None or name in wanted) and p.device in ("", device.type)
    }


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
    wanted = [inputs[i] for i in grad]
    cotangents: list[Tensor] = []

    def flow() -> tuple[Tensor, ...]:
        return tuple(r for r in tensors_of(function(*inputs)) if r.requires_grad)

    def forward_backward() -> Any:
        flowing = flow()
        if not cotangents:
            cotangents.extend(torch.ones_like(r) for r in flowing)
        return torch.autograd.grad(flowing, wanted, cotangents)

    # The graphs of the two others are made in the first call, which is not timed.
    graph: list[tuple[Tensor, ...]] = []

    def backward() -> Any:
        if not graph:
            graph.append(flow())
            cotangents.extend(torch.ones_like(r) for r in graph[0])
        return torch.autograd.grad(graph[0], wanted, cotangents, retain_graph=True)

    def second_order() -> Any:
        if not graph:
            flowing = flow()
            cotangents.extend(torch.ones_like(r, requires_grad=True) for r in flowing)
            graph.append(torch.autograd.grad(flowing, wanted[:1], cotangents, create_graph=True))
        penalised = (graph[0][0], (wanted[0], cotangents[0]), torch.ones_like(graph[0][0]))
        return torch.autograd.grad(*penalised, retain_graph=True, allow_unused=True)

    return {BACKWARD: backward, SECOND: second_order}.get(mode, forward_backward)


def run_case(
    case: Case,
    roof: Roof,
    *,
    budget: float = 4.0,
    wanted: Collection[str] | None = None,
    device: torch.device = CPU,
    limit: float | None = None,
) -> Iterator[Timing]:
    """Times a case in each of its modes.

    Args:
        case: what to time.
        roof: the machine's limits; the copy of the case's own first argument is another one.
        budget: seconds of each mode.
        wanted: names of providers, all by default; fastgen is always among them.
        device: where.
        limit: seconds that the first call of anything but fastgen may take in a mode, which may
            compile.

    Raises:
        ValueError: a peer computes something else than fastgen.
    """
    torch.manual_seed(0)
    with device:
        sets = [case.make()]
        sets += [case.make() for _ in range(1, sets_of_inputs(_bytes_of(sets[0]), device))]
    x = sets[0][0]
    names = None if wanted is None else {"fastgen", *wanted}
    available, missing = _compared(case, names, device)
    bandwidth = roof.bandwidth
    for mode in case.modes:
        for name, note in missing.items():
            yield Timing(name, mode, note=note)
        steps: dict[str, Callable[[], Any]] = {}
        for name, provider in available.items():
            try:
                steps[name] = _started(case, provider, sets, mode, device, limit)
            except Exception as error:
                if name == "fastgen":
                    raise
                yield Timing(name, mode, note=_failure(error))
        # The floor of any op that reads and writes: one copy of the first tensor.
        steps[COPY] = in_turn([partial(torch.clone, arguments[0]) for arguments in sets])
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


def _bytes_of(arguments: tuple[Any, ...]) -> int:
    return sum(a.nbytes for a in arguments if isinstance(a, Tensor))


def _failure(error: Exception) -> str:
    """Why there are no figures, in a line."""
    if isinstance(error, ImportError):
        return f"not installed: {error.name or error}"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _started(
    case: Case,
    provider: Provider,
    sets: list[tuple[Any, ...]],
    mode: str,
    device: torch.device,
    limit: float | None,
) -> Callable[[], Any]:
    """What does a call of the provider, over the sets of arguments in turn, each called once."""
    grad = case.grad if provider.grad is None else provider.grad
    with device:
        inputs = [provider.inputs(arguments) for arguments in sets]
    steps = [make_step(provider.function, given, grad, mode) for given in inputs]
    with time_limit(limit):
        for step in steps:
            step()
    return in_turn(steps)


def _compared(
    case: Case, wanted: Collection[str] | None, device: torch.device
) -> tuple[dict[str, Provider], dict[str, str]]:
    """The providers of a case, compared with fastgen; and why some cannot be."""
    available, missing = {}, {}
    for name, provider in providers(case, wanted, device).items():
        try:
            with device:
                check_same(case, name, provider)
        except ImportError as error:
            missing[name] = _failure(error)
        else:
            available[name] = provider
    return available, missing
