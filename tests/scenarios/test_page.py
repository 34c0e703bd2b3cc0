"""The result page: it tells what was found, draws each run, and refers to nothing outside itself."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from attrs import evolve

import qsnap
from scenarios.bittorrent.check import Outcome, check
from scenarios.chart import draw_progress
from scenarios.history import History
from scenarios.page import make_page
from scenarios.running import ENGINES, Failure, Options, Result
from tests.scenarios.histories import BAD, good_history, outcome


def make_result(history: History[Outcome]) -> Result:
    vne = qsnap.VNE("lab", (qsnap.VM("vm1", 64 << 20, kernel="/k"),))
    return Result("bittorrent", "It holds.", vne, Options(), 0.0, 1.0, history.runs, check(history))


def test_it_tells_whether_the_claim_held() -> None:
    history = good_history()
    *others, last = history.runs
    bad = make_result(History((*others, evolve(last, outcome=outcome(2, BAD)))))
    assert "bittorrent: held" in make_page(make_result(history))
    page = make_page(bad)
    assert "bittorrent: failed" in page
    assert BAD in page


def test_it_has_consoles_and_logs_of_a_failure() -> None:
    failure = Failure("tracker: `x` ended with 1", {"tracker": "a <panic>"}, {"client-1": "no route"})
    result = evolve(make_result(good_history()), findings=(), failure=failure)
    page = make_page(result)
    assert not result.held
    for text in ("tracker: `x` ended with 1", "a &lt;panic&gt;", "no route"):
        assert text in page


def test_it_refers_to_nothing_outside() -> None:
    assert not re.search(r"(?:src|href|url\()", make_page(make_result(good_history())))


def test_chart() -> None:
    svg = ElementTree.fromstring(draw_progress(good_history().runs))
    lines = [each.get("class") for each in svg.iter("polyline")]
    assert lines == ["line-uninterrupted", "line-snapshotted", "line-restored", "line-restored"]
    assert [each.get("class") for each in svg.iter("line")].count("saved") == 2
    snapshots = [each.get("x1") for each in svg.iter("line") if each.get("class") == "saved"]
    assert [each.get("cx") for each in svg.iter("circle")] == snapshots, "a restored run begins at its snapshot"


def test_the_plan_takes_all_pairs_in_the_middle() -> None:
    plan = list(Options(snapshots=6).plan())
    assert len({(engine, cut) for _, engine, cut in plan}) == 6
    assert {engine for _, engine, _ in plan[:3]} == set(ENGINES)
    assert {cut for _, _, cut in plan[:3]} == set(qsnap.Cut)
    shares = [share for share, _, _ in plan]
    assert shares == sorted(shares)
    assert 0.1 < shares[0] < shares[-1] < 0.9
    assert [share for share, _, _ in Options(snapshots=1).plan()] == [0.4]
