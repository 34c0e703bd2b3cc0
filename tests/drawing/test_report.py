"""What is drawn: pictures that are not blank, a page that needs nothing else and trusts no text."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from attrs import asdict, evolve
from hypothesis import given, settings
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from qsnap.drawing import charts
from qsnap.drawing.page import make_page
from qsnap.drawing.timeline import Timeline, plan_timeline
from qsnap.model import Snapshot
from tests.drawing.test_timeline import TWO, cost
from tests.samples import snapshot_of, snapshots

LATER = evolve(TWO, name="s2", created_s=TWO.created_s + 60)
SEVERAL = (TWO, LATER)
EVIL = '<script>alert("1")</script><img src=//evil.example/x>\'"&{{ 7*7 }}$x^2$'
VOID = frozenset({"meta", "link", "img", "source", "br"})


class Page(HTMLParser):
    """A page read strictly: every tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def foreign(text: str) -> list[str]:
    """What a page would fetch from elsewhere, or run."""
    page = Page(text)
    links = [each[name] for _, each in page.found for name in ("src", "srcset", "href", "action") if name in each]
    own = [link for link in links if link.startswith(("data:image/svg+xml;base64,", "#"))]
    code = [tag for tag, each in page.found if tag in ("script", "link", "iframe") or any(n[:2] == "on" for n in each)]
    return [link for link in links if link not in own] + code + re.findall(r"https?://|url\(|@import", text)


def svgs(page: Page) -> list[ElementTree.Element]:
    uris = [each["src"] for each in page.all("img")] + [each["srcset"] for each in page.all("source")]
    return [ElementTree.fromstring(base64.b64decode(uri.partition(",")[2])) for uri in uris]


def test_the_page_needs_nothing_else() -> None:
    text = make_page(SEVERAL)
    assert foreign(text) == []
    assert foreign(text.replace("<h1>", '<h1><img src="//elsewhere/x.png">')) == ["//elsewhere/x.png"]
    assert foreign(text.replace("<h1>", "<h1><script></script>")) == ["script"]
    assert foreign(text.replace("<h1>", "<h1>http://elsewhere")) == ["http://"]


def test_the_page_for_those_who_do_not_see_it() -> None:
    page = Page(make_page(SEVERAL))
    assert page.all("html") == [{"lang": "en"}]
    assert page.texts.count("Snapshots of lab") == 2  # title and heading
    alternatives = [each["alt"] for each in page.all("img")]
    assert len(alternatives) == len(page.all("source")) == 2 + 2 * 2
    assert alternatives[0] == "Longest downtime of each snapshot: s1 250 ms, s2 250 ms."
    assert "Whole capture, from its start to the last byte: alice 3 s, bob 1.50 s." in alternatives
    assert any("bob paused for 250 ms, 500 ms after it" in each for each in alternatives)


def test_the_tables_have_all_figures() -> None:
    page = Page(make_page([TWO]))
    vm, figures = (
        TWO.vms[0],
        ["Longest downtime", "250 ms", "Discrepancy", "500 ms", "Longest capture", "3 s", "Stored"],
    )
    told = [text for text in page.texts if text]
    start = told.index(figures[0])
    assert told[start : start + len(figures)] == figures
    row = told.index("Of memory") + 1
    assert told[row : row + 10] == [
        "alice",
        "background",
        "tcg",
        "7.2.22",
        "250 ms",
        "3 s",
        "2",
        "1,234",
        "8 KiB",
        "< 1 %",
    ]
    assert f"Engine background: {vm.reason}." in told
    assert len(page.all("section")) == 1, "a single snapshot has no overview"
    assert {"href": "#s2"} in Page(make_page(SEVERAL)).all("a")


def test_no_text_is_trusted() -> None:
    vms = tuple(evolve(vm, reason=EVIL, vm=evolve(vm.vm, name=EVIL)) for vm in TWO.vms)
    hostile = evolve(TWO, name=EVIL, vne=evolve(TWO.vne, name=EVIL), vms=vms)
    text = make_page([hostile, LATER])
    assert [each for each in foreign(text) if not each.startswith("#")] == []
    assert {tag for tag, _ in Page(text).found} == {tag for tag, _ in Page(make_page(SEVERAL)).found}
    assert f"Engine background: {EVIL}." in Page(text).texts
    assert charts.draw_png([hostile, LATER])
    for svg in svgs(Page(text)):
        assert not [each for each in svg.iter() if each.tag.endswith(("script", "image", "foreignObject"))]


