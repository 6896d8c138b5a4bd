"""Draws the CSV files of a results folder as bars: time relative to fastgen, one panel a mode."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = {"fastgen": "#1b6ca8", "reference": "#b0b0b0", "torch.compile": "#e08e45"}
PEER = "#7a5195"


def plot_results(folder: Path) -> Path:
    """Reads every CSV in `folder` and writes `folder/speed.png`."""
    table = []
    for path in sorted(folder.glob("*.csv")):
        with path.open() as file:
            table += [row for row in csv.DictReader(file) if not row["note"]]
    table = [row for row in table if row["provider"] != "x.clone()"]
    modes = [m for m in ("forward", "forward+backward") if any(r["mode"] == m for r in table)]
    labels = list(dict.fromkeys((r["op"], r["size"]) for r in table))
    figure, axes = plt.subplots(
        1, len(modes), figsize=(7.5 * len(modes), 1.5 + 0.62 * len(labels)), squeeze=False
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        _panel(axis, [r for r in table if r["mode"] == mode], labels, mode)
    figure.suptitle("Time relative to fastgen (shorter is faster)")
    figure.tight_layout()
    target = folder / "speed.png"
    figure.savefig(target, dpi=80)
    plt.close(figure)
    return target


def _panel(axis: plt.Axes, table: list[dict], labels: list[tuple[str, str]], mode: str) -> None:
    height = 0.0
    ticks, names = [], []
    for op, size in labels:
        group = [r for r in table if (r["op"], r["size"]) == (op, size)]
        if not group:
            continue
        ours = next(float(r["median_ms"]) for r in group if r["provider"] == "fastgen")
        start = height
        for row in group:
            ratio = float(row["median_ms"]) / ours
            colour = COLOURS.get(row["provider"], PEER)
            axis.barh(height, ratio, 0.9, color=colour)
            name = "" if row["provider"] in COLOURS else f" {row['provider']}"
            axis.text(ratio, height, f" {ratio:.3g}x{name}", va="center", fontsize=7)
            height += 1
        ticks.append((start + height - 1) / 2)
        names.append(f"{op}\n{size}\n{ours:.3g} ms")
        height += 1
    axis.set_yticks(ticks, names, fontsize=7)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(0.3, max(10.0, axis.get_xlim()[1] * 3))
    axis.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
    axis.xaxis.set_minor_formatter(lambda ratio, _: "")
    axis.axvline(1, color="black", linewidth=0.6)
    axis.set_title(mode)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()]
    axis.legend(handles, list(COLOURS), fontsize=7, loc="lower right")
