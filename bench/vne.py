"""What a consistent cut of 2, 4, 8 and 16 small VMs costs, by colour and by barrier.

`discrepancy_ms` is from the first VM's STOP to the last one's; the downtime is that of the VMs, their median and the
longest. `stall_ms` is the longest time for which any guest's incoming TCP stream, of 8 Mbit/s, made no progress while
the snapshot was taken: the guests' own byte counters, read every millisecond (bench.watch). It holds the VM's downtime,
its peer's and whatever TCP lost by them, and what the guests had to wait for while the snapshot was prepared.
`timeouts` are the retransmission time-outs that the guests' kernels counted meanwhile, in all runs together.
`quiet_stall_ms` and `quiet_timeouts` are the same over windows as long in which nothing happens. The guests' memory is
in huge pages, and the engine the one that `auto` takes, with either cut. Medians of at least 5 runs, the cuts taking
turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import trio
from attrs import define, field, frozen

import qsnap
from bench.guest import VNE, Guest, running_guests, temporary_place
from bench.report import Options, Report, Row, median, run
from bench.ways import SNAPSHOT
from qsnap.model import Backing, Cut, Snapshot
from testbed.state import SCALARS, SCALARS_AT, STREAM_WORDS, STREAMS_AT

T = TypeVar("T")

VMS = (2, 4, 8, 16)
MEMORY_MIB = 96
GUEST = {"dirty_mb": 16, "rate_mb": 10, "udp": 20, "tcp": 1, "tcp_kbps": 8000}
INCOMING_BYTES_AT = STREAMS_AT + STREAM_WORDS + 2  #: testbed/guest/state.h
TIMEOUTS_AT = SCALARS_AT + SCALARS.index("timeouts")
WINDOW_S = 1.5


@contextmanager
def watched(guests: Sequence[Guest]) -> Iterator[list[float]]:
    """Yields a list that has the longest time without progress of each guest's incoming stream once the block ends."""
    places = [guest.probe.place(INCOMING_BYTES_AT) for guest in guests]
    command = [sys.executable, "-m", "bench.watch", *(f"{path}:{address}" for path, address in places)]
    longest_s: list[float] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        watch.stdout.readline()
        yield longest_s
        said, _ = watch.communicate()
        longest_s += json.loads(said)


@frozen
class Disruption:
    """What guests felt: the longest that each one's TCP stream stood still, and how many retransmissions timed out."""

    stalls_ms: tuple[float, ...]
    timeouts: int

    @property
    def stall_ms(self) -> float:
        """The longest of all."""
        return max(self.stalls_ms)


@define
class Taken:
    """All runs with one cut."""

    saved: list[Snapshot] = field(factory=list)
    disruptions: list[Disruption] = field(factory=list)
    quiet: list[Disruption] = field(factory=list)

    def row(self, vms: int, cut: Cut) -> Row:
        """One line of the table."""
        downtimes = [[vm.measurements.downtime_ms for vm in snapshot.vms] for snapshot in self.saved]
        return {
            "vms": vms,
            "cut": cut.value,
            "engine": self.saved[-1].vms[0].engine.value,
            "discrepancy_ms": median([snapshot.discrepancy_ms for snapshot in self.saved]),
            "downtime_ms": median([statistics.median(run) for run in downtimes]),
            "longest_downtime_ms": median([max(run) for run in downtimes]),
            "stall_ms": median([each.stall_ms for each in self.disruptions]),
            "quiet_stall_ms": median([each.stall_ms for each in self.quiet]),
            "timeouts": sum(each.timeouts for each in self.disruptions),
            "quiet_timeouts": sum(each.timeouts for each in self.quiet),
        }


async def disrupt(guests: Sequence[Guest], action: Callable[[], Awaitable[T]]) -> tuple[T, Disruption]:
    """The action's result, and what the guests felt in a window that begins with it."""
    timeouts = count_timeouts(guests)
    with watched(guests) as longest_s:
        ends_s = trio.current_time() + WINDOW_S
        result = await action()
        await trio.sleep_until(max(ends_s, trio.current_time()))
    return result, Disruption(tuple(each * 1e3 for each in longest_s), count_timeouts(guests) - timeouts)


def count_timeouts(guests: Sequence[Guest]) -> int:
    """All that there have been; a guest's own count is up to 0.1 s behind."""
    return sum(guest.probe.word(TIMEOUTS_AT) for guest in guests)


async def measure(guests: Sequence[Guest], cuts: dict[Cut, Taken], place: qsnap.Place) -> None:
    """One snapshot with each cut, each after a quiet window."""
    for cut, taken in cuts.items():
        _, quiet = await disrupt(guests, trio.lowlevel.checkpoint)
        save = partial(qsnap.snapshot, VNE, SNAPSHOT, cut=cut, place=place)
        saved, disruption = await disrupt(guests, save)
        await qsnap.remove(VNE, SNAPSHOT, place=place)
        taken.saved.append(saved)
        taken.disruptions.append(disruption)
        taken.quiet.append(quiet)


async def benchmark(options: Options) -> Report:
    rows = []
    for vms in VMS[:1] if options.quick else VMS:
        cuts = {cut: Taken() for cut in Cut}
        with temporary_place() as place:
            async with running_guests(
                place, vms=vms, memory_mib=MEMORY_MIB, backing=Backing.HUGETLB, **GUEST
            ) as guests:
                for _ in range(options.runs):
                    await measure(guests, cuts, place)
        rows += [taken.row(vms, cut) for cut, taken in cuts.items()]
    return Report(rows)


if __name__ == "__main__":
    sys.exit(run(benchmark))
