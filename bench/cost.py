"""What qsnap costs a guest while no snapshot is being taken: nothing that can be measured.

A busy guest's work is counted over windows with and without qsnap:

- connected: qsnap holds its QMP session open, as it does between the steps of an operation, against the mean of the
  windows right before and right after, in which nobody is connected;
- after a snapshot, which leaves a disk layer more and the other colour behind, against the window right before it.

`lost_percent` is the median over 4 windows in each of at least 5 runs, or one per snapshot; `spread_percent`, the
standard deviation of the windows without qsnap, tells what chance alone does.
"""

from __future__ import annotations

import statistics
import sys

import trio
from attrs import define, field

from bench.guest import VNE, Guest, Meter, running_guest, temporary_place
from bench.report import Bar, Options, Report, Row, run
from bench.ways import by_qsnap
from qsnap.host.qmp import open_loop, open_qmp
from qsnap.model import Backing, Engine

MEMORY_MIB = 512
RATE_MB = 100
WINDOWS = 4  #: per run
WINDOW_S = 0.5
LIMIT_PERCENT = 1.0


@define
class Pairs:
    """Rates of work without qsnap and with it, taken next to each other."""

    without: list[float] = field(factory=list)
    ours: list[float] = field(factory=list)

    def row(self, what: str) -> Row:
        """One line of the table."""
        lost = [(1 - ours / without) * 100 for without, ours in zip(self.without, self.ours, strict=True)]
        spread = statistics.pstdev(self.without) / statistics.mean(self.without) * 100
        return {
            "what": what,
            "without_per_s": round(statistics.median(self.without)),
            "with_per_s": round(statistics.median(self.ours)),
            "lost_percent": round(statistics.median(lost), 3),
            "spread_percent": round(spread, 3),
        }


async def measure_connected(guest: Guest, meter: Meter, pairs: Pairs) -> None:
    """Windows with a session between windows without one."""
    path = guest.place.runtime().qmp_path(VNE, guest.name)
    before = await meter.rate()
    for _ in range(WINDOWS):
        async with open_loop(), open_qmp(path, vm=guest.name):
            pairs.ours.append(await meter.rate())
        after = await meter.rate()
        pairs.without.append((before + after) / 2)
        before = after


async def measure_after(guest: Guest, meter: Meter, pairs: Pairs) -> None:
    """A window before a snapshot and one after it."""
    way = by_qsnap(Engine.AUTO)
    pairs.without.append(await meter.rate())
    await way.save(guest)
    await way.tidy(guest)
    await trio.sleep(WINDOW_S)  # what the snapshot itself costs is for bench/downtime.py
    pairs.ours.append(await meter.rate())


async def benchmark(options: Options) -> Report:
    connected, after = Pairs(), Pairs()
    with temporary_place() as place:
        async with running_guest(place, memory_mib=MEMORY_MIB, rate_mb=RATE_MB, backing=Backing.HUGETLB) as guest:
            meter = Meter(guest.probe, WINDOW_S)
            for _ in range(options.runs):
                await measure_connected(guest, meter, connected)
                await measure_after(guest, meter, after)
    rows = [connected.row("connected"), after.row("after a snapshot")]
    return Report(
        rows, [Bar(f"work lost in percent, {row['what']}", row["lost_percent"], LIMIT_PERCENT) for row in rows]
    )


if __name__ == "__main__":
    sys.exit(run(benchmark))
