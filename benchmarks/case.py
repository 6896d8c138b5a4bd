"""What a benchmark case is: an op at one size, who does the same, and under what it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from fastgen.ops import _library

FORWARD, BOTH = "forward", "forward+backward"
#: The gradient alone, of a graph that is kept; and the gradient of that of the first input.
BACKWARD, SECOND = "backward", "second order"
MODES = (FORWARD, BOTH, BACKWARD, SECOND)
COPY, COPY_ALL = "x.clone()", "copy of what it moves"
#: Providers that do not do the job of a case, but show how fast memory is.
COPIES = (COPY, COPY_ALL)


def dtype_note(dtype: torch.dtype) -> list[str]:
    """What a case's `size` says of its dtype: nothing of float32."""
    return [str(dtype).removeprefix("torch.")] * (dtype != torch.float32)


@dataclass(frozen=True)
class Setting:
    """What a case is timed under: threads of everything, and the instruction set of fastgen's
    kernels, which on a GPU is its own ("sm_90")."""

    threads: int
    isa: str

    def apply(self) -> None:
        torch.set_num_threads(self.threads)
        if self.isa in _library.CPU_ISAS:
            torch.ops.fastgen.force_cpu_isa(_library.CPU_ISAS.index(self.isa))

    def __str__(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads > 1)}, {self.isa}"


@dataclass(frozen=True)
class Provider:
    """Something that does the job of a case. One whose library is missing raises ImportError.

    Attributes:
        function: called on what `prepare` returns.
        prepare: from the case's tensors to the function's own inputs; it is not timed.
        grad: positions in `function`'s inputs that get gradients; None for those of the case.
        tolerance: largest difference from fastgen on the case's `small` inputs, absolute and
            relative; more raises. None for what computes something else on purpose.
        package: name of the library for pip, whose version is recorded.
        device: type of the devices that it runs on, "" for all.
    """

    function: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]] | None = None
    grad: tuple[int, ...] | None = None
    tolerance: float | None = None
    package: str = ""
    device: str = ""

    def inputs(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        return tensors if self.prepare is None else self.prepare(*tensors)

    @property
    def version(self) -> str:
        """ "name version" of the package, or "" where there is none."""
        try:
            return f"{self.package} {metadata.version(self.package)}" if self.package else ""
        except metadata.PackageNotFoundError:
            return ""


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: name in `fastgen.ops`.
        size: what the table prints, e.g. "65536x512x64".
        make: makes the positional arguments; the first is a tensor.
        call: the public op, called as `call(*arguments, backend=...)`; a `functools.partial` where
            it takes keywords.
        grad: positions of the inputs that get gradients; empty for forward only.
        bytes: fewest bytes the forward must move, inputs once and outputs once.
        flops: fewest floating point operations of the forward, 0 where memory is all that counts;
            an elementary function counts as one.
        bytes_backward, flops_backward: the same for backward alone, which reads its inputs again
            and writes the gradients; 0 and 0 where nobody has counted.
        bytes_second: the same of the gradient of the gradient.
        peers: others doing the same on the same tensors, by name.
        small: makes arguments on which peers with a tolerance are compared with fastgen.
        compiled: whether to time torch.compile of the reference; False where the reference is
            written out over a dimension that makes compiling it take minutes.
        forward: whether to time forward alone.
        more: further modes, BACKWARD and SECOND.
    """

    op: str
    size: str
    make: Callable[[], tuple[Any, ...]]
    call: Callable[..., Any]
    grad: tuple[int, ...] = ()
    bytes: int = 0
    flops: int = 0
    bytes_backward: int = 0
    flops_backward: int = 0
    peers: Mapping[str, Callable[..., Any] | Provider] = field(default_factory=dict)
    small: Callable[[], tuple[Any, ...]] | None = None
    compiled: bool = True
    forward: bool = True
    more: tuple[str, ...] = ()
    bytes_second: int = 0

    @property
    def modes(self) -> tuple[str, ...]:
        return (FORWARD,) * self.forward + (BOTH,) * bool(self.grad) + self.more

    def work(self, mode: str) -> tuple[int, int]:
        """Fewest bytes and operations of a mode; 0 and 0 where they are not known."""
        if mode == FORWARD:
            return self.bytes, self.flops
        if mode == SECOND:
            return self.bytes_second, 0
        if mode == BACKWARD:
            return self.bytes_backward, self.flops_backward
        if not self.bytes_backward and not self.flops_backward:
            return 0, 0
        return self.bytes + self.bytes_backward, self.flops + self.flops_backward


@dataclass(frozen=True)
class Timing:
    """One provider in one mode, or why there are no figures.

    Attributes:
        provider, mode: what was timed.
        seconds, low, high: median, 20 % and 80 % quantile.
        peak: most bytes that a call had allocated at once, results included; NaN where the system
            does not tell.
        share: fraction of the roof that the call reached; NaN where the case counts no work.
        package: library and version.
        note: why there are no figures.
    """

    provider: str
    mode: str
    seconds: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    peak: float = float("nan")
    share: float = float("nan")
    package: str = ""
    note: str = ""
