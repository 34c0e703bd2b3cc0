"""What saving a guest costs it: how long it pauses, and how much of its work is lost.

Guests of 512 MiB and 1 GiB with a disk and a tap dirty 0, 100 and 1000 MB/s, in 4 KiB pages and in huge pages. The
ways to save them take turns, medians of at least 5 rounds. The pause is from STOP to RESUME by QEMU's own
clock; how lost work is computed is told in bench/guest.py. The rivals:

(a) QEMU alone: its background snapshot into a reader that keeps nothing;
(b) `snapshot-save` into a qcow2 file;
(c) `stop`, `migrate exec:cat`, a copy of the disks, `cont`, as minimega does it, with QEMU's own bandwidth limit, and
    once more without the limit;
(d) libvirt's external snapshot of memory and disk, with the system's QEMU, and so in another VM: the same guest.

Engines other than the one that `auto` takes may give up on a guest that outruns them; how often is in the last column.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from attrs import define, field

from bench.guest import RATES, Guest, Meter, running_guest, temporary_place
from bench.libvirt import LIBVIRT, by_libvirt, open_libvirt, running_domain
from bench.report import Bar, Options, Report, Row, median, run
from bench.ways import (
    QEMU_ALONE,
    SNAPSHOT_SAVE,
    STOP_AND_COPY,
    STOP_AND_COPY_UNLIMITED,
    Saved,
    Way,
    by_qsnap,
    engines,
)
from qsnap.errors import HostError
from qsnap.model import Backing, Engine

MEMORY_MIB = (512, 1024)
BACKINGS = (Backing.ANONYMOUS, Backing.HUGETLB)
PAUSE_LIMIT_MS = {Backing.HUGETLB: 4.0, Backing.ANONYMOUS: 10.0}  #: of the engine that auto takes
LOST_LIMIT_MS = {Backing.HUGETLB: 150.0, Backing.ANONYMOUS: 200.0}
TIMES_LESS = 50  #: that qsnap is to pause a guest than the rivals that stop it for the whole time
RIVALS = (QEMU_ALONE, SNAPSHOT_SAVE, STOP_AND_COPY, STOP_AND_COPY_UNLIMITED)
RECORD = by_qsnap(Engine.RECORD).name
FIGURES = ("pause_ms", "pause_max_ms", "lost_ms", "total_ms")
STOPPING = (SNAPSHOT_SAVE.name, STOP_AND_COPY.name, LIBVIRT)


@define
class Taken:
    """All runs of one way to save one guest."""

    way: Way
    saved: list[Saved] = field(factory=list)
    lost_ms: list[float] = field(factory=list)
    gave_up: int = 0

    @property
    def pause_ms(self) -> float:
        return median([saved.pause_ms for saved in self.saved])

    def row(self) -> Row:
        """One line of the table."""
        if not self.saved:
            return {"way": self.way.name, **dict.fromkeys(FIGURES), "gave_up": self.gave_up}
        how = self.saved[-1].how
        return {
            "way": self.way.name + (f" ({how})" if how and how not in self.way.name else ""),
            "pause_ms": self.pause_ms,
            "pause_max_ms": round(max(saved.pause_ms for saved in self.saved), 2),
            "lost_ms": median(self.lost_ms),
            "total_ms": median([saved.total_ms for saved in self.saved]),
            "gave_up": self.gave_up,
        }


async def measure(guest: Guest, ways: Sequence[Way], runs: int) -> list[Taken]:
    """All these ways to save this guest, in turn."""
    taken = [Taken(way) for way in ways]
    meter = Meter(guest.probe)
    for _ in range(runs):
        for each in taken:
            try:
                saved, lost_ms = await meter.lost_ms(partial(each.way.save, guest), partial(each.way.tidy, guest))
            except HostError:  # the stream outgrew its limit; what fails otherwise fails the benchmark
                if each.way.name != RECORD:
                    raise
                each.gave_up += 1
                continue
            each.saved.append(saved)
            each.lost_ms.append(lost_ms)
    return taken


def judge(case: str, backing: Backing, taken: Sequence[Taken]) -> list[Bar]:
    """What `auto` has to keep to, and to be better than."""
    auto = next(each for each in taken if each.way.name == by_qsnap(Engine.AUTO).name)
    bars = [
        Bar(f"pause of auto in ms, {case}", auto.pause_ms, PAUSE_LIMIT_MS[backing]),
        Bar(f"work lost to auto in ms, {case}", median(auto.lost_ms), LOST_LIMIT_MS[backing]),
    ]
    for rival in taken:
        if rival.way.name in STOPPING:
            name = f"pause of auto over that of {rival.way.name}, {case}"
            bars.append(Bar(name, round(auto.pause_ms / rival.pause_ms, 4), 1 / TIMES_LESS))
    return bars


async def benchmark(options: Options) -> Report:
    rows: list[Row] = []
    bars: list[Bar] = []
    cases = [(memory, backing, rate) for memory in MEMORY_MIB for backing in BACKINGS for rate in RATES]
    for memory_mib, backing, rate in cases[:1] if options.quick else cases:
        with temporary_place() as place:
            settings = {"memory_mib": memory_mib, "rate_mb": rate, "backing": backing}
            async with running_guest(place, **settings) as guest:
                ours = [by_qsnap(engine) for engine in await engines(guest)]
                taken = await measure(guest, [*ours, *RIVALS], options.runs)
            async with open_libvirt(place) as libvirt, running_domain(libvirt, place, **settings) as guest:
                taken += await measure(guest, [by_libvirt(libvirt)], options.runs)
        case = {"memory_mib": memory_mib, "ram": backing.value, "rate_mb_s": rate}
        rows += [{**case, **each.row()} for each in taken]
        bars += judge(f"{memory_mib} MiB, {backing.value}, {rate} MB/s", backing, taken)
    return Report(rows, bars)


if __name__ == "__main__":
    sys.exit(run(benchmark))
