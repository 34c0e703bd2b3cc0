"""After DMTCP's tables of checkpoint and restart times: against the number of VMs, and against memory."""

from __future__ import annotations

from collections.abc import Sequence

import trio
from attrs import define, field, frozen
from matplotlib.figure import Figure

import qsnap
from bench.guest import VNE, running_guests, temporary_place
from bench.report import Row, median
from bench.results.drawing import Line, draw_lines
from bench.results.part import Part
from bench.ways import SNAPSHOT
from qsnap.model import RamMode, Snapshot
from testbed.screen import Screen

VMS, SMALL_MIB = (1, 2, 4, 8), 128
MEMORY_MIB = (128, 256, 512, 1024, 2048)
RATE_MB = 10
SERIES = ("save_ms", "restore_mapped_ms", "restore_copied_ms")


@frozen
class Case:
    """So many VMs, each of this memory, of which they have written three eighths."""

    vms: int
    memory_mib: int

    @property
    def dirty_mb(self) -> int:
        return self.memory_mib * 3 // 8


CASES = (*(Case(vms, SMALL_MIB) for vms in VMS), *(Case(1, memory) for memory in MEMORY_MIB if memory != SMALL_MIB))


@define
class Taken:
    """All runs of one case."""

    saved: list[Snapshot] = field(factory=list)
    save_ms: list[float] = field(factory=list)
    restore_ms: dict[RamMode, list[float]] = field(factory=lambda: {RamMode.MAP: [], RamMode.EAGER: []})

    def row(self, case: Case) -> Row:
        """One line of the table."""
        images = [sum(vm.measurements.image_bytes for vm in each.vms) / (1 << 20) for each in self.saved]
        return {
            "vms": case.vms,
            "memory_mib": case.memory_mib,
            "engine": self.saved[-1].vms[0].engine.value,
            "save_ms": median(self.save_ms),
            "longest_downtime_ms": median([max(vm.measurements.downtime_ms for vm in each.vms) for each in self.saved]),
            "image_mib": median(images),
            "restore_mapped_ms": median(self.restore_ms[RamMode.MAP]),
            "restore_copied_ms": median(self.restore_ms[RamMode.EAGER]),
        }


async def save(place: qsnap.Place, taken: Taken, runs: int) -> None:
    """Snapshots, of which the last stays."""
    for run in range(runs):
        if run:
            await qsnap.remove(VNE, SNAPSHOT, place=place)
        begun_s = trio.current_time()
        taken.saved.append(await qsnap.snapshot(VNE, SNAPSHOT, place=place))
        taken.save_ms.append((trio.current_time() - begun_s) * 1e3)


async def measure_case(case: Case, runs: int) -> Row:
    """Save the VNE while it runs, then restore it again and again."""
    taken = Taken()
    with temporary_place() as place:
        settings = {"dirty_mb": case.dirty_mb, "rate_mb": RATE_MB}
        async with running_guests(place, vms=case.vms, memory_mib=case.memory_mib, **settings):
            await save(place, taken, runs)
        for _ in range(runs):
            for mode, times_ms in taken.restore_ms.items():
                times_ms.append((await qsnap.restore(VNE, SNAPSHOT, ram=mode, place=place)).ready_ms)
                await qsnap.down(VNE, place=place)
    return taken.row(case)


async def measure(runs: int, screen: Screen) -> list[Row]:
    """All cases."""
    rows = []
    for case in CASES:
        with screen.step(f"Saving and restoring {case.vms} VMs of {case.memory_mib} MiB"):
            rows.append(await measure_case(case, runs))
    return rows


def draw(rows: Sequence[Row]) -> Figure:
    """Against the number of VMs, and against memory."""
    by_vms = [row for row in rows if row["memory_mib"] == SMALL_MIB]
    by_memory = [row for row in rows if row["vms"] == 1]
    return draw_lines(
        {
            f"VMs of {SMALL_MIB} MiB": _lines(by_vms, "vms"),
            "one VM, memory in MiB": _lines(by_memory, "memory_mib"),
        }
    )


def _lines(rows: Sequence[Row], over: str) -> list[Line]:
    return [
        Line(name.removesuffix("_ms").replace("_", ", "), [row[over] for row in rows], [row[name] for row in rows])
        for name in SERIES
    ]


PART = Part(
    "scaling",
    "Save and restore against the number of VMs and their memory (after DMTCP, Tables I to VIII)",
    """\
Guests on one network, each with a disk and a tap, which have written three eighths of their memory and rewrite 10
MB/s of it, in 4 KiB pages and with the engine that qsnap takes by itself. *Save* is the whole call of
`qsnap.snapshot`, until the manifest is stored: while most of it, the VMs run. *Restore* is the whole call of
`qsnap.restore`, until all VMs run, with memory mapped from the snapshot (the default) or copied from it first. All
files are on tmpfs: no disk is measured. Sixteen VMs are left out: to start them, emulated on two
processors, and save them three times had not ended after four minutes. The load before is still theirs: it falls
slowly.""",
    measure,
    draw=draw,
)
