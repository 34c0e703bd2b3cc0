"""When what happened in a snapshot, laid out to be drawn: values -> values.

All times are in ms from the first STOP, which is 0: in the whole capture and around the cut alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import frozen

from qsnap.model import Snapshot, VMSnapshot
from qsnap.rules.figures import discrepancy_ms, longest_downtime_ms

MOST_MS = 7 * 86_400e3  #: a week; what a manifest claims to be longer, or further away, is not drawn


@frozen
class Span:
    """From `start_ms` to `end_ms`."""

    start_ms: float
    end_ms: float

    @property
    def length_ms(self) -> float:
        return self.end_ms - self.start_ms


@frozen
class Lane:
    """One VM: its capture from start to last byte, and its pause from STOP to RESUME. Either may not be known."""

    vm: str
    capture: Span | None
    pause: Span | None


@frozen
class Timeline:
    """The lanes of a snapshot, in the order of its VMs."""

    lanes: tuple[Lane, ...]

    @property
    def whole(self) -> Span | None:
        """All that is known, or nothing."""
        return _around([span for lane in self.lanes for span in (lane.capture, lane.pause) if span])

    @property
    def cut(self) -> Span | None:
        """From the first STOP to the last RESUME; nothing if no VM was stopped."""
        return _around([lane.pause for lane in self.lanes if lane.pause])

    @property
    def discrepancy(self) -> Span | None:
        """From the first STOP to the last; nothing if there are no two."""
        stops = [lane.pause.start_ms for lane in self.lanes if lane.pause]
        return Span(min(stops), max(stops)) if len(stops) > 1 else None


def plan_timeline(snapshot: Snapshot) -> Timeline:
    """Lay out a snapshot. What it does not record, or what cannot be, is left out."""
    stops = [vm.measurements.stop_instant_s for vm in snapshot.vms if vm.was_running]
    zero_s = min(stops or [vm.measurements.start_instant_s for vm in snapshot.vms], default=0.0)
    return Timeline(tuple(_lane(vm, zero_s) for vm in snapshot.vms))


@frozen
class Point:
    """A duration, and the Unix time of the snapshot it belongs to."""

    instant_s: float
    duration_ms: float


@frozen
class Course:
    """Durations over time: all of them as dots, one for each snapshot on a line."""

    dots: tuple[Point, ...]
    line: tuple[Point, ...]


def plan_downtimes(snapshots: Sequence[Snapshot]) -> Course:
    """The downtime of every VM; on the line the longest of each snapshot."""
    each_vm = [(each, vm.measurements.downtime_ms) for each in snapshots for vm in each.vms if vm.was_running]
    return Course(_points(each_vm), _points((each, longest_downtime_ms(each)) for each in snapshots))


def plan_discrepancies(snapshots: Sequence[Snapshot]) -> Course:
    """The discrepancy of each snapshot of several VMs."""
    points = _points((each, discrepancy_ms(each)) for each in snapshots)
    return Course(points, points)


def _points(durations: Iterable[tuple[Snapshot, float | None]]) -> tuple[Point, ...]:
    return tuple(Point(each.created_s, ms) for each, ms in durations if ms is not None and 0 <= ms < MOST_MS)


def _lane(vm: VMSnapshot, zero_s: float) -> Lane:
    cost = vm.measurements
    start_ms = (cost.start_instant_s - zero_s) * 1e3
    capture = _span(start_ms, start_ms + cost.total_ms) if cost.start_instant_s else None
    pause = _span((cost.stop_instant_s - zero_s) * 1e3, (cost.resume_instant_s - zero_s) * 1e3)
    return Lane(vm.vm.name, capture, pause if vm.was_running else None)


def _span(start_ms: float, end_ms: float) -> Span | None:
    return Span(start_ms, end_ms) if -MOST_MS < start_ms <= end_ms < MOST_MS else None


def _around(spans: list[Span]) -> Span | None:
    if not spans:
        return None
    return Span(min(span.start_ms for span in spans), max(span.end_ms for span in spans))
