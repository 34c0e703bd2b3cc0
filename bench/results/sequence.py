"""VNsnap's Figure 4: how far a TCP stream between two VMs has come, before, while and after they are saved."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise

import trio
from attrs import frozen
from matplotlib.figure import Figure

import qsnap
from bench.guest import VNE, Guest, running_guests, temporary_place
from bench.report import Row
from bench.results.capture import Capture, open_capture
from bench.results.drawing import Trace, draw_sequences
from bench.results.part import Part
from bench.ways import SNAPSHOT, STOP_AND_COPY_UNLIMITED, Saved
from qsnap.host.clock import steady_s
from qsnap.host.qmp import open_loop
from qsnap.model import Backing, Engine
from qsnap.rules.colouring import tap_name
from testbed.screen import Screen
from testbed.tasks import together

MEMORY_MIB = 512
KBPS = 8000
GUEST = {"rate_mb": 10, "tcp": 1, "tcp_kbps": KBPS}
BEFORE_BYTES, AFTER_BYTES = 500_000, 1_000_000  #: half a second and a second of the stream
TRACE_S = 60.0
NOTHING, STOPPED = "no snapshot", "stop and save"
ENGINES = (Engine.RECORD, Engine.PRECOPY, Engine.BACKGROUND)
SEGMENT, DOWNTIME, ACTION = "segment", "downtime", "action"


@frozen
class Pause:
    """When a VM stood still, on the clock of `qsnap.host.clock`."""

    vm: str
    start_s: float
    end_s: float


Action = Callable[[Sequence[Guest]], Awaitable[list[Pause]]]


async def do_nothing(guests: Sequence[Guest]) -> list[Pause]:
    """For comparison."""
    return []


async def stop_and_save(guests: Sequence[Guest]) -> list[Pause]:
    """All VMs are stopped at once, saved as they stand, and go on when their own files are there."""
    async with open_loop():
        saved = await together(partial(STOP_AND_COPY_UNLIMITED.save, guest) for guest in guests)
    return [_pause(guest.name, each) for guest, each in zip(guests, saved, strict=True)]


def _pause(vm: str, saved: Saved) -> Pause:
    return Pause(vm, saved.stop_s, saved.stop_s + saved.pause_ms / 1e3)


async def snapshot(engine: Engine, guests: Sequence[Guest]) -> list[Pause]:
    """A snapshot of both."""
    saved = await qsnap.snapshot(VNE, SNAPSHOT, engine=engine, place=guests[0].place)
    took = {vm.vm.name: vm.measurements for vm in saved.vms}
    return [Pause(name, each.stop_instant_s, each.resume_instant_s) for name, each in took.items()]


ACTIONS: dict[str, Action] = {
    NOTHING: do_nothing,
    STOPPED: stop_and_save,
    **{engine.value: partial(snapshot, engine) for engine in ENGINES},
}


async def trace(way: str, guests: Sequence[Guest], capture: Capture) -> Iterator[Row]:
    """What the first VM sends around an action: from event to event, nothing waits for a time to pass."""
    await capture.wait_new_bytes(BEFORE_BYTES)
    begun_s = steady_s()
    pauses = await ACTIONS[way](guests)
    ended_s = steady_s()
    await capture.wait_new_bytes(AFTER_BYTES)
    return trace_rows(way, capture, pauses, begun_s, ended_s)


def trace_rows(way: str, capture: Capture, pauses: Sequence[Pause], begun_s: float, ended_s: float) -> Iterator[Row]:
    """Segments, pauses and the action, in ms from its beginning."""

    def row(what: str, vm: str, at_s: float, end_s: float | None = None, end_bytes: int | None = None) -> Row:
        end_ms = None if end_s is None else round((end_s - begun_s) * 1e3, 2)
        at_ms = round((at_s - begun_s) * 1e3, 2)
        return {"way": way, "what": what, "vm": vm, "at_ms": at_ms, "end_ms": end_ms, "sequence": end_bytes}

    yield row(ACTION, "", begun_s, ended_s)
    for pause in pauses:
        yield row(DOWNTIME, pause.vm, pause.start_s, pause.end_s)
    for sent in capture.flows.sent:
        yield row(SEGMENT, "vm1", sent.instant_s, end_bytes=sent.end_bytes)


async def measure(runs: int, screen: Screen) -> list[Row]:
    """One trace of each way."""
    rows: list[Row] = []
    for way in ACTIONS:
        with screen.step(f"Tracing TCP: {way}"), temporary_place() as place:
            async with running_guests(place, vms=2, memory_mib=MEMORY_MIB, backing=Backing.HUGETLB, **GUEST) as guests:
                netns = place.runtime().load(VNE).netns
                with trio.fail_after(TRACE_S):
                    async with open_capture(netns, tap_name(0, 0)) as capture:
                        rows += await trace(way, guests, capture)
    return rows


def summarise(rows: Sequence[Row]) -> Iterator[Row]:
    """For each trace: how long VMs stood still, and how long the stream sent nothing new."""
    for way, group in groupby(rows, lambda row: row["way"]):
        trace = sort_trace(list(group))
        pauses = [pause["end_ms"] - pause["at_ms"] for pause in trace.pauses]
        yield {
            "way": way,
            "whole_ms": round(trace.action["end_ms"], 1),
            "longest_downtime_ms": round(max(pauses), 1) if pauses else None,
            "longest_without_new_data_ms": round(max(b["at_ms"] - a["at_ms"] for a, b in pairwise(trace.fresh)), 1),
            "segments_sent_again": len(trace.again),
        }


def sort_trace(rows: Sequence[Row]) -> Trace:
    """The rows of one trace by what they are. A segment with nothing new was sent again."""
    fresh: list[Row] = []
    again: list[Row] = []
    for row in rows:
        if row["what"] == SEGMENT:
            (again if fresh and row["sequence"] <= fresh[-1]["sequence"] else fresh).append(row)
    pauses = [row for row in rows if row["what"] == DOWNTIME]
    return Trace(fresh, again, pauses, next(row for row in rows if row["what"] == ACTION))


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for each trace."""
    return draw_sequences({way: sort_trace(list(group)) for way, group in groupby(rows, lambda row: row["way"])})


PART = Part(
    "figure4",
    "A TCP stream around a snapshot (VNsnap, Figure 4)",
    f"""\
Two guests of {MEMORY_MIB} MiB in huge pages, each sending {KBPS // 1000} Mbit/s to the other and rewriting 10 MB/s.
All segments with data that the first one sends, as they come out of its tap: the time when the kernel saw them, and
how far the stream has come with them. The trace begins {BEFORE_BYTES // 1000} kB of the stream before the snapshot
and ends {AFTER_BYTES // 1000} kB after it, so nothing in it waits for a time to pass. *Stop and save* is `stop`,
`migrate` without a bandwidth limit, a copy of the disks, `cont`, for both VMs side by side; all files are on tmpfs,
which is what it gains most from. One trace of each: 0 is when the snapshot was asked for, *whole* is until the call
has returned. With `record` each VM is stopped when its own memory has converged, otherwise both at once.""",
    measure,
    summarise,
    draw,
    once=True,
)
