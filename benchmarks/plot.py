"""Draws the CSV files of a results folder: speed.png against the alternatives, roofline.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from benchmarks.case import COPIES  # noqa: E402
from benchmarks.results import Row, modes_of, read  # noqa: E402
from benchmarks.roofline import roofline  # noqa: E402
from fastgen.ops._library import CPU_ISAS  # noqa: E402

FASTER, SLOWER, INK = "#1b6ca8", "#c0392b", "#333333"
DOTS = {"reference": "#8c8c8c", "torch.compile": "#e08e45"}
PEER = "#7a5195"

Key = tuple[str, str]


def plot_results(folder: Path) -> list[Path]:
    """Draws what was measured with the most threads and the best instruction set.

    Returns:
        The files it wrote in `folder`; none where the folder has no figures.
    """
    table = [row for path in sorted(folder.glob("*.csv")) for row in read(path) if not row["note"]]
    if not table:
        return []
    best = max((int(row["threads"]), CPU_ISAS.index(row["isa"])) for row in table)
    table = [row for row in table if (int(row["threads"]), CPU_ISAS.index(row["isa"])) == best]
    title = f"{table[0]['machine']}, {best[0]} threads, {CPU_ISAS[best[1]]}"
    figures = {"speed.png": _speed(table, title), "roofline.png": roofline(table, title)}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(folder / name)
            figure.savefig(written[-1], dpi=90)
            plt.close(figure)
    return written


def _speed(table: Sequence[Row], title: str) -> plt.Figure:
    """A line a case: a bar to the fastest alternative, a dot for each other one."""
    table = [row for row in table if row["provider"] not in COPIES]
    places, labels, height = {}, {}, 0.0
    for op in dict.fromkeys(row["op"] for row in table):
        labels[height] = op
        height += 1
        for size in dict.fromkeys(row["size"] for row in table if row["op"] == op):
            places[op, size], labels[height] = height, f"{size}   "
            height += 1
        height += 0.4
    modes = modes_of(table)
    figure, axes = plt.subplots(
        1,
        len(modes),
        figsize=(1.6 + 6.2 * len(modes), 1.3 + 0.185 * height),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        _speed_panel(axis, [row for row in table if row["mode"] == mode], places)
        axis.set_title(mode, fontsize=9)
    axes[0][0].set_yticks(list(labels), list(labels.values()), fontsize=7.5)
    for text in axes[0][0].get_yticklabels():
        text.set_fontweight("normal" if text.get_text().endswith(" ") else "bold")
    axes[0][0].set_ylim(height, -0.8)
    _legend(figure)
    figure.suptitle(f"Time of the alternatives relative to fastgen: {title}", fontsize=10)
    return figure


def _speed_panel(axis: plt.Axes, table: Sequence[Row], places: Mapping[Key, float]) -> None:
    for (op, size), y in places.items():
        group = [row for row in table if (row["op"], row["size"]) == (op, size)]
        ours = [row for row in group if row["provider"] == "fastgen"]
        others = sorted(
            (row for row in group if row["provider"] != "fastgen"), key=lambda r: float(r["ratio"])
        )
        if not ours or not others:
            continue
        fastest = float(others[0]["ratio"])
        axis.barh(y, fastest - 1, 0.62, left=1, color=FASTER if fastest >= 1 else SLOWER)
        for row in others:
            colour = DOTS.get(row["provider"], PEER)
            axis.plot(float(row["ratio"]), y, "o", color=colour, markersize=4.2, markeredgewidth=0)
        axis.text(1.01, y, _summary(ours[0], others[0]), **_BESIDE, transform=_beside(axis))
    axis.text(1.01, -0.6, "     ms   roof  fastest other", **_BESIDE, transform=_beside(axis))
    axis.set_xscale("log")
    low = min([0.5, *(0.8 * float(row["ratio"]) for row in table)])
    high = max([10.0, *(1.3 * float(row["ratio"]) for row in table)])
    axis.set_xlim(low, high)
    axis.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
    axis.xaxis.set_minor_formatter(lambda ratio, _: "")
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.tick_params(axis="x", labelsize=7.5)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


_BESIDE = {"fontsize": 7, "family": "monospace", "va": "center", "color": INK}


def _beside(axis: plt.Axes):
    """x in widths of the panel, y in lines."""
    return axis.get_yaxis_transform()


def _summary(ours: Row, fastest: Row) -> str:
    share = f"{float(ours['roof_share']):.0%}" if ours["roof_share"] else "-"
    ratio = f"{float(fastest['ratio']):.3g}x"
    return f"{float(ours['median_ms']):7.3g} {share:>6}  {ratio:>5} {fastest['provider']}"


def _legend(figure: plt.Figure) -> None:
    def dot(colour: str, label: str) -> Line2D:
        return Line2D([], [], marker="o", linestyle="", color=colour, markersize=4.2, label=label)

    handles = [
        Patch(color=FASTER, label="fastest alternative is slower"),
        Patch(color=SLOWER, label="fastest alternative is faster"),
        dot(DOTS["reference"], "reference in plain PyTorch"),
        dot(DOTS["torch.compile"], "torch.compile of it"),
        dot(PEER, "what people write or install instead"),
    ]
    figure.legend(handles=handles, fontsize=7.5, loc="outside lower center", ncols=5, frameon=False)
