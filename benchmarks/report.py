"""Prints a results folder as Markdown: `python -m benchmarks.report [FOLDER]`.

A table with a line a case and mode, then every line where something else is faster than fastgen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.case import COPIES
from benchmarks.results import ROOT, Row, machine_name, read

Group = list[Row]


def groups(folder: Path) -> Iterator[Group]:
    """The rows with figures of each case, mode and setting; fastgen's first, then the fastest."""
    for path in sorted(folder.glob("*.csv")):
        found: dict[tuple[str, ...], Group] = {}
        for row in read(path):
            if not row["note"] and row["provider"] not in COPIES:
                key = tuple(row[c] for c in ("op", "size", "mode", "threads", "isa"))
                found.setdefault(key, []).append(row)
        for group in found.values():
            if any(row["provider"] == "fastgen" for row in group):
                yield sorted(group, key=lambda r: (r["provider"] != "fastgen", float(r["ratio"])))


def where(row: Row) -> str:
    return f"{row['op']} {row['size']}"


def setting(row: Row) -> str:
    return f"{row['threads']} x {row['isa']}"


def table(found: Sequence[Group]) -> Iterator[str]:
    """Markdown lines: ours in ms, share of the roof, memory, and the others, fastest first."""
    yield "| op, size | mode | threads | fastgen | of the roof | MiB | others, times as long |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for ours, *others in found:
        share = f"{float(ours['roof_share']):.0%}" if ours["roof_share"] else ""
        ratios = ", ".join(f"{row['provider']} {float(row['ratio']):.3g}" for row in others)
        time = f"{float(ours['median_ms']):.3g} ms"
        cells = (where(ours), ours["mode"], setting(ours), time, share, ours["peak_mib"], ratios)
        yield f"| {' | '.join(cells)} |"


def slower(found: Sequence[Group]) -> Iterator[str]:
    """A line for each case and mode where something is faster than fastgen."""
    for ours, *others in found:
        ahead = [
            f"{r['provider']} {float(r['ratio']):.2f}" for r in others if float(r["ratio"]) < 1
        ]
        if ahead:
            place = f"{where(ours)}, {ours['mode']}, {setting(ours)}"
            yield f"- {place}: {', '.join(ahead)} of our time"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 where the folder has no results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = ROOT / "benchmarks" / "results" / machine_name(device)
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    folder = parser.parse_args(arguments).folder
    found = list(groups(folder))
    if not found:
        parser.exit(2, f"{folder}: no results; run python -m benchmarks.run first\n")
    print(*table(found), "", "Faster than fastgen:", "", *slower(found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
