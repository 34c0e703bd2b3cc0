"""Quantities as people read them: in a terminal, on a page, in a drawing."""

from __future__ import annotations

import time

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_text(size_bytes: float) -> str:
    """A size in the largest unit that leaves a whole part: `512 MiB`, `3.4 GiB`."""
    for unit in _UNITS:
        if size_bytes < 1024 or unit == _UNITS[-1]:
            break
        size_bytes /= 1024
    return f"{_three_digits(size_bytes)} {unit}"


def duration_text(duration_ms: float) -> str:
    """A duration in milliseconds, or in seconds from one second on."""
    if duration_ms < 1000:
        return f"{_three_digits(duration_ms)} ms"
    return f"{_three_digits(duration_ms / 1000)} s"


def instant_text(unix_s: float) -> str:
    """An instant in local time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def percent_text(ratio: float) -> str:
    """A ratio in percent; what is not nothing is never shown as 0 %."""
    return f"{ratio:.0%}".replace("%", " %") if ratio >= 0.01 or ratio == 0 else "< 1 %"


def count_text(count: int, thing: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _three_digits(value: float) -> str:
    """At least three significant digits where they say something: 0.25, 12.5, 812."""
    if value == int(value) or value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
