"""Drawing with matplotlib: panels of a snapshot's timeline, each by itself as SVG, all together as PNG.

Nothing here touches matplotlib's global state (pyplot, rcParams), so that it can run in any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from io import BytesIO
from typing import Any

import numpy as np
from attrs import field, frozen
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from qsnap.drawing.timeline import Course, Point, Span, Timeline, plan_discrepancies, plan_downtimes, plan_timeline
from qsnap.model import Snapshot
from qsnap.units import duration_text, instant_text

WIDTH_IN = 5.0  #: of a panel; a phone shows one, a wide screen two beside each other
LEFT_IN, RIGHT_IN, TOP_IN, BOTTOM_IN = 0.95, 0.1, 0.6, 0.55  #: around a panel's axes
TITLE_PT = 27  #: of a panel, above its axes
LANE_IN = 0.36
COURSE_IN = 1.3  #: height of axes that show something over time
HEADING_IN = 0.45
PADDING_IN = 0.25  #: around the panels of a PNG
DOTS_PER_INCH = 150
MOST_DOTS = 32_000  #: in a PNG's height; matplotlib can do twice as many
LONGEST_NAME = 11  #: characters of a VM's name that fit beside its lane
LABEL_ROOM = 0.24  #: of the axes' width, right of the last bar, for what is written there
LEAST_MS = 0.01  #: of an axis of durations, which may all be 0
LEAST_WIDTH = 0.008  #: of the axes' width: no pause is too short to be seen
BAR, PAUSE_BAR = 0.42, 0.72  #: heights of bars, in lanes


@frozen
class Theme:
    """Colours. Orange and blue are told apart by colour-blind people too."""

    ink: str
    soft: str
    grid: str
    capture: str
    pause: str


LIGHT = Theme(ink="#1b2430", soft="#5b6776", grid="#e3e7ec", capture="#a9c4ea", pause="#d9480f")
DARK = Theme(ink="#e8ecf1", soft="#9aa7b6", grid="#2c3642", capture="#3f5f8f", pause="#ff9248")
PAPER = "#ffffff"


@frozen
class Panel:
    """A drawing with axes: its height, and what fills it."""

    height_in: float
    fill: Callable[[Axes, Theme], None] = field(eq=False)


def whole_panel(timeline: Timeline) -> Panel:
    """Each VM's capture from start to last byte, and its pause in it."""

    def fill(axes: Axes, theme: Theme) -> None:
        shown = timeline.whole or Span(0.0, 1.0)
        _prepare(axes, theme, timeline, shown, "Whole capture")
        _legend(axes, theme)
        for lane, each in enumerate(timeline.lanes):
            if each.capture:
                _bar(axes, lane, each.capture, theme.capture, BAR)
                _write(axes, theme, lane, each.capture.end_ms, duration_text(each.capture.length_ms))
            if each.pause:
                _bar(axes, lane, each.pause, theme.pause, PAUSE_BAR)

    return Panel(_lanes_in(timeline), fill)


def cut_panel(timeline: Timeline) -> Panel:
    """The pauses, and how far the first STOP is from the last."""

    def fill(axes: Axes, theme: Theme) -> None:
        shown = timeline.cut or Span(0.0, 1.0)
        _prepare(axes, theme, timeline, shown, "Around the cut")
        for lane, each in enumerate(timeline.lanes):
            if each.pause:
                _bar(axes, lane, each.pause, theme.pause, PAUSE_BAR)
                _write(axes, theme, lane, each.pause.end_ms, duration_text(each.pause.length_ms))
        if timeline.discrepancy:
            _dimension(axes, theme, timeline.discrepancy)

    return Panel(_lanes_in(timeline), fill)


def downtime_panel(snapshots: Sequence[Snapshot]) -> Panel:
    """Over time: the downtime of every VM as a dot, the longest of each snapshot on a line."""
    return _course_panel("Downtime over time, in ms", plan_downtimes(snapshots))


def discrepancy_panel(snapshots: Sequence[Snapshot]) -> Panel:
    """Over time: the discrepancy between the VMs of each snapshot."""
    return _course_panel("Discrepancy over time, in ms", plan_discrepancies(snapshots))


