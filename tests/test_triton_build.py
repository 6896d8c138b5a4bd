"""The Triton kernels compiled for GPUs that need not be here: what the launchers launch, with the
block sizes and hints they launch it with, and gates on what comes out of the assembler.

The launchers run on meta tensors under a driver that only names an architecture, and what they
would launch is compiled and read with cuobjdump, which comes with Triton.
"""

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastgen.ops import _library

triton = pytest.importorskip("triton", reason=str(_library.triton_unavailable))
if _library.triton_interprets:
    pytest.skip("TRITON_INTERPRET=1 compiles nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver as drivers  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
#: What is compiled: every dtype for the architecture that is tuned for, one for the others.
TARGETS = (
    (80, torch.float32),
    (90, torch.float32),
    (90, torch.bfloat16),
    (90, torch.float16),
    (90, torch.float64),
    (100, torch.bfloat16),
)
#: For launches that differ from one compiled for all of TARGETS in the loop around the same code.
FEW = ((90, torch.float32), (90, torch.bfloat16))


class Launch(NamedTuple):
    """One call of a launcher, and what its kernels may use.

    Attributes:
        op: names the module in fastgen.kernels; the launcher is `name`.
        name: of the launcher.
        shapes: of the tensors, with the dtype under test, or that of sums where marked by "sum",
            float64 by "double"; channels_last where marked by "last"; None for no tensor.
        options: the remaining arguments.
        registers: that a thread may use, at most; float64 is held to not spilling.
        narrow: loads of less than 128 bits that a thread may issue, at most (of what a row has
            once); None where rows do not start at multiples of 16 bytes.
        targets: what it is compiled for.
    """

    op: str
    name: str
    shapes: tuple[tuple, ...]
    options: tuple
    registers: int
    narrow: int | None = 0
    targets: tuple[tuple[int, torch.dtype], ...] = TARGETS

    @property
    def id(self) -> str:
        largest = max((s for s in self.shapes if s), key=len)
        sizes = "x".join(str(n) for n in largest if n not in ("sum", "double"))
        return f"{self.name}-{'-'.join(str(o) for o in self.options)}-{sizes}"


def _coupling(name, sizes, scale, min_scale, inverse, registers, narrow):
    backward = name.endswith("bwd")
    shapes = (sizes, (*sizes[:1], "sum")) if backward else ()
    options = (scale, inverse, 1.5, min_scale)
    return Launch("affine_coupling", name, (*shapes, *[sizes] * 3), options, registers, narrow)


def _spline(way, sizes, bins, inverse, batch_dims, registers, narrow):
    theta = tuple((*sizes, k) for k in (bins, bins, bins - 1))
    gradients = (sizes, (*sizes[:batch_dims], "sum")) if way == "bwd" else ()
    options = (batch_dims, inverse, 3.0, 1e-3, 1e-3, 1e-3)
    return Launch(
        "rq_spline", f"rq_spline_{way}", (*gradients, sizes, *theta), options, registers, narrow
    )


def _norm(order, sizes, narrow, parameters, targets):
    """`parameters`: 0 for none, 1 for (C,), 2 for (B, C). 128 registers leave 512 threads a
    multiprocessor, whose 16 or 8 values of each tensor are 32 KiB or more on their way."""
    per_plane = (*sizes[:2], "double")
    scale = {0: None, 1: (sizes[1], "sum"), 2: (*sizes[:2], "sum")}[parameters]
    shapes = (
        (sizes, scale, scale),
        (sizes, sizes, per_plane, per_plane, scale),
        (sizes, sizes, per_plane, per_plane, scale, sizes, scale, scale),
    )[order]
    name = ("instance_norm_fwd", "instance_norm_bwd", "instance_norm_bwd_bwd")[order]
    return Launch("instance_norm", name, shapes, (1e-5,), 128, narrow, targets)


LAUNCHES = (
    *(
        _norm(order, sizes, narrow, parameters, targets)
        for order in (0, 1, 2)
        for sizes, narrow, parameters, targets in (
            ((32, 64, 7, 7), None, 1, FEW),
            ((32, 256, 56, 56), 12, 2, TARGETS),
            ((16, 512, 128, 128), 12, 2, FEW),
            ((2**10, 2**5, 2**8, 2**8), 12, 1, FEW),
            ((1, 3, 1024, 1024), 12, 0, FEW),
            ((16, 256, 8, 8, "last"), 99, 1, FEW),
            ((16, 512, 128, 128, "last"), 99, 2, TARGETS),
        )
    ),
    *(
        _coupling(f"affine_coupling_{way}", sizes, scale, min_scale, inverse, 96, narrow)
        for way in ("fwd", "bwd")
        for sizes, scale, min_scale, inverse, narrow in (
            ((512, 32), "tanh", 0.0, False, 4),
            ((256, 6, 16, 16), "sigmoid", 0.0, False, 1),
            ((256, 6, 16, 16), "sigmoid", 1e-3, True, 1),
            ((64, 24, 32, 32), "exp", 0.0, True, 1),
            ((1000, 21), "atan", 0.0, True, None),
            ((1000, 21), "softplus", 0.0, True, None),
            ((64, 24, 32, 32), "softplus", 1e-3, False, 1),
            ((2**20, 2**12), "tanh", 0.0, True, 1),
        )
    ),
    *(
        _spline(way, sizes, bins, inverse, batch_dims, 160, narrow)
        for way in ("fwd", "bwd")
        for sizes, bins, inverse, batch_dims, narrow in (
            ((4096, 64), 8, False, 1, 99),
            ((1000, 3), 8, True, 2, 99),
            ((300, 1536), 10, True, 1, None),
            ((2**16, 2**16), 32, False, 2, 99),
        )
    ),
)


class NamedDriver:
    """A driver of a GPU that is not there; enough to compile with."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """The key of the caches of compiled kernels: one an architecture."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Resources(NamedTuple):
    """What one compiled kernel uses; `loads` and `stores` are widths in bits, one an instruction
    that reaches global memory."""

    registers: int
    stack: int
    local: int
    loads: list[int]
    stores: list[int]


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """compile_for(arch, function, *args): the resources of each kernel that the call launches."""

    def compile_for(arch: int, function: Any, *args: Any) -> dict[str, Resources]:
        found = {}
        run = triton.JITFunction.run

        def compile_only(self, *args, grid, warmup, **options):
            assert all(0 < n < 2**31 for n in grid)
            kernel = run(self, *args, grid=grid, warmup=True, **options)
            cubin = tmp_path / f"{self.__name__}.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            found[self.__name__] = resources(cubin)

        with monkeypatch.context() as patch:
            patch.setattr(triton.JITFunction, "run", compile_only)
            patch.setattr(drivers, "_active", NamedDriver(arch), raising=False)
            function(*args)
        assert found, "nothing was launched"
        return found

    return compile_for


def resources(cubin: Path) -> Resources:
    def ask(option: str) -> str:
        command = [CUOBJDUMP, option, cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", ask("-res-usage")))
    sass = ask("-sass")

    def widths(instruction: str) -> list[int]:
        opcodes = re.findall(rf"\b{instruction}(\.[.\w]+)? ", sass)
        return [int((re.search(r"\.[US]?(8|16|64|128)\b", o) or [0, 32])[1]) for o in opcodes]

    return Resources(
        int(usage["REG"]), int(usage["STACK"]), int(usage["LOCAL"]), widths("LDG"), widths("STG")
    )


def tensor(shape: tuple | None, dtype: torch.dtype) -> torch.Tensor | None:
    if shape is None:
        return None
    if "double" in shape or ("sum" in shape and dtype != torch.float64):
        dtype = torch.float64 if "double" in shape else torch.float32
    t = torch.empty([n for n in shape if isinstance(n, int)], dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if "last" in shape else t


def arguments(launch: Launch, dtype: torch.dtype) -> tuple:
    return (*(tensor(shape, dtype) for shape in launch.shapes), *launch.options)


def check(launch: Launch, dtype: torch.dtype, found: dict[str, Resources]) -> None:
    """The gates."""
    for name, used in found.items():
        label = f"{name} {dtype}: {used}"
        assert used.stack == used.local == 0, f"registers spill: {label}"
        assert used.registers <= launch.registers or dtype == torch.float64, label
        if launch.narrow is not None:
            assert 128 in used.loads, label
            assert sum(width < 128 for width in used.loads) <= launch.narrow, label


@pytest.mark.parametrize(
    ("launch", "arch", "dtype"),
    [
        pytest.param(launch, *target, id=f"{launch.id}-sm_{target[0]}-{str(target[1])[6:]}")
        for launch in LAUNCHES
        for target in launch.targets
    ],
)
def test_compiles_within_its_resources(launch, arch, dtype, compile_for):
    launcher = getattr(importlib.import_module(f"fastgen.kernels.{launch.op}"), launch.name)
    check(launch, dtype, compile_for(arch, launcher, *arguments(launch, dtype)))


@triton.jit
def _planted_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride)
    tl.store(y_ptr + i, x / tl.sum(x))


def plant(x, y, stride, block, **options):
    _planted_kernel[(1,)](x, y, stride, BLOCK=block, **options)


def test_the_gates_see_what_they_look_for(compile_for):
    """Spilled registers, too many of them, and narrow loads."""
    x = torch.empty(8192, device="meta")
    gentle = Launch("", "", (), (), registers=255, narrow=None)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    with pytest.raises(AssertionError, match="registers spill"):
        found = compile_for(90, lambda: plant(x, x, 1, 4096, maxnreg=32, **options))
        check(gentle, x.dtype, found)
    found = compile_for(90, lambda: plant(x, x, 1, 512, **options))
    check(gentle._replace(narrow=0), x.dtype, found)
    with pytest.raises(AssertionError, match="registers="):
        check(gentle._replace(registers=16), x.dtype, found)
    with pytest.raises(AssertionError, match="loads="):
        found = compile_for(90, lambda: plant(x, x, 7, 512, **options))
        check(gentle._replace(narrow=0), x.dtype, found)
