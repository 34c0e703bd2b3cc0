"""The layout of a snapshot's timeline: values -> values."""

from __future__ import annotations

import pytest
from attrs import evolve
from hypothesis import given

from qsnap.drawing.timeline import (
    MOST_MS,
    Lane,
    Point,
    Span,
    plan_discrepancies,
    plan_downtimes,
    plan_timeline,
)
from qsnap.model import Measurements, Snapshot
from tests.samples import MEASUREMENTS, snapshot_of, snapshots


def cost(start_s: float, stop_s: float, resume_s: float, total_ms: float) -> Measurements:
    return evolve(
        MEASUREMENTS,
        start_instant_s=1700000000 + start_s if start_s else 0.0,
        stop_instant_s=1700000000 + stop_s,
        resume_instant_s=1700000000 + resume_s,
        downtime_ms=(resume_s - stop_s) * 1e3,
        total_ms=total_ms,
    )


TWO = snapshot_of(("alice", cost(1.0, 2.0, 2.25, 3000.0)), ("bob", cost(1.5, 2.5, 2.75, 1500.0)))


def test_times_count_from_the_first_stop() -> None:
    plan = plan_timeline(TWO)
    assert plan.lanes == (
        Lane("alice", Span(-1000.0, 2000.0), Span(0.0, 250.0)),
        Lane("bob", Span(-500.0, 1000.0), Span(500.0, 750.0)),
    )
    assert plan.whole == Span(-1000.0, 2000.0)
    assert plan.cut == Span(0.0, 750.0)
    assert plan.discrepancy == Span(0.0, 500.0)
    assert plan.discrepancy.length_ms == TWO.discrepancy_ms


def test_the_order_of_the_vms_is_kept_whoever_stopped_first() -> None:
    assert [lane.vm for lane in plan_timeline(evolve(TWO, vms=TWO.vms[::-1])).lanes] == ["bob", "alice"]


def test_one_vm_has_no_discrepancy() -> None:
    plan = plan_timeline(snapshot_of(("alice", cost(1.0, 2.0, 2.25, 3000.0))))
    assert plan.discrepancy is None
    assert plan.cut == Span(0.0, 250.0)


def test_without_a_start_the_pause_is_known_all_the_same() -> None:
    plan = plan_timeline(snapshot_of(("alice", cost(0.0, 2.0, 2.25, 3000.0))))
    assert plan.lanes == (Lane("alice", None, Span(0.0, 250.0)),)


def test_a_vm_that_was_paused_all_along_has_no_pause() -> None:
    paused = tuple(evolve(vm, was_running=False) for vm in TWO.vms)
    one, none = plan_timeline(evolve(TWO, vms=(TWO.vms[0], paused[1]))), plan_timeline(evolve(TWO, vms=paused))
    assert [lane.pause for lane in one.lanes] == [Span(0.0, 250.0), None]
    assert (none.cut, none.discrepancy) == (None, None)
    assert none.whole == Span(0.0, 3000.0), "where nobody stopped, times count from the first start"


@pytest.mark.parametrize("wrong", [cost(1.0, 2.0, 1.9, 3000.0), cost(1.0, 2.0, 1e9, 3000.0), cost(1.0, 2.0, 2.0, -1.0)])
def test_what_cannot_be_is_left_out(wrong: Measurements) -> None:
    lane = plan_timeline(snapshot_of(("alice", wrong))).lanes[0]
    assert None in (lane.capture, lane.pause)


@given(snapshots())
def test_whatever_a_manifest_says_spans_can_be_drawn(saved: Snapshot) -> None:
    for lane in plan_timeline(saved).lanes:
        for span in filter(None, (lane.capture, lane.pause)):
            assert -MOST_MS < span.start_ms <= span.end_ms < MOST_MS


def test_downtimes_over_time() -> None:
    later = evolve(TWO, name="s2", created_s=1700000100.0, vms=(evolve(TWO.vms[0], was_running=False), TWO.vms[1]))
    downtimes = plan_downtimes([TWO, later])
    assert len(downtimes.dots) == 3
    assert downtimes.line == (Point(1700000000.5, 250.0), Point(1700000100.0, 250.0))
    assert plan_discrepancies([TWO, later]).line == (Point(1700000000.5, 500.0),)
