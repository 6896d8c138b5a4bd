"""What :func:`fastgen.patch` returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

__all__ = ["Left", "Replaced", "Report"]


@dataclass(frozen=True)
class Replaced:
    """One thing that runs on fused ops now.

    Attributes:
        path: where it is: a submodule's name ("" for the model itself), or a function's or class's
            dotted name.
        original: the class or function of its library.
        own_calls: where its calls run the library's own code although fused ops could, and why; ""
            for nowhere.
    """

    path: str
    original: str
    own_calls: str = ""

    def __str__(self) -> str:
        but = f"; its own code {self.own_calls}" if self.own_calls else ""
        return f"{self.path or '(the model)'}: {self.original}{but}"


@dataclass(frozen=True)
class Left:
    """One thing of a covered kind that keeps its own code; `reason` says why.

    The other attributes are those of :class:`Replaced`.
    """

    path: str
    original: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or '(the model)'}: {self.original}: {self.reason}"


@dataclass
class Report:
    """What was replaced, what was left and why. As a context manager it undoes the patch on exit.

    Attributes:
        target: what was patched, as a text.
        replaced: what runs on fused ops now.
        left: what is of a covered kind and keeps its own code.
        others: how many submodules there are beside these, of which fastgen has no faster kind.
    """

    target: str
    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    others: int = 0
    _undo: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"{self.target}: {len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  replaced {piece}" for piece in self.replaced]
        lines += [f"  left     {piece}" for piece in self.left]
        if self.others:
            lines.append(f"  {self.others} other modules, of kinds that fastgen does not cover")
        return "\n".join(lines)

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._undo is not None:
            self._undo()
