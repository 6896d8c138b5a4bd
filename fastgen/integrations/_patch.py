"""patch() and unpatch(): to fused ops and exactly back, for a live model or a whole library."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from fastgen.integrations import _library
from fastgen.integrations._library import Function, Library, Swap
from fastgen.integrations._report import Left, Replaced, Report

__all__ = ["patch", "state", "unpatch"]

#: The libraries patched as a whole, and what puts each back.
_patched: dict[str, Callable[[], None]] = {}


def patch(target: nn.Module | str) -> Report:
    """Puts fused ops under a live model's submodules, or under what a library makes from now on.

    A model's supported submodules take a subclass of their class, in place: parameters, buffers,
    hooks, names in the state_dict and references to the modules stay as they are. For a library,
    its supported functions are replaced in all its modules, and objects of its supported classes
    made from now on are of the faster kind; names that other code imported from it before keep the
    functions of then.

    Args:
        target: a model, or a library: "torch.nn" or the import name of one in the table of
            docs/integrations.md.

    Returns:
        What was replaced, what was left and why. Used in a ``with`` statement it undoes the patch
        on exit.

    Raises:
        TypeError: `target` is neither.
        ValueError: the library is not one that fastgen covers.
        ModuleNotFoundError: the library is not installed.
        ImportError: it is of a release that lacks what fastgen replaces.
        RuntimeError: the library is patched already.

    Warns:
        UserWarning: nothing in the model could be replaced, or the library's version is not one
            that fastgen is tested with; pieces that changed are left alone then.

    Example:
        >>> report = fastgen.patch(model)
        >>> print(report)
        >>> with fastgen.patch("vector_quantize_pytorch"):
        ...     model = build()
    """
    if isinstance(target, nn.Module):
        return _patch_model(target)
    if isinstance(target, str):
        return _patch_library(_library.find(target))
    raise TypeError(
        f"target: expected a torch.nn.Module or a library's name, got {type(target).__name__}"
    )


def unpatch(target: nn.Module | str) -> None:
    """Undoes :func:`patch`: submodules take their own class again, or the library its functions.

    Unpatching a library leaves the objects made meanwhile as they are; unpatch the models, too,
    where that is wanted.

    Raises:
        TypeError: `target` is neither a model nor a library's name.
        ValueError: the library is not one that fastgen covers, or it is not patched.
    """
    if isinstance(target, nn.Module):
        _restore(target.modules())
    elif isinstance(target, str):
        if target not in _patched:
            if target not in _library.names():
                _library.find(target)
            raise ValueError(f"target: {target!r} is not patched")
        _patched.pop(target)()
    else:
        raise TypeError(
            f"target: expected a torch.nn.Module or a library's name, got {type(target).__name__}"
        )


def survey(model: nn.Module) -> Iterator[tuple[str, nn.Module, Swap | None, str | None]]:
    """For each submodule: its path, itself, the swap of its class and why it cannot change over.

    The swap is None for a module of a class that is not covered; the reason is None where nothing
    is in the way, and for what is patched already.
    """
    fused = _library.by_fused()
    swaps = {swap.original: (swap, library) for swap, library in fused.values()}
    for path, module in model.named_modules():
        kind = _library.kind_of(module)
        if kind in fused:
            yield path, module, fused[kind][0], None
        elif kind in swaps:
            swap, library = swaps[kind]
            yield path, module, swap, _reason_against(module, swap, library)
        elif (base := _covered_base(kind, swaps)) is not None:
            reason = f"a subclass of {_name(base)}, which may differ from it"
            yield path, module, swaps[base][0], reason
        else:
            yield path, module, None, None


def state(model: nn.Module) -> Report:
    """What of `model` runs on fused ops, what could, and what cannot and why."""
    report = Report(type(model).__name__)
    for path, module, swap, reason in survey(model):
        if swap is None:
            report.others += 1
        elif _library.kind_of(module) is swap.fused:
            report.replaced.append(Replaced(path, _name(swap.original), swap.own_calls()))
        else:
            reason = reason or "not patched: fastgen.patch() would replace it"
            report.left.append(Left(path, _name(_library.kind_of(module)), reason))
    return report


def _patch_model(model: nn.Module) -> Report:
    report = Report(type(model).__name__)
    changes: list[tuple[nn.Module, Swap]] = []
    for path, module, swap, reason in survey(model):
        if swap is None:
            report.others += 1
        elif _library.kind_of(module) is swap.fused:
            report.left.append(Left(path, _name(swap.original), "patched already"))
        elif reason is not None:
            report.left.append(Left(path, _name(_library.kind_of(module)), reason))
        else:
            report.replaced.append(Replaced(path, _name(swap.original), swap.own_calls()))
            changes.append((module, swap))
    done: list[nn.Module] = []
    try:
        for module, swap in changes:
            _library.change_kind(module, swap.fused)
            done.append(module)
    except BaseException:
        _restore(done)
        raise
    report._undo = functools.partial(_restore, done)
    if not changes:
        warnings.warn(f"nothing was replaced.\n{report}", stacklevel=3)
    return report


def _reason_against(module: nn.Module, swap: Swap, library: Library) -> str | None:
    if swap.original in library.changed:
        return library.changed[swap.original]
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    return swap.reason_against(module)


def _covered_base(kind: type, swaps: dict[type, Any]) -> type | None:
    # A fastgen layer may be a subclass of what it replaces.
    if kind.__module__.startswith("fastgen."):
        return None
    return next((base for base in kind.__mro__ if base in swaps), None)


def _restore(modules: Iterable[nn.Module]) -> None:
    fused = _library.by_fused()
    for module in modules:
        kind = _library.kind_of(module)
        if kind in fused:
            _library.change_kind(module, fused[kind][0].original)


def _patch_library(library: Library) -> Report:
    if library.name in _patched:
        raise RuntimeError(f"target: {library.name!r} is patched already")
    report = Report(f"{library.name} {library.version}")
    undo: list[Callable[[], None]] = []
    try:
        for piece in library.pieces:
            original = _name(piece.original)
            if piece.original in library.changed:
                report.left.append(Left(original, original, library.changed[piece.original]))
                continue
            if isinstance(piece, Swap):
                undo.append(_wrap_constructor(piece))
                report.replaced.append(Replaced(original, original, piece.own_calls()))
            else:
                undo.append(_replace_function(piece, library))
                report.replaced.append(Replaced(original, original))
    except BaseException:
        _call_all(undo)
        raise
    _patched[library.name] = functools.partial(_call_all, undo)
    report._undo = functools.partial(unpatch, library.name)
    if not report.replaced:
        warnings.warn(f"nothing was replaced.\n{report}", stacklevel=3)
    return report


def _call_all(undo: list[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()


def _wrap_constructor(swap: Swap) -> Callable[[], None]:
    """Makes new objects of exactly this class take the faster one; returns what undoes it."""
    cls = swap.original
    own = vars(cls).get("__init__")
    constructor = cls.__init__

    constructs = "__init__" in vars(swap.fused)

    @functools.wraps(constructor)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if constructs and type(self) is cls:
            self.__class__ = swap.fused
            swap.fused.__init__(self, *args, **kwargs)
            return
        constructor(self, *args, **kwargs)
        if type(self) is cls and swap.reason_against(self) is None:
            self.__class__ = swap.fused

    def undo() -> None:
        if own is None:
            del cls.__init__
        else:
            cls.__init__ = own

    cls.__init__ = __init__
    return undo


def _replace_function(function: Function, library: Library) -> Callable[[], None]:
    """Puts a function into every module of its library; returns what undoes it."""
    _rebind(library, function.original, function.fused)
    return lambda: _rebind(library, function.fused, function.original)


def _rebind(library: Library, old: Any, new: Any) -> None:
    for module in _modules(library):
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def _modules(library: Library) -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        inside = name == library.name or name.startswith(library.name + ".")
        if inside and isinstance(module, ModuleType):
            yield module


def _name(piece: Any) -> str:
    return f"{piece.__module__}.{piece.__qualname__}"
