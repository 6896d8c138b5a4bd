"""The roofline chart: what fastgen reaches between the limits of memory and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from benchmarks.results import Row, modes_of

INK = "#333333"
MARKERS = "osD^vPX*<>"
LEAST_MS = 0.5


def roofline(table: Sequence[Row], title: str) -> plt.Figure | None:
    """Reached operations a second over operations a byte, a panel a mode; roofs as lines.

    Returns:
        None where no case has both its bytes and its operations counted.
    """
    ours = [row for row in table if row["provider"] == "fastgen" and _is_counted(row)]
    if not ours:
        return None
    # Of small cases the time is that of the call.
    ours = [row for row in ours if float(row["median_ms"]) > LEAST_MS] or ours
    modes = modes_of(ours)
    figure, axes = plt.subplots(
        1,
        len(modes),
        figsize=(1.2 + 6.4 * len(modes), 6.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    markers = {
        op: MARKERS[i % len(MARKERS)] for i, op in enumerate(dict.fromkeys(r["op"] for r in ours))
    }
    colours = {op: plt.get_cmap("tab10")(i % 10) for i, op in enumerate(markers)}
    for axis, mode in zip(axes[0], modes, strict=True):
        rows = [row for row in ours if row["mode"] == mode]
        _roofs(axis, rows)
        points = [(*_point(row), row) for row in rows]
        for intensity, rate, row in points:
            axis.plot(
                intensity,
                rate,
                markers[row["op"]],
                color=colours[row["op"]],
                markersize=5,
                alpha=0.85,
            )
        _label_points(axis, points, colours)
        axis.set_title(mode, fontsize=9)
        axis.set_xlabel("operations a byte, at the fewest of both", fontsize=8)
        axis.tick_params(labelsize=7.5)
        axis.grid(color="#ececec", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0][0].set_ylabel("GFLOP/s reached", fontsize=8)
    handles = [
        Line2D([], [], marker=markers[op], linestyle="", color=colours[op], markersize=5, label=op)
        for op in markers
    ]
    figure.legend(handles=handles, fontsize=7.5, loc="outside lower center", ncols=9, frameon=False)
    figure.suptitle(f"Roofline of fastgen: {title}", fontsize=10)
    return figure


def _is_counted(row: Row) -> bool:
    return bool(row["fma_gflop_s"]) and float(row["bytes"]) > 0 and float(row["flops"]) > 0


def _point(row: Row) -> tuple[float, float]:
    flops = float(row["flops"])
    return flops / float(row["bytes"]), flops / float(row["median_ms"]) / 1e6


def _roofs(axis: plt.Axes, rows: Sequence[Row]) -> None:
    copy = max(float(row["copy_gb_s"]) for row in rows)
    fma = max(float(row["fma_gflop_s"]) for row in rows)
    bf16 = max(float(row["bf16_gflop_s"]) for row in rows)
    intensities = [_point(row)[0] for row in rows]
    rates = [_point(row)[1] for row in rows]
    low, high = 0.5 * min(intensities), 3 * max([*intensities, fma / copy])
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(0.5 * min(rates), 2.5 * max(fma, bf16, *rates))
    for peak, name, style in ((fma, "float32 multiply-add", "-"), (bf16, "bfloat16 dot", "--")):
        if peak > 0:
            ridge = peak / copy
            axis.plot([low, ridge, high], [low * copy, peak, peak], style, color=INK, linewidth=1)
            axis.text(
                high / 1.1,
                peak * 1.04,
                f"{name} {peak:.0f} GFLOP/s",
                fontsize=7,
                ha="right",
                va="bottom",
            )
    start = 1.3 * low
    axis.text(
        start,
        1.35 * start * copy,
        f"copy {copy:.1f} GB/s",
        fontsize=7,
        # The direction of a line of slope 1 in logarithms.
        rotation=math.degrees(math.atan(1.35 * copy)),
        rotation_mode="anchor",
        transform_rotates_text=True,
    )


def _label_points(
    axis: plt.Axes, points: Sequence[tuple[float, float, Row]], colours: Mapping[str, tuple]
) -> None:
    """Sizes beside the right edge, each as near to the height of its point as there is room."""
    ordered = sorted(points, key=lambda point: point[1])
    low, high = (math.log(limit) for limit in axis.get_ylim())
    heights = [(math.log(rate) - low) / (high - low) for _, rate, _ in ordered]
    for (intensity, rate, row), height in zip(ordered, _spread(heights), strict=True):
        colour = colours[row["op"]]
        axis.annotate(
            row["size"],
            (intensity, rate),
            xytext=(1.02, height),
            textcoords="axes fraction",
            fontsize=6.5,
            va="center",
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6},
            annotation_clip=False,
        )


def _spread(heights: Sequence[float]) -> list[float]:
    """Ascending heights within [0, 1], moved apart to keep a line's distance.

    Labels that touch form a group, which is centred on the mean of where its labels want to be.
    """
    gap = min(0.027, 1 / max(1, len(heights)))
    groups: list[list[float]] = []
    for i, height in enumerate(heights):
        groups.append([height - i * gap])
        while len(groups) > 1 and fmean(groups[-2]) >= fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    free = [fmean(group) for group in groups for _ in group]
    room = 1 - gap * (len(heights) - 1)
    return [min(max(start, 0), room) + i * gap for i, start in enumerate(free)]
