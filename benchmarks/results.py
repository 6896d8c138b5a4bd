"""The CSV files of benchmarks: one an op in `benchmarks/results/<machine>/`, a row a measurement.

A row is identified by threads, instruction set, size, mode and provider; a later run replaces what
it measured again and leaves the rest.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastgen
from benchmarks.case import MODES, Case, Timing
from benchmarks.roof import Roof

ROOT = Path(__file__).parents[1]

COLUMNS = (
    *("date", "commit", "fastgen", "torch", "python", "machine", "threads", "isa"),
    *("copy_gb_s", "fma_gflop_s", "bf16_gflop_s"),
    *("op", "size", "mode", "provider", "package", "median_ms", "p20_ms", "p80_ms"),
    *("ratio", "roof_share", "bytes", "flops", "peak_mib", "note"),
)

Row = dict[str, str]


def machine_name(device: str = "cpu") -> str:
    """A short name of this kind of machine, for the results folder.

    Processor, family and model (a virtual machine often hides the processor's number) and cores; of
    a GPU ("cuda") its name, "h200".
    """
    if device == "cuda":
        name = torch.cuda.get_device_name().removeprefix("NVIDIA ")
    else:
        info = Path("/proc/cpuinfo")
        text = info.read_text() if info.exists() else ""
        fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, re.MULTILINE))
        model = fields.get("model name", platform.processor() or platform.machine())
        if "cpu family" in fields:
            model += f" f{fields['cpu family']}m{fields['model']}"
        name = f"{model} {_cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def add_heap_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--heap",
        choices=("kept", "fresh"),
        default="kept",
        help="freed memory stays with the process, for all providers (kept), or the C library does "
        "what it does by itself (fresh: large results on new pages each time)",
    )


def default_folder(heap: str, device: str = "cpu") -> Path:
    """Where the results of this machine are kept, for an answer to :func:`add_heap_option`."""
    suffix = "" if heap == "kept" else "-fresh-heap"
    return ROOT / "benchmarks" / "results" / (machine_name(device) + suffix)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def revision() -> str:
    """The commit that is checked out, "-dirty" where files differ from it; "" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def rows_of(
    case: Case,
    timings: Sequence[Timing],
    roof: Roof,
    isa: str,
    commit: str,
    device: str = "cpu",
) -> list[Row]:
    """The CSV rows of one case, ratios relative to fastgen: 2 is twice as slow."""
    ours = {t.mode: t.seconds for t in timings if t.provider == "fastgen"}
    common = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit,
        "fastgen": fastgen.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine_name(device),
        "threads": str(torch.get_num_threads()),
        "isa": isa,
        "copy_gb_s": f"{roof.bandwidth / 1e9:.2f}",
        "fma_gflop_s": f"{roof.flops / 1e9:.1f}",
        "bf16_gflop_s": f"{roof.bf16_flops / 1e9:.1f}",
        "op": case.op,
        "size": case.size,
    }
    table = []
    for t in timings:
        bytes_, flops = case.work(t.mode)
        measured = {
            "mode": t.mode,
            "provider": t.provider,
            "package": t.package,
            "median_ms": _number(t.seconds * 1e3, ".4f"),
            "p20_ms": _number(t.low * 1e3, ".4f"),
            "p80_ms": _number(t.high * 1e3, ".4f"),
            "ratio": _number(t.seconds / ours[t.mode], ".3f"),
            "roof_share": _number(t.share, ".3f"),
            "bytes": str(bytes_),
            "flops": str(flops),
            "peak_mib": _number(t.peak / 2**20, ".1f"),
            "note": t.note,
        }
        table.append({**common, **measured})
    return table


def _number(value: float, spec: str) -> str:
    return "" if math.isnan(value) else format(value, spec)


def read(path: Path) -> list[Row]:
    """The rows of one CSV.

    Raises:
        ValueError: the file has other columns than this harness writes.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path}: expected the columns {', '.join(COLUMNS)}; move the file away"
            )
        return list(reader)


def modes_of(table: Sequence[Row]) -> list[str]:
    """The modes that the rows have, in their order."""
    return [mode for mode in MODES if any(row["mode"] == mode for row in table)]


def update(
    path: Path, table: Sequence[Row], sizes: Sequence[str], *, keep_others: bool = False
) -> None:
    """Puts the rows of one case under one setting into the CSV at `path`.

    They replace what the file has of that case and setting, or with `keep_others` of the same
    providers alone. Rows are in the order of `sizes`, then by instruction set and threads; old rows
    of other sizes are dropped. The file is whole at any moment.
    """
    columns = ("size", "threads", "isa", *(("provider",) if keep_others else ()))

    def key(row: Row) -> tuple[str, ...]:
        return tuple(row[column] for column in columns)

    measured = {key(row) for row in table}
    old = read(path) if path.exists() else []
    kept = [row for row in old if row["size"] in sizes and key(row) not in measured]
    ordered = sorted(
        [*kept, *table],
        key=lambda row: (sizes.index(row["size"]), row["isa"], int(row["threads"])),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(ordered)
    partial.replace(path)
