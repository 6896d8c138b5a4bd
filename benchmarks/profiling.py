"""Profiles what is furthest from the roof: `python -m benchmarks.profiling`.

Reads results of `benchmarks.run --device cuda` and runs ncu over one call of fastgen in each of the
rows with the smallest share of the roof. With `--one OP SIZE MODE` it is that call.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import make_step
from benchmarks.results import ROOT, Row, machine_name, read
from benchmarks.run import all_cases

#: Milliseconds under which a row shows what a call costs, not what a kernel does.
LEAST_MS = 0.05


def worst(folder: Path, count: int) -> list[Row]:
    """The rows of fastgen with the smallest share of the roof, of different ops where there are
    as many."""
    rows = [
        row
        for path in sorted(folder.glob("*.csv"))
        for row in read(path)
        if row["provider"] == "fastgen" and row["roof_share"] and not row["note"]
    ]
    rows = [row for row in rows if float(row["median_ms"]) > LEAST_MS] or rows
    rows.sort(key=lambda row: float(row["roof_share"]))
    first_of_op = [
        row for i, row in enumerate(rows) if row["op"] not in {r["op"] for r in rows[:i]}
    ]
    rest = [row for row in rows if row not in first_of_op]
    return (first_of_op + rest)[:count]


def ncu_command(row: Row, ncu: str) -> list[str]:
    """What profiles one row; the clocks are left as they are."""
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--set", "full"]
    command += [sys.executable, "-m", "benchmarks.profiling", "--one"]
    return [*command, row["op"], row["size"], row["mode"]]


def one_call(op: str, size: str, mode: str) -> None:
    """A call of fastgen, warm, between the marks that `--profile-from-start off` waits for."""
    case = next(case for case in all_cases(op, "cuda") if case.size == size)
    with torch.device("cuda"):
        step = make_step(case.call, case.make(), case.grad, mode)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0; 1 where a profile fails; 2 without results or without ncu."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiling", description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("OP", "SIZE", "MODE"))
    parser.add_argument("--results", type=Path, help="default benchmarks/results/<GPU>")
    parser.add_argument("--count", type=int, default=2, help="how many rows (default 2)")
    options = parser.parse_args(arguments)
    if options.one:
        one_call(*options.one)
        return 0
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        parser.exit(2, "there is no ncu here\n")
    folder = options.results or ROOT / "benchmarks" / "results" / machine_name("cuda")
    rows = worst(folder, options.count)
    if not rows:
        parser.exit(2, f"{folder}: no results of fastgen; run python -m benchmarks.run first\n")
    status = 0
    for row in rows:
        share = f"{float(row['roof_share']):.0%} of the roof"
        print(f"\n{row['op']} {row['size']}, {row['mode']}: {share}", flush=True)
        status |= subprocess.run(ncu_command(row, ncu), cwd=ROOT).returncode != 0
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
