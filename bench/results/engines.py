"""VNsnap's Table 1: what saving one VM takes by each engine, and by QEMU's `snapshot-save`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from attrs import frozen

import qsnap
from bench.guest import VNE, Guest, running_guests, temporary_place
from bench.report import Row, median
from bench.results.part import Part
from bench.ways import SNAPSHOT, SNAPSHOT_SAVE, vmstate_path
from qsnap.errors import HostError
from qsnap.model import Backing, Engine
from testbed.screen import Screen

MEMORY_MIB = 512
ENGINES = (Engine.RECORD, Engine.PRECOPY, Engine.BACKGROUND)
GUESTS = {"idle": {"rate_mb": 0, "work": 0}, "busy": {"rate_mb": 1000, "work": 1}}
BLOCK_BYTES = 512  #: of st_blocks


@frozen
class Cost:
    """What one snapshot took. Without `iterations` and `last_pages`: they are not told."""

    duration_ms: float
    downtime_ms: float
    size_bytes: int
    iterations: int | None = None
    last_pages: int | None = None


async def save_by_engine(engine: Engine, guest: Guest) -> Cost:
    """A snapshot of the VNE, which is this guest; it is removed again."""
    (vm,) = (await qsnap.snapshot(VNE, SNAPSHOT, engine=engine, place=guest.place)).vms
    await qsnap.remove(VNE, SNAPSHOT, place=guest.place)
    took = vm.measurements
    return Cost(took.total_ms, took.downtime_ms, took.image_bytes, took.iterations, took.last_iteration_pages)


async def save_by_qemu(guest: Guest) -> Cost:
    """QEMU's own snapshot, which is removed again."""
    saved = await SNAPSHOT_SAVE.save(guest)
    size_bytes = vmstate_path(guest).stat().st_blocks * BLOCK_BYTES
    await SNAPSHOT_SAVE.tidy(guest)
    return Cost(saved.total_ms, saved.pause_ms, size_bytes)


WAYS: dict[str, Callable[[Guest], Awaitable[Cost]]] = {
    **{engine.value: partial(save_by_engine, engine) for engine in ENGINES},
    SNAPSHOT_SAVE.name: save_by_qemu,
}


def cost_row(case: Row, way: str, costs: Sequence[Cost], gave_up: int = 0) -> Row:
    """The medians of what there is."""

    def middle(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return median(known) if known else None

    return {
        **case,
        "engine": way,
        "duration_ms": middle([cost.duration_ms for cost in costs]),
        "downtime_ms": middle([cost.downtime_ms for cost in costs]),
        "iterations": middle([cost.iterations for cost in costs]),
        "pages_in_last_iteration": middle([cost.last_pages for cost in costs]),
        "size_mib": middle([cost.size_bytes / (1 << 20) for cost in costs]),
        "gave_up": gave_up,
    }


async def measure_guest(guest: Guest, case: Row, runs: int) -> list[Row]:
    """All ways in turn."""
    costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
    gave_up = dict.fromkeys(WAYS, 0)
    for _ in range(runs):
        for way, save in WAYS.items():
            try:
                costs[way].append(await save(guest))
            except HostError:  # a recorded stream outgrew its limit; what fails otherwise fails all of it
                if way != Engine.RECORD.value:
                    raise
                gave_up[way] += 1
    return [cost_row(case, way, costs[way], gave_up[way]) for way in WAYS]


async def measure(runs: int, screen: Screen) -> list[Row]:
    """An idle and a busy guest, in huge pages and in small ones."""
    rows: list[Row] = []
    for backing in (Backing.HUGETLB, Backing.ANONYMOUS):
        for kind, settings in GUESTS.items():
            with screen.step(f"Saving a guest: {kind}, {backing.value}"), temporary_place() as place:
                guests = running_guests(place, memory_mib=MEMORY_MIB, backing=backing, **settings)
                async with guests as (guest,):
                    rows += await measure_guest(guest, {"guest": kind, "ram": backing.value}, runs)
    return rows


PART = Part(
    "table1",
    "One VM by each engine (VNsnap, Table 1)",
    f"""\
One guest of {MEMORY_MIB} MiB with a disk and a tap. *Idle*: nothing runs but the kernel's timer; 200 MB of its
memory were written once. *Busy*: it rewrites these 200 MB at 1000 MB/s, and computes for the rest of its time. The
duration is from the start of the capture to its last byte, for `snapshot-save` that of QEMU's job; the downtime is
from STOP to RESUME; the size is what RAM and device state take in the store, on tmpfs. Of `background` the pages in
the last iteration are all that are saved, as there is but one. `snapshot-save` tells of no iterations: the VM
stands still meanwhile. *Gave up* counts recordings that outgrew their limit, and are not in the medians.""",
    measure,
)
