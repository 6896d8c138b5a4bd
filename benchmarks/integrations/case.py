"""A model of another library as a benchmark case: patched, and as the library has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import fastgen
from benchmarks.models.case import ModelCase, Peer, Training

__all__ = ["patched_case"]


def patched_case(
    library: str,
    package: str,
    size: str,
    make: Callable[[], Training],
    others: Mapping[str, Peer] | None = None,
    tolerance: float | None = 1e-4,
) -> ModelCase:
    """The case of a model made by `make` with the library's own classes.

    Args:
        library: name of the file and of the CSV.
        package: whose version is recorded for the unpatched model.
        size: what the table prints.
        make: called under a fixed seed; the model of what it returns gets patched.
        others: further models to compare with, made from the patched one.
        tolerance: largest relative difference of the first losses.
    """

    def patched() -> Training:
        training = make()
        report = fastgen.patch(training.model)
        assert not report.left, str(report)
        return training

    def unpatched(training: Training) -> Training:
        fastgen.unpatch(training.model)
        return training

    peers = {"unpatched": Peer(unpatched, package, tolerance), **(others or {})}
    return ModelCase(library, size, patched, peers, compiled=False, ours=("fastgen",))
