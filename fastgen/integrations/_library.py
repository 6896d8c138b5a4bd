"""What a file of this package says of the library that it covers, and whether the installed version
still is what it was written against.

A class is covered by a subclass of it, with the same attributes, parameters and buffers, whose
methods call fused ops: an object changes over by taking that subclass as its ``__class__`` and back
by taking its own, so its state, its hooks and every reference to it stay as they are.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

__all__ = [
    "Function",
    "Library",
    "Swap",
    "by_fused",
    "change_kind",
    "find",
    "fingerprint",
    "kind_of",
    "loaded",
    "names",
    "own_method",
    "run_own_code",
]

_log = logging.getLogger("fastgen")


def _always(instance: Any) -> None:
    return None


def _nowhere() -> str:
    return ""


@dataclass(frozen=True)
class Swap:
    """One class of a library and the subclass of it that runs on fused ops.

    Attributes:
        original: the library's class: a module, or something else that is made for every call.
        fused: its subclass. It adds no state and has no constructor of its own, but where half of
            the work is done in that of `original`: then objects made under a patched library run
            it instead. Where a single call needs the library's own code, the method
            ``own_code(*args, **kwargs)`` says why, or returns None.
        fingerprint: of the code that `fused` replaces or relies on; see :func:`fingerprint`.
        relies_on: that code: classes and functions.
        reason_against: why this object has to keep its own class for all calls, or None.
        own_calls: says where calls run the library's own code although fused ops could, and why; ""
            for nowhere.
    """

    original: type[Any]
    fused: type[Any]
    fingerprint: str
    relies_on: tuple[type | Callable, ...]
    reason_against: Callable[[Any], str | None] = _always
    own_calls: Callable[[], str] = _nowhere


@dataclass(frozen=True)
class Function:
    """One function of a library and the one that takes its place in all modules of the library.

    The attributes are those of :class:`Swap`; a call that needs the library's own code makes
    `fused` call `original`.
    """

    original: FunctionType
    fused: Callable
    fingerprint: str
    relies_on: tuple[type | Callable, ...] = ()


@dataclass(frozen=True)
class Library:
    """A library that is covered.

    Attributes:
        name: what :func:`fastgen.patch` calls it; the package to import, or a part of it.
        distribution: its name in the package index.
        tested: the versions that the swaps are tested with.
        swaps: the classes covered.
        functions: the functions covered.
    """

    name: str
    distribution: str
    tested: tuple[str, ...]
    swaps: tuple[Swap, ...] = ()
    functions: tuple[Function, ...] = ()

    @property
    def pieces(self) -> tuple[Swap | Function, ...]:
        """All that is covered."""
        return (*self.swaps, *self.functions)

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.distribution)

    @functools.cached_property
    def changed(self) -> dict[Any, str]:
        """Why a covered class or function of this version is left alone; without those that fit."""
        if self.version.partition("+")[0] in self.tested:
            return {}
        differ = {
            piece.original: f"its code in {self.distribution} {self.version} is not that of "
            f"{self.tested[-1]}, which fastgen knows"
            for piece in self.pieces
            if fingerprint(piece.original, *piece.relies_on) != piece.fingerprint
        }
        left = ", ".join(sorted(original.__qualname__ for original in differ))
        warnings.warn(
            f"fastgen is tested with {self.distribution} {', '.join(self.tested)}; this is "
            f"{self.version}. "
            + (
                f"Left alone, as changed: {left}."
                if left
                else "The pieces it replaces are unchanged."
            ),
            stacklevel=4,
        )
        return differ


def fingerprint(*pieces: type | Callable) -> str:
    """A digest of the source of classes and functions, comments and all."""
    digest = hashlib.sha256()
    with warnings.catch_warnings():
        # inspect parses the file, which may hold escapes that Python warns of
        warnings.simplefilter("ignore")
        for piece in pieces:
            digest.update(textwrap.dedent(inspect.getsource(inspect.unwrap(piece))).encode())
    return digest.hexdigest()[:16]


#: The files of PyTorch that derive a class from that of a module for this module alone.
_DERIVE_CLASSES = ("torch.nn.utils.parametrize", "torch.distributed.")

#: The libraries covered, and the file of this package that covers each.
_FILES = {
    "FrEIA": "freia",
    "diffusers": "diffusers",
    "nflows": "nflows",
    "normflows": "normflows",
    "torch.nn": "torch_nn",
    "vector_quantize_pytorch": "vector_quantize_pytorch",
    "zuko": "zuko",
}


def names() -> list[str]:
    """What :func:`fastgen.patch` takes as a name."""
    return sorted(_FILES)


def find(name: str) -> Library:
    """The library of that name.

    Raises:
        ValueError: none of that name is covered.
        ModuleNotFoundError: it is, but it is not installed.
        ImportError: it is, in a release that lacks what fastgen replaces.
    """
    if name not in _FILES:
        raise ValueError(f"target: expected a module or one of {', '.join(names())}; got {name!r}")
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise ModuleNotFoundError(f"target: {name!r} is not installed in this environment")
    try:
        return importlib.import_module(f"fastgen.integrations.{_FILES[name]}").LIBRARY
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"target: fastgen does not know this release of {name!r}, which is left alone: {error}"
        ) from error


def loaded() -> Iterator[Library]:
    """The libraries covered that are imported already: no object can be of another.

    Warns:
        UserWarning: once for each of a release that fastgen does not know.
    """
    for name in _FILES:
        if name in sys.modules:
            try:
                yield find(name)
            except ImportError as error:
                _warn_once(str(error))


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def kind_of(module: nn.Module) -> type:
    """The class of a module, or that which it had before PyTorch put another over it.

    torch.nn.utils.parametrize and the sharding of torch.distributed derive a class from a module's
    own and make it that module's.
    """
    return _beneath(type(module))


def _beneath(kind: type) -> type:
    while kind.__module__.startswith(_DERIVE_CLASSES):
        kind = kind.__bases__[-1]
    return kind


def change_kind(module: nn.Module, kind: type) -> None:
    """Makes `kind` the class that :func:`kind_of` has for this module."""
    module.__class__ = _derived_as(type(module), kind)


def _derived_as(derived: type, kind: type) -> type:
    """`kind`, with the classes over it that are over the one beneath `derived`.

    Made anew, as copies of the module have those.
    """
    if _beneath(derived) is derived:
        return kind
    *mixins, base = derived.__bases__
    name = derived.__name__.removesuffix(base.__name__)
    base = _derived_as(base, kind)
    members = {k: v for k, v in vars(derived).items() if k not in ("__dict__", "__weakref__")}
    return type(name + base.__name__, (*mixins, base), members)


def by_fused() -> dict[type, tuple[Swap, Library]]:
    """The swaps of the libraries that are imported, by the class that replaces."""
    return {swap.fused: (swap, library) for library in loaded() for swap in library.swaps}


def own_method(method: Any, name: str) -> Any:
    """The library's method, as one of that name beside the one that takes its place.

    For torch.jit.script: it compiles both, each by the name that the function has.
    """
    copy = FunctionType(
        method.__code__, method.__globals__, name, method.__defaults__, method.__closure__
    )
    copy.__annotations__ = method.__annotations__
    return copy


def run_own_code(name: str, reason: str) -> None:
    """Says once in the log that calls of `name` run the library's own code, and why."""
    # torch.compile follows neither a cache nor a log
    if not torch.compiler.is_compiling():
        _say(name, reason)


@functools.cache
def _say(name: str, reason: str) -> None:
    _log.debug("%s: the library's own code: %s", name, reason)


run_own_code.cache_clear = _say.cache_clear  # type: ignore[attr-defined]
