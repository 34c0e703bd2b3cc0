"""What a consistent cut of a VNE costs that is spread over hosts, by colour and by barrier.

The hosts are network namespaces of one machine, each with an agent of its own process; the coordinator is on a further
host. `discrepancy_ms` is from the first VM's STOP to the last one's, on one clock: each agent's offset is measured and
taken off. The downtime is that of the VMs, their median and the longest. The guests' memory is in huge pages, and the
engine the one that `auto` takes, the same with either cut and on any hosts.

`stall_ms` is the longest time for which any guest's incoming TCP stream, of 4 Mbit/s and from a guest on another host,
made no progress while a snapshot was taken: the guests' own byte counters, read every millisecond. Over 30 snapshots
with each cut: the median, the 95th percentile, the longest. `timeouts` are the retransmission time-outs that the
guests' kernels counted, in all of them together. `quiet_stall_ms` and `quiet_timeouts` are the same over windows as
long in which nothing happens.

`overhead_ms` is from the start of PREPARE to the last answer to COMMIT, less the capture itself: the longest time of
any VM from the capture's start to its last byte, and on to the last of its files being sealed. What is left are
messages, journals and manifests, and asking QEMU what it can do. 1, 4 and 16 hosts with a VM each are for this. All
other figures are medians of at least 5 snapshots.

All hosts share the processors of this machine. Where these are fewer than VMs, the guests, agents and receivers wait
for each other as they would not on hosts of their own: the figures are worse than those would be. So 4 hosts with 2 VMs
each, and as many on one, are measured with *idle* guests too, which neither send nor rewrite memory.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import trio
from attrs import define, field, frozen

import qsnap
from bench.guest import VNE, Guest, describe, memory_directory, ready_guest, temporary_place
from bench.report import Bar, Options, Report, Row, median, run
from bench.vne import Disruption, disrupt
from bench.ways import SNAPSHOT
from qsnap.fleet.channel import connect
from qsnap.fleet.coordinator import lead, open_remotes
from qsnap.fleet.identity import load_identity
from qsnap.fleet.operations import decide_snapshot
from qsnap.fleet.participants import phases_of
from qsnap.host.clock import steady_s
from qsnap.host.hugepages import HugePages, pages_for
from qsnap.model import Backing, Cut, Engine, Snapshot, SnapshotOrder
from qsnap.rules.parts import whole_snapshot
from testbed.fleet import INITIATOR, Fleet, open_fleet
from testbed.hosts import hosts_in_namespaces

MEMORY_MIB = 96
BUSY = {"dirty_mb": 16, "rate_mb": 2, "udp": 5, "tcp": 1, "tcp_kbps": 4000}  #: eight leave the processors some time
IDLE = {"dirty_mb": 16, "rate_mb": 0}
STALLS = 6  #: snapshots for each run where stalls are looked at: 30
DISCREPANCY_LIMIT_MS = 5.0
DISRUPTION_LIMIT_MS = 100.0
DOWNTIME_LIMIT = 1.5  #: times that on one host


@frozen
class Case:
    """VMs dealt out to hosts, whether their guests are idle, and whether the streams of those are looked at."""

    hosts: int
    vms: int
    idle: bool = False
    stalls: bool = False

    def __str__(self) -> str:
        return f"{self.vms} {'idle VMs' if self.idle else 'VMs'} on {self.hosts} hosts"


SPREAD = (Case(4, 8, idle=True), Case(4, 8, stalls=True))
TOGETHER = (Case(1, 8, idle=True), Case(1, 8))
CASES = (Case(2, 2, stalls=True), Case(4, 4, stalls=True), *SPREAD, *TOGETHER, Case(1, 1), Case(16, 16))


@frozen
class Saved:
    """One snapshot, and what it took beside the capture."""

    snapshot: Snapshot
    overhead_ms: float


@define
class Taken:
    """All snapshots with one cut."""

    case: Case
    cut: Cut
    saved: list[Saved] = field(factory=list)
    disruptions: list[Disruption] = field(factory=list)
    quiet: list[Disruption] = field(factory=list)

    @property
    def stalls_ms(self) -> list[float]:
        return [each.stall_ms for each in self.disruptions]

    @property
    def timeouts(self) -> int:
        return sum(each.timeouts for each in self.disruptions)

    @property
    def downtime_ms(self) -> float:
        return median([statistics.median(run) for run in self._downtimes])

    @property
    def discrepancy_ms(self) -> float:
        return median([each.snapshot.discrepancy_ms for each in self.saved])

    @property
    def _downtimes(self) -> list[list[float]]:
        return [[vm.measurements.downtime_ms for vm in each.snapshot.vms] for each in self.saved]

    def row(self) -> Row:
        """One line of the table."""
        looked = self.case.stalls
        return {
            "hosts": self.case.hosts,
            "vms": self.case.vms,
            "guests": "idle" if self.case.idle else "at work",
            "cut": self.cut.value,
            "discrepancy_ms": self.discrepancy_ms,
            "downtime_ms": self.downtime_ms,
            "longest_downtime_ms": median([max(run) for run in self._downtimes]),
            "stall_ms": spread(self.stalls_ms) if looked else None,
            "quiet_stall_ms": spread([each.stall_ms for each in self.quiet]) if looked else None,
            "timeouts": self.timeouts if looked else None,
            "quiet_timeouts": sum(each.timeouts for each in self.quiet) if looked else None,
            "overhead_ms": median([each.overhead_ms for each in self.saved]),
        }


def percentile(values: Sequence[float]) -> float:
    """The 95th."""
    return round(float(np.percentile(values, 95)), 1)


def spread(values: Sequence[float]) -> str:
    """Median, 95th percentile and maximum."""
    return f"{statistics.median(values):.1f} / {percentile(values)} / {max(values):.1f}"


@asynccontextmanager
async def running_fleet(case: Case) -> AsyncIterator[tuple[Fleet, qsnap.VNE, list[Guest]]]:
    """The hosts with their agents, the VNE on them, and its guests at work."""
    names = [f"host{number}" for number in range(1, case.hosts + 1)]
    with temporary_place() as place, memory_directory() as root:
        async with (
            hosts_in_namespaces([*names, INITIATOR]) as hosts,
            open_fleet(root, hosts) as fleet,
            AsyncExitStack() as stack,
        ):
            work = IDLE if case.idle else BUSY
            whole = fleet.spread(describe(place, vms=case.vms, memory_mib=MEMORY_MIB, backing=Backing.HUGETLB, **work))
            stack.enter_context(reserved(whole, root))
            status = await fleet.call(qsnap.up, whole)
            stack.push_async_callback(end, fleet)
            guests = []
            for vm, at in zip(whole.vms, status.vms, strict=True):
                runtime = fleet.place(vm.host).runtime()
                console_path, monitor_path = runtime.console_path(VNE, vm.name), runtime.monitor_path(VNE, vm.name)
                ready = ready_guest(place, vm, at.pid, console_path, monitor_path)
                guests.append(await stack.enter_async_context(ready))
            yield fleet, whole, guests


@contextmanager
def reserved(whole: qsnap.VNE, root: Path) -> Iterator[None]:
    """Huge pages for all hosts: they have one kernel here, and each would reserve as if its pool were its own."""
    pool = HugePages(root / "huge-pages")
    pool.reserve(VNE, sum(pages_for(vm.ram_bytes) for vm in whole.vms))
    try:
        yield
    finally:
        pool.give_back(VNE)


async def end(fleet: Fleet) -> None:
    """Take the VNE down."""
    with trio.CancelScope(shield=True):
        await fleet.call(qsnap.down, VNE)


async def save(whole: qsnap.VNE, cut: Cut, *, place: qsnap.Place) -> Saved:
    """A snapshot, as `qsnap.snapshot` takes it, by one who looks at the time."""
    order = SnapshotOrder(VNE, SNAPSHOT, Engine.AUTO, cut)
    sealed_s: dict[str, float] = {}

    def note(stage: str, vm: str, done: int, total: int) -> None:
        if stage == "seal":
            sealed_s[vm] = steady_s()

    dial = partial(connect, identity=load_identity(place.identity))
    async with open_remotes(order, whole, dial, note) as remotes:
        begun_s = steady_s()
        parts = await lead(remotes, phases_of(order), decide_snapshot)
        took_s = steady_s() - begun_s
    saved = whole_snapshot(parts)
    captures_s = [sealed_s[vm.vm.name] - vm.measurements.start_instant_s for vm in saved.vms]
    return Saved(saved, (took_s - max(captures_s)) * 1e3)


async def measure(case: Case, runs: int) -> list[Taken]:
    """All snapshots of one case, the cuts taking turns, each after a quiet window where stalls are looked at."""
    taken = [Taken(case, cut) for cut in Cut]
    async with running_fleet(case) as (fleet, whole, guests):
        for _ in range(runs * STALLS if case.stalls else runs):
            for each in taken:
                call = partial(fleet.call, save, whole, each.cut)
                if case.stalls:
                    _, quiet = await disrupt(guests, trio.lowlevel.checkpoint)
                    saved, disruption = await disrupt(guests, call)
                    each.quiet.append(quiet)
                    each.disruptions.append(disruption)
                else:
                    saved = await call()
                each.saved.append(saved)
                await fleet.call(qsnap.remove, VNE, SNAPSHOT)
    return taken


def judge(taken: Sequence[Taken]) -> list[Bar]:
    """What the cuts have to keep to."""
    bars = []
    together = {(each.case.idle, each.cut): each for each in taken if each.case in TOGETHER}
    for each in taken:
        what = f"{each.case}, {each.cut.value}"
        if each.case in SPREAD:
            bars.append(Bar(f"discrepancy in ms, {what}", each.discrepancy_ms, DISCREPANCY_LIMIT_MS))
            ratio = round(each.downtime_ms / together[each.case.idle, each.cut].downtime_ms, 2)
            bars.append(Bar(f"downtime over that on one host, {what}", ratio, DOWNTIME_LIMIT))
        if each.case.stalls and each.cut is Cut.BARRIER:
            bars.append(Bar(f"TCP retransmission time-outs, {what}", each.timeouts, 0))
        if each.case.stalls and each.cut is Cut.COLOUR:
            bars.append(Bar(f"stall in ms, 95th percentile, {what}", percentile(each.stalls_ms), DISRUPTION_LIMIT_MS))
    return bars


async def benchmark(options: Options) -> Report:
    taken: list[Taken] = []
    for case in CASES[:1] if options.quick else CASES:
        taken += await measure(case, options.runs)
    return Report([each.row() for each in taken], judge(taken))


if __name__ == "__main__":
    sys.exit(run(benchmark))
