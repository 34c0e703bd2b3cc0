"""The results: parsing of TCP headers, medians, figures, and the page, without VMs."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from matplotlib.figure import Figure

from bench.report import Row
from bench.results.__main__ import PARTS
from bench.results.breakdown import PART as BREAKDOWN
from bench.results.breakdown import Spent, longest_gap_ms, vm_row
from bench.results.capture import Capture, Flow, Flows, Segment, distance, parse_segment
from bench.results.drawing import svg
from bench.results.engines import Cost, cost_row
from bench.results.page import UNMEASURED, Data, assemble, with_unit
from bench.results.part import Part, encode_rows, parse_rows
from bench.results.scaling import PART as SCALING
from bench.results.sequence import PART as SEQUENCE
from bench.results.sequence import Pause, summarise, trace_rows
from qsnap.model import Engine
from testbed.screen import Screen

FLOW = Flow(b"\x0a\0\0\1", 5000, b"\x0a\0\0\2", 6000)


def make_frame(sequence: int, data_bytes: int, *, options: bytes = b"", kind: int = 0x0800, protocol: int = 6) -> bytes:
    """The headers of a frame with so much data, which is not in it."""
    tcp = struct.pack(">HHIIBBHHH", 5000, 6000, sequence, 0, (20 + len(options)) // 4 << 4, 0x10, 100, 0, 0) + options
    total_bytes = 20 + len(tcp) + data_bytes
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, total_bytes, 0, 0x4000, 64, protocol, 0, FLOW.source, FLOW.target)
    return bytes(12) + kind.to_bytes(2, "big") + ip + tcp


def test_a_segment_is_what_its_headers_say() -> None:
    assert parse_segment(make_frame(77, 1448, options=bytes(12))) == Segment(FLOW, 77, 1448)
    assert parse_segment(make_frame(77, 0)) == Segment(FLOW, 77, 0)
    assert parse_segment(make_frame(77, 5) + b"hello") == Segment(FLOW, 77, 5)


def test_other_frames_are_none() -> None:
    whole = bytearray(make_frame(77, 100))
    assert parse_segment(make_frame(77, 100, kind=0x86DD)) is None
    assert parse_segment(make_frame(77, 100, protocol=17)) is None
    assert all(parse_segment(bytes(whole[:size])) is None for size in range(len(whole)))
    later_fragment = whole.copy()
    later_fragment[21] = 1
    assert parse_segment(bytes(later_fragment)) is None
    too_short = whole.copy()
    too_short[16:18] = (30).to_bytes(2, "big")
    assert parse_segment(bytes(too_short)) is None


def test_sequence_numbers_wrap() -> None:
    assert distance(5, 0xFFFFFFFB) == 10
    assert distance(0xFFFFFFFB, 5) == -10


def test_what_is_sent_again_is_not_new() -> None:
    flows = Flows()
    for instant_s, sequence, size in ((1.0, 0xFFFFFF00, 256), (1.1, 0, 100), (1.2, 0xFFFFFF00, 256), (1.3, 100, 50)):
        flows.add(instant_s, Segment(FLOW, sequence, size))
    flows.add(1.4, Segment(FLOW, 150, 0))
    assert [sent.end_bytes for sent in flows.sent] == [256, 356, 256, 406]
    assert flows.new_bytes == 406


def traced() -> list[Row]:
    capture = Capture()
    for instant_s, sequence in ((10.0, 0), (10.1, 100), (10.6, 100), (10.7, 200), (10.8, 300)):
        capture.flows.add(instant_s, Segment(FLOW, sequence, 100))
    return list(trace_rows("precopy", capture, [Pause("vm1", 10.2, 10.25), Pause("vm2", 10.2, 10.3)], 10.15, 10.65))


def test_a_trace_in_figures() -> None:
    (row,) = summarise(parse_rows(encode_rows(traced())))
    assert row == {
        "way": "precopy",
        "whole_ms": 500.0,
        "longest_downtime_ms": 100.0,
        "longest_without_new_data_ms": 600.0,
        "segments_sent_again": 1,
    }


def test_the_longest_gap_is_one_of_the_window() -> None:
    assert longest_gap_ms([1.0, 5.0, 5.5, 7.0, 20.0], 4.0, 8.0) == pytest.approx(1500)
    assert longest_gap_ms([], 4.0, 8.0) == pytest.approx(4000)
    assert longest_gap_ms([5.0], 4.0, 8.0) == pytest.approx(3000)


def test_backoff_is_the_stall_beyond_the_downtime() -> None:
    spent = [Spent(300, 10, 60, 5), Spent(200, 20, 15, 7), Spent(400, 30, 100, 6)]
    row = vm_row(2, "vm1", Engine.BACKGROUND, spent)
    assert (row["uptime_ms"], row["downtime_ms"], row["tcp_backoff_ms"]) == (290, 20, 50)
    assert row["stall_without_snapshot_ms"] == 6


def test_what_is_not_told_has_no_median() -> None:
    case = {"guest": "idle"}
    row = cost_row(case, "snapshot-save", [Cost(100, 90, 1 << 20), Cost(300, 80, 2 << 20)])
    assert (row["duration_ms"], row["downtime_ms"], row["size_mib"], row["iterations"]) == (200, 85, 1.5, None)
    assert cost_row(case, "record", [], gave_up=3)["duration_ms"] is None


def test_rows_come_back_from_csv() -> None:
    rows = [{"name": "a,b", "count": 3, "share": 0.25, "missing": None}]
    assert parse_rows(encode_rows(rows)) == rows


async def nothing(runs: int, screen: Screen) -> Sequence[Row]:
    return []


MEASURED = {
    "date": "2026-01-02",
    "runs": 3,
    "cpu": "a processor",
    "cores": 2,
    "memory_gib": 4,
    "kernel": "6.1",
    "qemu": "11.1.3",
    "accelerator": "TCG",
    "load": 0.5,
}


def test_the_page_has_what_was_measured_and_names_what_was_not() -> None:
    parts = (
        Part("one", "The first", "What was done.", nothing, draw=lambda rows: Figure()),
        Part("two", "The second", "Nothing yet.", nothing),
    )
    page = assemble(parts, {"one": Data([{"vms": 2, "save_ms": 1234.5, "how": None}], MEASURED)})
    first, second = page.split("## The second")
    assert "| VMs | save, ms | how |" in first
    assert "| 2 | 1234 |  |" in first
    assert "![The first](results/one.svg)" in first
    assert "QEMU 11.1.3, TCG; load before: 0.5" in first
    assert UNMEASURED in second
    assert UNMEASURED not in first
    assert "Nothing yet." not in second


def test_units_are_in_the_head() -> None:
    names = ("a_ms", "tcp_b_mib", "c_s", "d_percent", "vms_e", "s")
    assert list(map(with_unit, names)) == ["a, ms", "TCP b, MiB", "c, s", "d, %", "VMs e", "s"]


SCALED = [
    {"vms": vms, "memory_mib": memory, "save_ms": 1.5, "restore_mapped_ms": 2, "restore_copied_ms": 3}
    for vms, memory in ((1, 128), (2, 128), (1, 256))
]
SPENT = [vm_row(2, f"vm{number}", Engine.BACKGROUND, [Spent(300, 10, 60, 5)]) for number in (1, 2)]


@pytest.mark.parametrize(("part", "rows"), [(SEQUENCE, traced()), (SCALING, SCALED), (BREAKDOWN, SPENT)])
def test_figures_are_drawn_of_what_csv_has(part: Part, rows: Sequence[Row]) -> None:
    assert part.draw is not None
    drawn, again = (svg(part.draw(parse_rows(encode_rows(rows)))) for _ in range(2))
    assert b"<svg" in drawn
    assert drawn == again  # or each run would change all figures
    assert len(drawn) > 5000


def test_parts_have_names_of_their_own() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
