"""What a model benchmark is, and how its training step is timed.

A step is zero_grad, loss, backward and a fused AdamW, on one batch that stays the same. Ours with
the fused ops, ours with the references, both compiled, and the peers run in one process,
interleaved, each with weights of its own. The peak of memory is that of one more step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

import fastgen
from benchmarks.case import Timing
from benchmarks.harness import interleaved
from benchmarks.memory import peak_bytes

STEP = "training step"
#: Our own providers: the backend of every op, and whether the loss goes through torch.compile.
OURS: Mapping[str, tuple[str | None, bool]] = {
    "fastgen": (None, False),
    "fastgen compiled": (None, True),
    "reference": ("reference", False),
    "torch.compile": ("reference", True),
}


@dataclass(frozen=True)
class Training:
    """A model, and its loss on the batch that is timed.

    Attributes:
        model: its parameters are trained.
        batch: what `objective` is called on.
        objective: the scalar to minimise.
    """

    model: nn.Module
    batch: tuple[Tensor, ...]
    objective: Callable[..., Tensor]

    def loss(self) -> Tensor:
        return self.objective(*self.batch)


@dataclass(frozen=True)
class Peer:
    """Another library's model for the same job. One whose library is missing raises ImportError.

    Attributes:
        make: from our training, to take over its weights and batch.
        package: name of the library for pip, whose version is recorded.
        tolerance: largest relative difference of its first loss from ours; more is an error. None
            for what computes something else on purpose.
    """

    make: Callable[[Training], Training]
    package: str
    tolerance: float | None = None

    @property
    def version(self) -> str:
        """ "name version" of the package."""
        return f"{self.package} {metadata.version(self.package)}"


@dataclass(frozen=True)
class ModelCase:
    """One model at one size.

    Attributes:
        op: the model's name, that of its CSV.
        size: what the table prints.
        make: builds our training; called under a fixed seed.
        peers: by name.
        compiled: whether to time torch.compile too; False where compiling takes minutes.
        ours: which of `OURS` make sense.
    """

    op: str
    size: str
    make: Callable[[], Training]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    compiled: bool = True
    ours: Collection[str] = tuple(OURS)

    def work(self, mode: str) -> tuple[int, int]:
        """Nobody counts the bytes and operations of whole models."""
        return 0, 0


def make_step(
    training: Training, backend: str | None = None, compiled: bool = False
) -> Callable[[], Any]:
    """A call that trains one step."""
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-4, fused=True)
    objective = torch.compile(training.objective) if compiled else training.objective

    def step() -> None:
        with nullcontext() if backend is None else fastgen.use_backend(backend):
            optimizer.zero_grad()
            objective(*training.batch).backward()
            optimizer.step()

    return step


def seeded(case: ModelCase) -> Training:
    torch.manual_seed(0)
    return case.make()


def steps_of(
    case: ModelCase, wanted: Collection[str] | None
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Provider -> its step, and why others have none; `wanted` providers beside fastgen, or all.

    Raises:
        ValueError: a peer's first loss is not ours.
    """

    def asked(name: str) -> bool:
        return name == "fastgen" or wanted is None or name in wanted

    torch._dynamo.reset()
    steps, missing = {}, {}
    for name, (backend, compiled) in OURS.items():
        if name in case.ours and asked(name) and (case.compiled or not compiled):
            steps[name] = make_step(seeded(case), backend, compiled)
    for name, peer in case.peers.items():
        if not asked(name):
            continue
        try:
            theirs = peer.make(seeded(case))
        except ImportError as error:
            missing[name] = f"not installed: {error.name or error}"
            continue
        check_same(case, name, peer, theirs)
        steps[name] = make_step(theirs)
    return steps, missing


def check_same(case: ModelCase, name: str, peer: Peer, theirs: Training) -> None:
    """Raises ValueError where a peer that claims to compute the same has another first loss."""
    if peer.tolerance is None:
        return
    with torch.no_grad():
        # a loss may change state (averages of codes), so that ours is of a new model
        ours, other = seeded(case).loss().item(), theirs.loss().item()
    if abs(other - ours) > peer.tolerance * abs(ours):
        raise ValueError(f"{case.op} {case.size}: {name} has a loss of {other:.6g}, not {ours:.6g}")


def run_model(
    case: ModelCase, *, budget: float = 10.0, wanted: Collection[str] | None = None
) -> Iterator[Timing]:
    """Times a case for about `budget` seconds; providers that are missing come first."""
    steps, missing = steps_of(case, wanted)
    for name, note in missing.items():
        yield Timing(name, STEP, note=note)
    device = torch.device("cpu")
    for name, seconds in interleaved(steps, device, budget=budget).items():
        low, *_, high = quantiles(seconds, n=5, method="inclusive")
        peer = case.peers.get(name)
        timing = Timing(name, STEP, median(seconds), low, high, peak_bytes(steps[name], device))
        yield timing if peer is None else replace(timing, package=peer.version)
