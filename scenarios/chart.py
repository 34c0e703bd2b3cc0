"""How far the work had come at each time, as lines of an SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from scenarios.history import Run, Way

WIDTH, HEIGHT = 960, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 16, 32
TICKS = 8


def draw_progress(runs: Sequence[Run[Any]]) -> str:
    """The SVG: a line for each run, a dashed one upright for each snapshot.

    A restored run begins where and when its snapshot was taken, so that it can be held against the run it goes on with.
    Colours are classes, `line-WAY`, which the page has for light and dark.
    """
    longest_s = max((_begin_s(runs, run) + run.samples[-1].at_s for run in runs), default=1.0) or 1.0
    step_s = _step(longest_s)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(describe_progress(runs))}">',
        *(_level(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
        *(_time(second, longest_s) for second in range(0, int(longest_s) + 1, step_s)),
        *(part for run in runs for part in _snapshots(run, longest_s)),
        *(_line(run, _begin_s(runs, run), longest_s) for run in runs),
        "</svg>",
    ]
    return "\n".join(parts)


def describe_progress(runs: Sequence[Run[Any]]) -> str:
    """The same in words."""
    return "; ".join(f"{run.title}: done after {run.samples[-1].at_s:.0f} s" for run in runs)


def _begin_s(runs: Sequence[Run[Any]], run: Run[Any]) -> float:
    for other in runs:
        for saved in other.saved:
            if saved.name == run.origin:
                return saved.before.at_s
    return 0.0


def _step(longest_s: float) -> int:
    rough = max(longest_s / TICKS, 1.0)
    unit = 10 ** math.floor(math.log10(rough))
    return int(next(unit * each for each in (1, 2, 5, 10) if unit * each >= rough))


def _x(at_s: float, longest_s: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * at_s / longest_s


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _level(share: float) -> str:
    y = _y(share)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>'
    )


def _time(second: int, longest_s: float) -> str:
    return f'<text x="{_x(second, longest_s):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{second} s</text>'


def _snapshots(run: Run[Any], longest_s: float) -> Iterator[str]:
    for each in run.saved:
        x = _x(each.before.at_s, longest_s)
        yield (
            f'<line class="saved" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            f"<title>{escape(each.name)}</title></line>"
        )


def _line(run: Run[Any], begin_s: float, longest_s: float) -> str:
    points = " ".join(f"{_x(begin_s + each.at_s, longest_s):.1f},{_y(each.mean):.1f}" for each in run.samples)
    dots = ""
    if run.way is Way.RESTORED:
        x, y = points.split(" ", 1)[0].split(",")
        dots = f'<circle class="line-{run.way.value}" cx="{x}" cy="{y}" r="4"/>'
    line = f'<polyline class="line-{run.way.value}" fill="none" points="{points}">'
    return f"{line}<title>{escape(run.title)}</title></polyline>{dots}"
