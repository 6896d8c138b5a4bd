"""Runs benchmarks: `python -m benchmarks.run [OP ...]`.

For each op: its tests first (no figures on red), then every case of `benchmarks/ops/bench_<op>.py`.
Prints a table with ratios to fastgen and the share of the measured roof, writes a CSV and a chart
to benchmarks/results/<machine>/.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastgen
from benchmarks.harness import Case, Roof, Timing, measure_roof, run_case, share_of_roof
from fastgen import backends

ROOT = Path(__file__).parents[1]


def machine_name() -> str:
    """A short name of this kind of machine, for the results folder."""
    if torch.cuda.is_available():
        model = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
        model = f"{found[1] if found else platform.machine()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


def tests_pass(op: str) -> bool:
    """Runs the op's tests; a benchmark of a wrong kernel says nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-m", "not slow"]
    files = [str(ROOT / "tests" / "test_ops.py"), "-k", f"{op}-"]
    special = ROOT / "tests" / "ops" / f"test_{op}.py"
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and special.exists():
        done = subprocess.run([*command, str(special)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout[-3000:], done.stderr[-1000:], sep="\n")
    return done.returncode == 0


def print_timings(case: Case, timings: Sequence[Timing], roof: Roof) -> None:
    """Prints one case: a line a provider, with the ratio to fastgen."""
    print(f"\n{case.op} {case.size}")
    ours = {t.mode: t.seconds for t in timings if t.provider == "fastgen"}
    for t in timings:
        if t.note:
            print(f"  {t.mode:17} {t.provider:24} {t.note}")
            continue
        share = ""
        if t.provider == "fastgen" and t.mode == "forward" and (case.bytes or case.flops):
            share = f"  {share_of_roof(case, t.seconds, roof):4.0%} of the roof"
        print(
            f"  {t.mode:17} {t.provider:24} {t.seconds * 1e3:9.3f} ms"
            f"  [{t.low * 1e3:.3f} .. {t.high * 1e3:.3f}]"
            f"  {t.seconds / ours[t.mode]:7.2f} x fastgen{share}",
            flush=True,
        )


def rows(case: Case, timings: Sequence[Timing], roof: Roof) -> list[dict]:
    """The CSV rows of one case."""
    common = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "fastgen": fastgen.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "copy_gb_s": round(roof.bandwidth / 1e9, 2),
        "matmul_gflop_s": round(roof.flops / 1e9, 1),
        "op": case.op,
        "size": case.size,
    }
    return [
        {
            **common,
            "mode": t.mode,
            "provider": t.provider,
            "median_ms": f"{t.seconds * 1e3:.4f}",
            "p20_ms": f"{t.low * 1e3:.4f}",
            "p80_ms": f"{t.high * 1e3:.4f}",
            "note": t.note,
        }
        for t in timings
    ]


def write_results(folder: Path, op: str, table: list[dict]) -> Path:
    """Writes one op's CSV, replacing what an earlier run left."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{op}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 where an op's tests fail, 2 for a bad argument."""
    known = sorted(backends.ops())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(known)}")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds a case and mode")
    parser.add_argument("--threads", type=int, help="threads torch and the kernels use")
    parser.add_argument("--out", type=Path, help="folder for CSV and PNG")
    options = parser.parse_args(arguments)
    unknown = [op for op in options.ops if op not in known]
    if unknown:
        parser.exit(2, f"unknown op {unknown[0]!r}; expected one of {', '.join(known)}\n")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    folder = options.out or ROOT / "benchmarks" / "results" / machine_name()
    roof = measure_roof(torch.device("cpu"))
    print(f"machine: {machine_name()}, torch {torch.__version__}")
    print(f"roof: copy {roof.bandwidth / 1e9:.1f} GB/s, matmul {roof.flops / 1e9:.0f} GFLOP/s")
    red = []
    for op in options.ops or known:
        if not tests_pass(op):
            red.append(op)
            print(f"\n{op}: tests fail, no figures")
            continue
        table = []
        for case in importlib.import_module(f"benchmarks.ops.bench_{op}").CASES:
            timings = list(run_case(case, options.budget))
            print_timings(case, timings, roof)
            table += rows(case, timings, roof)
        print(f"  -> {write_results(folder, op, table)}")
    draw(folder)
    return 1 if red else 0


def draw(folder: Path) -> None:
    """Draws the chart of everything in the folder, where matplotlib is there."""
    try:
        from benchmarks.plot import plot_results
    except ImportError as error:
        print(f"no chart: {error.name} is not installed")
        return
    print(f"\nchart: {plot_results(folder)}")


if __name__ == "__main__":
    sys.exit(main())
