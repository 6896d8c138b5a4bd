"""`python -m fastgen.info`: what is installed, what was built, and which backend of which op runs
here, with the reason for every one that does not. `--json` prints the same as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastgen
from fastgen import _build, backends
from fastgen.ops import _library

__all__ = ["collect", "main", "render"]

WIDTH = 100

#: Environment variables that change what fastgen builds or runs.
VARIABLES = (
    "FASTGEN_BACKEND",
    "FASTGEN_CPU",
    "FASTGEN_CPU_ISA",
    "FASTGEN_CUDA",
    "FASTGEN_DATA",
    "FASTGEN_SANITIZE",
    "FASTGEN_STRICT",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "MAX_JOBS",
    "OMP_NUM_THREADS",
    "TORCH_CUDA_ARCH_LIST",
    "TRITON_INTERPRET",
)


def collect() -> dict[str, Any]:
    """Everything that :func:`render` prints, as JSON-serialisable values.

    Returns:
        A mapping with the keys "versions", "build", "gpu" and "cpu" (name -> value), "environment"
        (variable -> value), "unknown_variables" (FASTGEN_* variables that mean nothing), "broken"
        (what was built and does not load) and "ops" (op -> backend -> None where it can run, else
        the reason).
    """
    return {
        "versions": _versions(),
        "build": _build.info(),
        "gpu": _gpu(),
        "cpu": _cpu(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "unknown_variables": sorted(
            name for name in os.environ if name.startswith("FASTGEN_") and name not in VARIABLES
        ),
        "broken": list(_library.broken),
        "ops": {
            name: {
                backend: _reason_against(implementation)
                for backend, implementation in op.implementations.items()
            }
            for name, op in sorted(backends.ops().items())
        },
    }


def _versions() -> dict[str, str]:
    return {
        "fastgen": fastgen.__version__,
        "location": str(Path(fastgen.__file__).parent),
        "python": f"{platform.python_version()} ({platform.machine()}, {platform.system()})",
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or "none: a CPU build of PyTorch",
        "triton": _triton(),
    }


def _triton() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ImportError as error:
        return f"none: {error} (it comes with CUDA builds of PyTorch)"


def _gpu() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"devices": f"none: {_why_no_gpu()}"}
    found = {"driver": _driver()}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = (
            f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, "
            f"{p.total_memory / 2**30:.0f} GiB"
        )
    return found


def _why_no_gpu() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "CUDA starts, but shows no device (CUDA_VISIBLE_DEVICES?)"


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    if not version.exists():
        return "unknown: /proc/driver/nvidia/version is missing"
    return version.read_text().splitlines()[0].removeprefix("NVRM version:").strip()


def _cpu() -> dict[str, Any]:
    if _library.cpu_unavailable is None:
        isa = _library.CPU_ISAS[torch.ops.fastgen.cpu_isa()]
        best = _library.CPU_ISAS[torch.ops.fastgen.best_cpu_isa()]
    else:
        isa = best = "none: the CPU kernels are unavailable"
    return {"instruction set": isa, "best here": best, "threads": torch.get_num_threads()}


def _reason_against(implementation: backends.Implementation) -> str | None:
    if implementation.unavailable is not None:
        return implementation.unavailable
    if implementation.device == "cuda" and not torch.cuda.is_available():
        return f"needs a CUDA device: {_why_no_gpu()}"
    return None


def render(info: dict[str, Any]) -> str:
    """The report as text, at most 100 columns wide (paths excepted)."""
    blocks = [_section(title, info[title]) for title in ("versions", "build", "gpu", "cpu")]
    blocks.append(_environment(info["environment"]))
    blocks += [f"! {name}: not a variable that fastgen knows" for name in info["unknown_variables"]]
    blocks += [f"! BROKEN: {reason}" for reason in info["broken"]]
    blocks.append(_op_table(info["ops"]))
    return "\n\n".join(blocks)


def _environment(values: dict[str, str]) -> str:
    lines = [f"  {name}={value}" for name, value in values.items()]
    return "\n".join(["environment", *(lines or ["  no variable of fastgen is set"])])


def _section(title: str, values: dict[str, Any]) -> str:
    lines = [
        line for name, value in values.items() for line in _entry(name.replace("_", " "), value)
    ]
    return "\n".join([title, *lines])


def _entry(name: str, value: Any) -> list[str]:
    if value is None or value == "":
        text = "-"
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    else:
        text = str(value)
    return textwrap.wrap(
        f"  {name:<24}{text}", WIDTH, subsequent_indent=" " * 26, break_long_words=False
    )


def _op_table(ops: dict[str, dict[str, str | None]]) -> str:
    notes: dict[str, int] = {}
    lines = ["ops".ljust(26) + "".join(name.ljust(12) for name in backends.BACKENDS)]
    for op, states in ops.items():
        lines.append(f"  {op:<24}" + "".join(_cells(states, notes)))
    lines.append("  yes: can run here; -: there is none; no [n]: see below")
    for reason, number in notes.items():
        lines += textwrap.wrap(f"  [{number}] {reason}", WIDTH, subsequent_indent=" " * 6)
    return "\n".join(line.rstrip() for line in lines)


def _cells(states: dict[str, str | None], notes: dict[str, int]) -> Iterator[str]:
    for backend in backends.BACKENDS:
        reason = states.get(backend, "")
        if reason is None:
            yield "yes".ljust(12)
        elif reason == "":
            yield "-".ljust(12)
        else:
            yield f"no [{notes.setdefault(reason, len(notes) + 1)}]".ljust(12)


def main(
    arguments: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> int:
    """Entry point of `python -m fastgen.info`, and with a parser of its own of `fastgen info`;
    returns the exit status: 1 if something is broken."""
    if parser is None:
        parser = argparse.ArgumentParser(prog="python -m fastgen.info", allow_abbrev=False)
    parser.description = __doc__
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    info = collect()
    try:
        print(json.dumps(info, indent=1) if options.json else render(info), flush=True)
    except BrokenPipeError:
        # The reader has enough (`| head`); at exit the interpreter would flush what is left again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if info["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
