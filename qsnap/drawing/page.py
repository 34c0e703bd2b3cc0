"""The page of a report: HTML in one file, its pictures inside it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from attrs import frozen
from jinja2 import Environment, PackageLoader

from qsnap.drawing import charts, wording
from qsnap.drawing.timeline import plan_timeline
from qsnap.model import Snapshot
from qsnap.rules.figures import reasons

_templates = Environment(loader=PackageLoader("qsnap.drawing", "."), autoescape=True, trim_blocks=True)


@frozen
class Picture:
    """A panel as data URIs, for either colour scheme of a screen, and in words."""

    light: str
    dark: str
    text: str


def make_page(snapshots: Sequence[Snapshot]) -> str:
    """The page of these snapshots of one VNE. Nothing in it refers to anything outside it."""
    return _templates.get_template("page.html").render(
        title=f"Snapshots of {snapshots[0].vne.name}",
        light=charts.LIGHT,
        dark=charts.DARK,
        overview=_overview(snapshots) if len(snapshots) > 1 else (),
        sections=[_section(each) for each in snapshots],
        snapshot_columns=wording.SNAPSHOT_COLUMNS,
        vm_columns=wording.VM_COLUMNS,
    )


def _overview(snapshots: Sequence[Snapshot]) -> tuple[Picture, ...]:
    return (
        _picture(charts.downtime_panel(snapshots), wording.downtimes_text(snapshots)),
        _picture(charts.discrepancy_panel(snapshots), wording.discrepancies_text(snapshots)),
    )


def _section(snapshot: Snapshot) -> dict[str, Any]:
    timeline = plan_timeline(snapshot)
    return {
        "snapshot": snapshot,
        "summary": wording.summary_text(snapshot),
        "facts": wording.facts(snapshot),
        "pictures": (
            _picture(charts.whole_panel(timeline), wording.whole_text(timeline)),
            _picture(charts.cut_panel(timeline), wording.cut_text(timeline)),
        ),
        "reasons": reasons(snapshot),
    }


def _picture(panel: charts.Panel, text: str) -> Picture:
    light, dark = (_data_uri(charts.draw_svg(panel, theme)) for theme in (charts.LIGHT, charts.DARK))
    return Picture(light, dark, text)


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
