"""Times the training steps of models: `python -m benchmarks.models.run [MODEL ...]`.

Each model is a file `benchmarks/models/bench_<model>.py` with a list CASES. Prints a table and
keeps benchmarks/results/<machine>/models/<model>.csv; `python -m benchmarks.report FOLDER` makes
Markdown of those.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.models.case import ModelCase, run_model
from benchmarks.roof import measure_roof
from benchmarks.run import print_timing
from fastgen.memory import keep_freed_memory
from fastgen.ops import _library

FOLDER = Path(__file__).parent
QUICK_BUDGET = 1.0


def models_in(folder: Path) -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))


def cases_of(model: str, folder: Path = FOLDER) -> list[ModelCase]:
    return importlib.import_module(f"benchmarks.{folder.name}.bench_{model}").CASES


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parser(folder: Path = FOLDER) -> argparse.ArgumentParser:
    name = folder.name
    p = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}.run",
        description=f"Times training steps: `python -m benchmarks.{name}.run [MODEL ...]`.",
    )
    known = ", ".join(models_in(folder))
    p.add_argument("models", nargs="*", metavar="MODEL", help=f"any of {known}")
    p.add_argument("--filter", default="", metavar="SIZE", help="only cases whose size contains it")
    p.add_argument("--providers", type=_list, metavar="A,B", help="only these beside fastgen")
    p.add_argument("--budget", type=float, default=10.0, help="seconds a case (default 10)")
    p.add_argument("--threads", type=int, help="threads of everything (default: all cores)")
    results.add_heap_option(p)
    p.add_argument("--out", type=Path, help=f"folder of the CSV; default results/<machine>/{name}")
    p.add_argument("--quick", action="store_true", help=f"{QUICK_BUDGET:g} s a case, nothing kept")
    return p


def run_case(case: ModelCase, sizes: Sequence[str], options: argparse.Namespace) -> None:
    """Times and prints one case, and keeps its rows in the CSV that holds those of `sizes`."""
    timings, ours = [], float("nan")
    for timing in run_model(case, budget=options.budget, wanted=options.providers):
        timings.append(timing)
        if timing.provider == "fastgen":
            ours = timing.seconds
        print_timing(timing, ours)
    if options.out is not None:
        isa = _library.CPU_ISAS[torch.ops.fastgen.cpu_isa()]
        roof = measure_roof(torch.device("cpu"))
        rows = results.rows_of(case, timings, roof, isa, results.revision())
        keep = options.providers is not None
        results.update(options.out / f"{case.op}.csv", rows, sizes, keep_others=keep)


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Entry point: 0, or 2 for a bad argument."""
    p = parser(folder)
    options = p.parse_args(arguments)
    models = models_in(folder)
    unknown = [model for model in options.models if model not in models]
    if unknown:
        p.exit(2, f"unknown model {unknown[0]!r}; expected one of {', '.join(models)}\n")
    if options.threads is not None:
        if options.threads < 1:
            p.exit(2, f"--threads: expected at least 1, got {options.threads}\n")
        torch.set_num_threads(options.threads)
    if options.quick:
        options.budget = QUICK_BUDGET
    elif options.out is None:
        options.out = results.default_folder(options.heap) / folder.name
    if options.heap == "kept":
        keep_freed_memory()
    print(f"machine: {results.machine_name()}, torch {torch.__version__}")
    for model in options.models or models:
        cases = cases_of(model, folder)
        for case in cases:
            if options.filter in case.size:
                print(f"\n{model} {case.size}, {torch.get_num_threads()} threads", flush=True)
                run_case(case, [other.size for other in cases], options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
