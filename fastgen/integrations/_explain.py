"""explain() for ops and for modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastgen import backends
from fastgen.backends import Explanation
from fastgen.integrations import _library, _patch
from fastgen.integrations._report import Report

__all__ = ["explain"]


def explain(subject: str | nn.Module, *args: Any, **kwargs: Any) -> Explanation | Report:
    """Says what runs, and why not something faster.

    Args:
        subject: the name of an op, or a module.
        *args, **kwargs: for an op, exactly what the public function takes. For a module, what a
            call of it takes; without any, the whole of it is looked through.

    Returns:
        For an op, the backend that runs and why not an earlier one. For a module with arguments,
        whether this call of it runs on "fastgen" or on the library's own code, and why. For a
        module alone, which of its submodules run on fused ops (`replaced`), which keep their
        library's code and why (`left`).

    Raises:
        TypeError: `subject` is neither.
        ValueError: unknown op or backend; or whatever the public function raises for these inputs.
    """
    if isinstance(subject, str):
        return backends.explain(subject, *args, **kwargs)
    if not isinstance(subject, nn.Module):
        raise TypeError(
            f"subject: expected an op's name or a torch.nn.Module, got {type(subject).__name__}"
        )
    if args or kwargs:
        return _explain_call(subject, args, kwargs)
    return _patch.state(subject)


def _explain_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Explanation:
    found = _library.by_fused().get(_library.kind_of(module))
    if found is not None:
        swap, library = found
        own_code = getattr(module, "own_code", None)
        reason = own_code(*args, **kwargs) if own_code is not None else None
        name = swap.original.__name__
        if reason is None:
            return Explanation(name, "fastgen")
        return Explanation(name, library.name, {"fastgen": reason})
    report = _patch.state(module)
    if any(piece.path == "" for piece in report.left):
        reason = report.left[0].reason
    elif report.replaced:
        parts = ", ".join(piece.path for piece in report.replaced)
        reason = f"fastgen does not cover this class; of its parts, {parts} run on fastgen"
    else:
        reason = "fastgen does not cover this class"
    return Explanation(type(module).__name__, "its own code", {"fastgen": reason})
