"""The table op -> backends: which implementation runs, why the others do not, and how to choose.

Each op lists its backends in one literal order, best first. The first one that fits the inputs
runs; what was passed over, and why, is visible through :func:`explain`, :func:`calls` and one DEBUG
log line a reason. Precedence of choices: ``backend=`` of the call, then :func:`use_backend`, then
the environment variable ``FASTGEN_BACKEND``. A backend that was chosen and cannot run raises;
nothing falls back silently.

The choice is held in a plain module global, process-wide: torch.compile guards on it and recompiles
on change, which it cannot do for a ContextVar.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch.compiler import is_compiling

__all__ = ["Explanation", "Op", "calls", "explain", "ops", "reset_calls", "use_backend"]

BACKENDS = ("cuda", "triton", "cpu", "reference")

_log = logging.getLogger("fastgen")
_logged: set[tuple[str, str, str]] = set()
_calls: Counter[tuple[str, str]] = Counter()
_ops: dict[str, Op] = {}
_override: dict[str, str] = {}

#: Key of `_override` for "every op".
_ALL = "*"


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns.

    Attributes:
        op: name of the op.
        chosen: name of the backend that runs for these inputs.
        rejected: for each backend ahead of it in the op's order, why it does not run.
    """

    op: str
    chosen: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Implementation:
    """One backend of one op: a whole differentiable function of the op's prepared arguments."""

    function: Callable[..., Any]
    device: str | None
    unavailable: str | None
    unsupported: Callable[..., str | None] | None

    def reason_against_device(self, device: str) -> str | None:
        """Why it cannot take any argument on this type of device, or None."""
        if self.unavailable is not None:
            return self.unavailable
        if self.device is not None and device != self.device:
            return f"runs on {self.device}, the input is on {device}"
        return None

    def reason_against(self, args: tuple) -> str | None:
        """Why it cannot take these prepared arguments, or None; args[0] is a tensor."""
        reason = self.reason_against_device(args[0].device.type)
        if reason is None and self.unsupported is not None:
            reason = self.unsupported(*args)
        return reason


class Op:
    """One op: how its arguments are checked (`prepare`) and which backends it has, best first.

    `prepare(*args, **kwargs)` takes what the public function takes (without ``backend``), validates
    it, applies the autocast policy and returns the tuple that every backend takes, its first tensor
    first.
    """

    def __init__(self, name: str, prepare: Callable[..., tuple]) -> None:
        self.name = name
        self.prepare = prepare
        self.implementations: dict[str, Implementation] = {}
        # Worked out once for the usual devices, not in each call.
        self._on_device: dict[str, dict[str, str | None]] = {"cpu": {}, "cuda": {}}
        _ops[name] = self

    def implement(
        self,
        backend: str,
        function: Callable[..., Any],
        *,
        device: str | None = None,
        unavailable: str | None = None,
        unsupported: Callable[..., str | None] | None = None,
    ) -> None:
        """Adds a backend; call in the op's order of preference.

        Args:
            backend: one of `BACKENDS`.
            function: the differentiable implementation over prepared arguments.
            device: device type it runs on, None for any.
            unavailable: why it cannot run in this installation, None if it can.
            unsupported: cheap check of prepared arguments, without synchronising: the reason it
                cannot take them, or None.
        """
        added = Implementation(function, device, unavailable, unsupported)
        self.implementations[backend] = added
        for type_, reasons in self._on_device.items():
            reasons[backend] = added.reason_against_device(type_)

    def select(self, args: tuple, backend: str | None = None) -> str:
        """Name of the backend that runs for these prepared arguments.

        Raises:
            ValueError: `backend`, or the one set by use_backend() or FASTGEN_BACKEND, is not a
                backend of this op.
            RuntimeError: it is, but it cannot take these inputs.
        """
        if backend is None and _override:
            backend = _override.get(self.name, _override.get(_ALL))
        if backend is not None:
            return self._insist(backend, args)
        first = args[0]
        # The attribute costs a sixth of a device's name.
        reasons = self._device_reasons("cpu" if first.is_cpu else first.device.type)
        compiling = is_compiling()
        for name, implementation in self.implementations.items():
            reason = reasons[name]
            if reason is None and implementation.unsupported is not None:
                reason = implementation.unsupported(*args)
            if reason is None:
                return name
            if not compiling and (self.name, name, reason) not in _logged:
                self._log_passed_over(name, reason)
        raise RuntimeError(f"{self.name}: no backend takes these inputs")

    def _device_reasons(self, device: str) -> dict[str, str | None]:
        known = self._on_device.get(device)
        if known is not None:
            return known
        return {n: i.reason_against_device(device) for n, i in self.implementations.items()}

    def _insist(self, name: str, args: tuple) -> str:
        implementation = self.implementations.get(name) if isinstance(name, str) else None
        if implementation is None:
            known = ", ".join(self.implementations)
            raise ValueError(f"backend: {self.name} has {known}; got {name!r}")
        reason = implementation.reason_against(args)
        if reason is not None:
            raise RuntimeError(f"{self.name}: backend {name!r} was asked for, but {reason}")
        return name

    def _log_passed_over(self, name: str, reason: str) -> None:
        key = (self.name, name, reason)
        _logged.add(key)
        _log.debug("%s: not %s: %s", *key)

    def __call__(self, args: tuple, backend: str | None = None) -> Any:
        """Runs the op on prepared arguments."""
        name = self.select(args, backend)
        if not is_compiling():
            _calls[self.name, name] += 1
        return self.implementations[name].function(*args)


