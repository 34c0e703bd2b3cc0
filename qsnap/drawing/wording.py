"""What a report says in words: tables, figures, and texts for those who do not see the pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from qsnap.drawing.timeline import Timeline
from qsnap.model import Snapshot, version_text
from qsnap.rules.figures import discrepancy_ms, longest_downtime_ms, stored_bytes
from qsnap.units import count_text, duration_text, instant_text, percent_text, size_text

NOTHING = "-"


@frozen
class Column:
    """A column of a table, and what stands in it for an item."""

    title: str
    text: Callable[[Any], str]
    numeric: bool = True


VM_COLUMNS = (
    Column("VM", lambda vm: vm.vm.name, numeric=False),
    Column("Engine", lambda vm: vm.engine.value, numeric=False),
    Column("Accelerator", lambda vm: vm.accelerator.value, numeric=False),
    Column("QEMU", lambda vm: version_text(vm.qemu_version), numeric=False),
    Column("Downtime", lambda vm: _duration(vm.measurements.downtime_ms if vm.was_running else None)),
    Column("Total", lambda vm: duration_text(vm.measurements.total_ms)),
    Column("Iterations", lambda vm: f"{vm.measurements.iterations:,}"),
    Column("Last pages", lambda vm: f"{vm.measurements.last_iteration_pages:,}"),
    Column("Image", lambda vm: size_text(vm.measurements.image_bytes)),
    Column("Of memory", lambda vm: percent_text(vm.measurements.image_to_memory)),
)

SNAPSHOT_COLUMNS = (
    Column("Snapshot", lambda snapshot: snapshot.name, numeric=False),
    Column("Created", lambda snapshot: instant_text(snapshot.created_s), numeric=False),
    Column("Cut", lambda snapshot: snapshot.cut.value, numeric=False),
    Column("Longest downtime", lambda snapshot: _duration(longest_downtime_ms(snapshot))),
    Column("Discrepancy", lambda snapshot: _duration(discrepancy_ms(snapshot))),
    Column("VMs", lambda snapshot: str(len(snapshot.vms))),
    Column("Stored", lambda snapshot: size_text(stored_bytes(snapshot))),
)


def summary_text(snapshot: Snapshot) -> str:
    """When and how it was taken."""
    return f"{instant_text(snapshot.created_s)}, {count_text(len(snapshot.vms), 'VM')}, cut: {snapshot.cut.value}"


def facts(snapshot: Snapshot) -> dict[str, str]:
    """The figures to be seen first."""
    return {
        "Longest downtime": _duration(longest_downtime_ms(snapshot)),
        "Discrepancy": _duration(discrepancy_ms(snapshot)),
        "Longest capture": _duration(max((vm.measurements.total_ms for vm in snapshot.vms), default=None)),
        "Stored": size_text(stored_bytes(snapshot)),
    }


def whole_text(timeline: Timeline) -> str:
    """What the picture of the whole capture shows."""
    lanes = (f"{lane.vm} {duration_text(lane.capture.length_ms)}" for lane in timeline.lanes if lane.capture)
    return f"Whole capture, from its start to the last byte: {', '.join(lanes) or 'not recorded'}."


def cut_text(timeline: Timeline) -> str:
    """What the picture of the cut shows."""
    lanes = (
        f"{lane.vm} paused for {duration_text(lane.pause.length_ms)}, {duration_text(lane.pause.start_ms)} after it"
        for lane in timeline.lanes
        if lane.pause
    )
    return f"Around the cut, from the first stop on: {'; '.join(lanes) or 'no VM was running'}."


def downtimes_text(snapshots: Sequence[Snapshot]) -> str:
    """What the picture of the downtimes shows."""
    return _course_text("Longest downtime", snapshots, longest_downtime_ms)


def discrepancies_text(snapshots: Sequence[Snapshot]) -> str:
    """What the picture of the discrepancies shows."""
    return _course_text("Discrepancy", snapshots, discrepancy_ms)


def _course_text(what: str, snapshots: Sequence[Snapshot], figure: Callable[[Snapshot], float | None]) -> str:
    return f"{what} of each snapshot: {', '.join(f'{each.name} {_duration(figure(each))}' for each in snapshots)}."


def _duration(duration_ms: float | None) -> str:
    return NOTHING if duration_ms is None else duration_text(duration_ms)