def _course_panel(title: str, course: Course) -> Panel:
    def fill(axes: Axes, theme: Theme) -> None:
        _style(axes, theme, title)
        if not course.dots:
            axes.set(xticks=[], yticks=[])
            return
        axes.plot(*_columns(course.line), color=theme.pause, linewidth=1.6)
        axes.scatter(*_columns(course.dots), 20, theme.pause, alpha=0.6, linewidths=0, clip_on=False)
        axes.set_ylim(0, 1.08 * max(LEAST_MS, *(dot.duration_ms for dot in course.dots)))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", color=theme.grid, linewidth=0.8)
        times, _ = _columns(course.dots)
        room = max((times.max() - times.min()) // 25, np.timedelta64(1, "s"))
        axes.set_xlim(times.min() - room, times.max() + room)
        locator = AutoDateLocator(minticks=2, maxticks=6)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
        axes.xaxis.get_offset_text().set(color=theme.soft, size=9)

    return Panel(COURSE_IN, fill)


def _columns(points: Sequence[Point]) -> tuple[np.ndarray[Any, Any], list[float]]:
    """Local times as matplotlib takes them, and durations."""
    times = [datetime.fromtimestamp(point.instant_s) for point in points]
    return np.array(times, dtype="datetime64[us]"), [point.duration_ms for point in points]


def draw_svg(panel: Panel, theme: Theme) -> bytes:
    """A panel by itself, on a transparent ground."""
    figure = Figure((WIDTH_IN, TOP_IN + panel.height_in + BOTTOM_IN), facecolor="none")
    _place(figure, panel, theme, 0.0, 0.0)
    return _saved(figure, "svg", metadata={"Creator": None, "Date": None})


def draw_png(snapshots: Sequence[Snapshot]) -> bytes:
    """All snapshots, one below the other: two panels each. Several have an overview above them."""
    rows = [_row(each) for each in snapshots]
    if len(snapshots) > 1:
        panels = (downtime_panel(snapshots), discrepancy_panel(snapshots))
        rows.insert(0, Row(snapshots[0].vne.name, f"{len(snapshots)} snapshots", panels))
    figure = Figure((2 * WIDTH_IN + 3 * PADDING_IN, sum(row.height_in for row in rows)), facecolor=PAPER)
    top_in = 0.0
    for row in rows:
        _heading(figure, row, top_in)
        for column, panel in enumerate(row.panels):
            _place(figure, panel, LIGHT, PADDING_IN + column * (WIDTH_IN + PADDING_IN), top_in + HEADING_IN)
        top_in += row.height_in
    return _saved(figure, "png", dpi=dots_per_inch(figure.get_figheight()))


def dots_per_inch(height_in: float) -> float:
    """The usual ones, or fewer where a picture would get too large."""
    return min(DOTS_PER_INCH, MOST_DOTS / height_in)


@frozen
class Row:
    """Panels beside each other in a PNG, and what is written above them."""

    title: str
    remark: str
    panels: tuple[Panel, ...]

    @property
    def height_in(self) -> float:
        return HEADING_IN + TOP_IN + max(panel.height_in for panel in self.panels) + BOTTOM_IN


def _row(snapshot: Snapshot) -> Row:
    timeline = plan_timeline(snapshot)
    remark = f"{instant_text(snapshot.created_s)}, cut: {snapshot.cut.value}"
    return Row(f"{snapshot.vne.name}/{snapshot.name}", remark, (whole_panel(timeline), cut_panel(timeline)))


def _lanes_in(timeline: Timeline) -> float:
    return LANE_IN * (len(timeline.lanes) + 0.3)


def _place(figure: Figure, panel: Panel, theme: Theme, left_in: float, top_in: float) -> None:
    """Axes for a panel whose upper left corner is there. All sizes are absolute: text needs the room it needs."""
    width_in, height_in = figure.get_size_inches()
    bottom_in = height_in - top_in - TOP_IN - panel.height_in
    box = ((left_in + LEFT_IN) / width_in, bottom_in / height_in)
    size = ((WIDTH_IN - LEFT_IN - RIGHT_IN) / width_in, panel.height_in / height_in)
    panel.fill(figure.add_axes((*box, *size)), theme)


def _heading(figure: Figure, row: Row, top_in: float) -> None:
    width_in, height_in = figure.get_size_inches()
    at = (PADDING_IN / width_in, 1 - (top_in + 0.35) / height_in)
    title = figure.text(*at, row.title, color=LIGHT.ink, size=13, weight="bold", parse_math=False)
    title_in = title.get_window_extent().width / figure.dpi
    figure.text(at[0] + (title_in + PADDING_IN) / width_in, at[1], row.remark, color=LIGHT.soft, size=11)


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    target = BytesIO()
    figure.savefig(target, format=kind, **options)
    return target.getvalue()


def _prepare(axes: Axes, theme: Theme, timeline: Timeline, shown: Span, title: str) -> None:
    """Lanes from top to bottom with their names, and a time axis with room for labels on its right."""
    _style(axes, theme, title)
    length_ms = shown.length_ms or 1.0
    axes.set_xlim(shown.start_ms - 0.03 * length_ms, shown.end_ms + LABEL_ROOM / (1 - LABEL_ROOM) * length_ms)
    axes.set_ylim(len(timeline.lanes) - 0.35, -0.65)
    names = [shortened(lane.vm) for lane in timeline.lanes]
    axes.set_yticks(range(len(names)), names, ha="left", va="center", parse_math=False)
    axes.tick_params(axis="y", labelcolor=theme.ink, labelsize=10, pad=LEFT_IN * 72)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    unit, unit_ms = ("s", 1000) if length_ms >= 1000 else ("ms", 1)
    axes.xaxis.set_major_formatter(lambda ms, _: f"{ms / unit_ms:g}".replace("-", "\N{MINUS SIGN}"))
    axes.set_xlabel(f"{unit} from the first stop", color=theme.soft, size=9)
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)


