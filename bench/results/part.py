"""What a part of the results is, and its data as CSV."""

from __future__ import annotations

import csv
from collections.abc import Awaitable, Callable, Iterable, Sequence
from io import StringIO

from attrs import frozen
from matplotlib.figure import Figure

from bench.report import Row
from testbed.screen import Screen


def _all(rows: Sequence[Row]) -> Iterable[Row]:
    return rows


@frozen
class Part:
    """One table or figure.

    Attributes:
        text: what was done, in Markdown.
        measure: takes how often each figure is to be taken; returns rows with the same keys.
        table: the rows that the page shows, made of those that were measured.
        draw: a figure of these.
        once: whether there is one run, however many are asked for.
    """

    name: str
    title: str
    text: str
    measure: Callable[[int, Screen], Awaitable[Sequence[Row]]]
    table: Callable[[Sequence[Row]], Iterable[Row]] = _all
    draw: Callable[[Sequence[Row]], Figure] | None = None
    once: bool = False


def encode_rows(rows: Sequence[Row]) -> str:
    """Rows as CSV, with their keys as its header; None is empty."""
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parse_rows(text: str) -> list[Row]:
    """What `encode_rows` was given."""
    return [{name: _parse_value(value) for name, value in row.items()} for row in csv.DictReader(StringIO(text))]


def _parse_value(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