Pixels = np.ndarray[Any, Any]


def pixels(png: bytes) -> Pixels:
    """Red, green and blue of every pixel."""
    found: Pixels = np.rint(imread(BytesIO(png))[:, :, :3] * 255)
    return found


def share(image: Pixels, colour: str) -> float:
    """How much of a picture is exactly of that colour."""
    return float((image == [int(colour[at : at + 2], 16) for at in (1, 3, 5)]).all(axis=2).mean())


def test_the_picture_shows_captures_and_pauses() -> None:
    one, several = pixels(charts.draw_png([TWO])), pixels(charts.draw_png(SEVERAL))
    width = round((2 * charts.WIDTH_IN + 3 * charts.PADDING_IN) * charts.DOTS_PER_INCH)
    assert one.shape[1] == several.shape[1] == width
    assert several.shape[0] > 2 * one.shape[0]
    assert share(one, charts.PAPER) > 0.5
    assert share(one, charts.LIGHT.capture) > 0.01
    assert share(one, charts.LIGHT.pause) > 0.01
    vms = (evolve(vm, was_running=False, measurements=evolve(vm.measurements, start_instant_s=0.0)) for vm in TWO.vms)
    nothing = pixels(charts.draw_png([evolve(TWO, vms=tuple(vms))]))
    assert nothing.shape == one.shape
    for colour in (charts.LIGHT.capture, charts.LIGHT.pause):
        assert share(nothing, colour) < 0.002, "only the legend has it"


def test_more_than_a_picture_can_hold_is_drawn_smaller() -> None:
    assert charts.dots_per_inch(20.0) == charts.DOTS_PER_INCH
    assert charts.dots_per_inch(2000.0) * 2000.0 == charts.MOST_DOTS


HOUR_S = 3600.0


@pytest.mark.parametrize("apart_s", [0.0, 1e-3, 30.0, HOUR_S, 70 * HOUR_S, 100 * HOUR_S, 1000 * HOUR_S, 9e10])
def test_any_time_between_snapshots_has_an_axis(apart_s: float) -> None:
    both = (TWO, evolve(TWO, created_s=TWO.created_s + apart_s))
    assert charts.draw_svg(charts.downtime_panel(both), charts.LIGHT)


@pytest.mark.parametrize("panel_of", [charts.whole_panel, charts.cut_panel])
def test_no_pause_is_too_short_to_be_seen(panel_of: Callable[[Timeline], charts.Panel]) -> None:
    brief = cost(1.0, 2.0, 2.0005, 30000.0)
    axes = Figure((charts.WIDTH_IN, 2.0)).add_axes((0.1, 0.1, 0.8, 0.8))
    panel_of(plan_timeline(snapshot_of(("alice", brief), ("bob", cost(1.0, 3.0, 4.0, 30000.0))))).fill(
        axes, charts.LIGHT
    )
    pauses = [bar for bar in axes.patches if to_hex(bar.get_facecolor()) == charts.LIGHT.pause]
    assert len(pauses) == 2
    assert min(bar.get_window_extent().width for bar in pauses) >= 2.0


def test_both_schemes_of_a_screen_are_the_same_drawing() -> None:
    panel = charts.cut_panel(plan_timeline(TWO))
    light, dark = (charts.draw_svg(panel, theme).decode() for theme in (charts.LIGHT, charts.DARK))
    assert charts.LIGHT.pause in light
    assert charts.LIGHT.pause not in dark
    for ours, theirs in zip(vars_of(charts.LIGHT), vars_of(charts.DARK), strict=True):
        light = light.replace(ours, theirs)
    assert without_ids(light) == without_ids(dark)


def vars_of(theme: charts.Theme) -> tuple[str, ...]:
    return tuple(asdict(theme).values())


def without_ids(svg: str) -> str:
    return re.sub(r"[pm][0-9a-f]{10}", "", svg)


def test_long_names_keep_both_ends() -> None:
    assert charts.shortened("alice") == "alice"
    one, other = (charts.shortened(f"frontend-of-the-shop-{number:02}") for number in (1, 2))
    assert one != other
    assert len(one) == charts.LONGEST_NAME


@settings(max_examples=6)
@given(snapshots(), snapshots())
def test_whatever_a_manifest_says_can_be_drawn(one: Snapshot, other: Snapshot) -> None:
    assert pixels(charts.draw_png([one, evolve(other, name=f"{one.name}-2")])).size