def _style(axes: Axes, theme: Theme, title: str) -> None:
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=theme.soft, labelsize=9)
    axes.annotate(
        title,
        (0, 1),
        (-LEFT_IN * 72, TITLE_PT),
        "axes fraction",
        "offset points",
        color=theme.ink,
        weight="bold",
        size=11,
    )


def _legend(axes: Axes, theme: Theme) -> None:
    axes.legend(
        handles=[Patch(color=theme.capture, label="capture"), Patch(color=theme.pause, label="paused")],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        bbox_transform=axes.transAxes + ScaledTranslation(0, TITLE_PT / 72, axes.figure.dpi_scale_trans),
        borderaxespad=0,
        borderpad=0,
        ncols=2,
        frameon=False,
        handlelength=0.9,
        handleheight=0.9,
        handletextpad=0.5,
        columnspacing=1.4,
        labelcolor=theme.soft,
        fontsize=9,
    )


def _bar(axes: Axes, lane: int, span: Span, colour: str, height: float) -> None:
    low, high = axes.get_xlim()
    axes.barh(lane, max(span.length_ms, LEAST_WIDTH * (high - low)), height, span.start_ms, color=colour, linewidth=0)


def _write(axes: Axes, theme: Theme, lane: int, at_ms: float, text: str) -> None:
    axes.annotate(text, (at_ms, lane), (6, 0), textcoords="offset points", va="center", color=theme.ink, size=10)


def _dimension(axes: Axes, theme: Theme, span: Span) -> None:
    """A line above the lanes from the first STOP to the last, and above it its length."""
    ends_ms, line, bottom = (span.start_ms, span.end_ms), -0.8, axes.get_ylim()[0]
    axes.vlines(ends_ms, line, bottom, color=theme.soft, linewidth=0.8, linestyle=(0, (2, 2)), clip_on=False)
    axes.plot(ends_ms, (line, line), color=theme.soft, linewidth=1.4, clip_on=False)
    text = f"{duration_text(span.length_ms)} from the first stop to the last"
    axes.annotate(
        text, (span.start_ms, line), (0, 5), textcoords="offset points", color=theme.soft, size=9, annotation_clip=False
    )


def shortened(name: str) -> str:
    """A name with its middle left out where it is too long: names that differ often do so at their ends."""
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 2]}\N{HORIZONTAL ELLIPSIS}{name[-(LONGEST_NAME // 2) :]}"
