"""The figures. Nothing here leaves a trace in matplotlib's global state, and all sizes are absolute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from attrs import frozen
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bench.report import Row
from qsnap.drawing.charts import LIGHT, PAPER

WIDTH_IN = 9.0
PANEL_IN = 2.6
TRACE_IN = 1.5
LEGEND_IN = 0.5
AROUND_MS = 200.0  #: the pauses, in the panel that is close to them
COLOURS = (LIGHT.capture, LIGHT.pause, "#2f9e6e")  #: told apart by colour-blind people too
LINE_COLOURS = ("#2b62b5", LIGHT.pause, "#2f9e6e")
MARKERS = ("o", "s", "^")


@frozen
class Line:
    """Values over others, and what they are."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@frozen
class Bar:
    """Parts stacked on each other, in ms, and whose they are."""

    label: str
    parts: Sequence[float]


def svg(figure: Figure) -> bytes:
    """The file; the same figure gives the same bytes."""
    target = BytesIO()
    with rc_context({"svg.hashsalt": "qsnap"}):  # of the names inside, which would be others each time
        figure.savefig(target, format="svg", metadata={"Creator": None, "Date": None})
    return target.getvalue()


def _panels(count: int, columns: int, height_in: float) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    size = (WIDTH_IN, rows * height_in + LEGEND_IN)
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - LEGEND_IN / size[1]), h_pad=0.08)
    figure = Figure(size, facecolor=PAPER, layout=layout)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for each in axes[count:]:
        each.remove()
    return figure, axes[:count]


def _style(axes: Axes, title: str, grid: str = "both") -> None:
    axes.set_title(title, loc="left", color=LIGHT.ink, fontsize=10, fontweight="bold")
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=LIGHT.soft, labelsize=8)
    axes.grid(axis=grid, color=LIGHT.grid, linewidth=0.8)  # type: ignore[arg-type]


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    figure.legend(
        handles=handles, loc="upper left", ncols=len(handles), frameon=False, labelcolor=LIGHT.soft, fontsize=9
    )


def draw_bars(panels: Mapping[str, Sequence[Bar]], parts: Sequence[str]) -> Figure:
    """Bars from left to right, by panel, each panel with a scale of its own."""
    figure, all_axes = _panels(len(panels), min(2, len(panels)), PANEL_IN)
    for axes, (title, bars) in zip(all_axes, panels.items(), strict=True):
        _style(axes, title, "y")
        bottoms = np.zeros(len(bars))
        for part, colour in enumerate(COLOURS[: len(parts)]):
            heights = np.array([bar.parts[part] for bar in bars])
            axes.bar(range(len(bars)), heights, 0.7, bottoms, color=colour)
            bottoms += heights
        axes.set_xticks(range(len(bars)), [bar.label for bar in bars], rotation=90 if len(bars) > 8 else 0)
        axes.set_ylabel("ms", color=LIGHT.soft, fontsize=9)
    _legend(figure, [Patch(color=colour, label=part) for colour, part in zip(COLOURS, parts, strict=True)])
    return figure


def draw_lines(panels: Mapping[str, Sequence[Line]]) -> Figure:
    """Times in s over what doubles from point to point; the key is what that is."""
    figure, all_axes = _panels(len(panels), len(panels), PANEL_IN + 0.6)
    drawn = []
    for axes, (what, lines) in zip(all_axes, panels.items(), strict=True):
        _style(axes, "")
        drawn = [
            axes.plot(line.x, np.array(line.y) / 1e3, marker=marker, color=colour, label=line.label)[0]
            for line, colour, marker in zip(lines, LINE_COLOURS, MARKERS, strict=True)
        ]
        axes.set_xscale("log", base=2)
        axes.set_xticks(lines[0].x, [f"{x:g}" for x in lines[0].x], minor=False)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(what, color=LIGHT.soft, fontsize=9)
        axes.set_ylabel("s", color=LIGHT.soft, fontsize=9)
    _legend(figure, drawn)
    return figure


@frozen
class Trace:
    """Rows of one trace: segments with new data and without, pauses of VMs, and the whole action."""

    fresh: Sequence[Row]
    again: Sequence[Row]
    pauses: Sequence[Row]
    action: Row


def _draw_trace(axes: Axes, trace: Trace, start_ms: float, end_ms: float) -> None:
    axes.axvspan(trace.action["at_ms"], trace.action["end_ms"], color=LIGHT.capture, alpha=0.35, linewidth=0)
    for pause in trace.pauses:
        axes.axvspan(pause["at_ms"], pause["end_ms"], color=LIGHT.pause, alpha=0.5, linewidth=0)
    for rows, colour, size in ((trace.fresh, LIGHT.ink, 1.5), (trace.again, COLOURS[2], 4)):
        inside = [row for row in rows if start_ms <= row["at_ms"] <= end_ms]
        at_ms, kilobytes = [row["at_ms"] for row in inside], [row["sequence"] / 1e3 for row in inside]
        axes.plot(at_ms, kilobytes, ".", color=colour, markersize=size)
    axes.set_xlim(start_ms, end_ms)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def draw_sequences(traces: Mapping[str, Trace]) -> Figure:
    """For each trace a panel with all of it, over the same time, and one of the pauses."""
    figure, all_axes = _panels(2 * len(traces), 2, TRACE_IN)
    times_ms = [row["at_ms"] for trace in traces.values() for row in (*trace.fresh, *trace.again)]
    for index, (title, trace) in enumerate(traces.items()):
        whole, close = all_axes[2 * index : 2 * index + 2]
        _style(whole, title)
        _style(close, f"{title}, close")
        _draw_trace(whole, trace, min(times_ms), max(times_ms))
        first_ms = min((pause["at_ms"] for pause in trace.pauses), default=0.0)
        last_ms = max((pause["end_ms"] for pause in trace.pauses), default=0.0)
        _draw_trace(close, trace, first_ms - AROUND_MS / 2, last_ms + AROUND_MS)
        whole.set_ylabel("kB", color=LIGHT.soft, fontsize=9)
    for axes in all_axes[-2:]:
        axes.set_xlabel("ms from the call", color=LIGHT.soft, fontsize=9)
    _legend(
        figure,
        [
            Line2D([], [], color=LIGHT.ink, marker=".", linestyle="", label="segment"),
            Line2D([], [], color=COLOURS[2], marker=".", linestyle="", label="segment sent again"),
            Patch(color=LIGHT.capture, alpha=0.35, label="snapshot, the whole call"),
            Patch(color=LIGHT.pause, alpha=0.5, label="a VM stands still"),
        ],
    )
    return figure