def ops() -> Mapping[str, Op]:
    """Every registered op by name."""
    import fastgen.ops  # noqa: F401  (registers them)

    return _ops


def explain(op: str, *args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    """Says which backend `fastgen.ops.<op>(*args, **kwargs)` would run, and why not an earlier one.

    Args:
        op: name of the op, e.g. "adain".
        *args, backend, **kwargs: exactly as for the public function.

    Raises:
        ValueError: unknown op or backend; or whatever the public function raises for these inputs.
    """
    table = ops()
    if op not in table:
        raise ValueError(f"op: expected one of {', '.join(sorted(table))}; got {op!r}")
    prepared = table[op].prepare(*args, **kwargs)
    chosen = table[op].select(prepared, backend)
    rejected = {}
    for name, implementation in table[op].implementations.items():
        if name == chosen:
            break
        rejected[name] = implementation.reason_against(prepared) or f"{chosen!r} was asked for"
    return Explanation(op, chosen, rejected)


def calls() -> dict[tuple[str, str], int]:
    """How often each (op, backend) ran since the start or :func:`reset_calls`; eager calls only."""
    return dict(_calls)


def reset_calls() -> None:
    """Sets every counter of :func:`calls` to zero."""
    _calls.clear()


def _parse(choice: str | Mapping[str, str]) -> dict[str, str]:
    if not isinstance(choice, str | Mapping):
        raise TypeError(
            f"choice: expected a backend name, a mapping or None, got {type(choice).__name__}"
        )
    table = {_ALL: choice} if isinstance(choice, str) else dict(choice)
    for op, backend in table.items():
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
        if op != _ALL and _ops and op not in _ops:
            raise ValueError(f"op: expected one of {', '.join(sorted(_ops))}; got {op!r}")
    return table


class use_backend:
    """Chooses the backend of every op, or of some, as a setter or as a context manager.

    Args:
        choice: a backend name for all ops, a mapping ``{op: backend}`` for some (the others keep
            what they had), or None for the default order everywhere.

    Process-wide: other threads see it too. Leaving a ``with`` block restores what was before.

    Raises:
        TypeError: `choice` is none of these.
        ValueError: unknown backend or op.

    Example:
        >>> with fastgen.use_backend("reference"):
        ...     y = fastgen.ops.adain(x, scale, shift)
        >>> fastgen.use_backend({"adain": "cpu"})
    """

    def __init__(self, choice: str | Mapping[str, str] | None) -> None:
        global _override
        self._previous = _override
        if choice is None:
            _override = {}
            return
        parsed = _parse(choice)
        _override = parsed if _ALL in parsed else {**_override, **parsed}

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _override
        _override = self._previous


def _from_environment(value: str) -> dict[str, str]:
    """Parses FASTGEN_BACKEND: "reference", or "adain=triton,vq_nearest=cpu"."""
    value = value.strip()
    if not value:
        return {}
    try:
        if "=" not in value:
            return _parse(value)
        pairs = [item.partition("=") for item in value.split(",")]
        return _parse({op.strip(): backend.strip() for op, _, backend in pairs})
    except ValueError as error:
        raise ValueError(f"FASTGEN_BACKEND={value!r}: {error}") from None


def check_choice() -> None:
    """Raises ValueError where FASTGEN_BACKEND names an op that does not exist."""
    unknown = sorted(set(_override) - {_ALL} - set(_ops))
    if unknown:
        raise ValueError(
            f"FASTGEN_BACKEND: unknown op {unknown[0]!r}; known: {', '.join(sorted(_ops))}"
        )


_override = _from_environment(os.environ.get("FASTGEN_BACKEND", ""))
