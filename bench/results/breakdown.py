"""VNsnap's Figures 5, 6 and 8: what each VM goes through while the VNE is saved."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import groupby, pairwise

import trio
from attrs import frozen
from matplotlib.figure import Figure

import qsnap
from bench.guest import VNE, Guest, memory_directory, running_guests, temporary_place
from bench.report import Row, median
from bench.results.capture import Capture, open_capture
from bench.results.drawing import Bar, draw_bars
from bench.results.part import Part
from bench.vne import GUEST, MEMORY_MIB, disrupt
from bench.ways import SNAPSHOT
from qsnap.host.clock import steady_s
from qsnap.model import Backing, Cut, Engine, Snapshot
from qsnap.rules.colouring import tap_name
from scenarios.lab import Lab, open_lab
from scenarios.scenario import load
from testbed.screen import Screen

VMS = (2, 4, 8, 16)
SWARM = "bittorrent"
BEGIN_SHARE = 0.1  #: of the downloads, when the first snapshot is taken
QUIET_S = AFTER_S = 3.0  #: of the swarm, before a snapshot and after it
DOWNLOAD_S = 600.0


@frozen
class Spent:
    """One VM's share in a snapshot: `stall_ms` is the longest that its TCP stood still, `quiet_ms` that without one."""

    total_ms: float
    downtime_ms: float
    stall_ms: float
    quiet_ms: float

    @property
    def uptime_ms(self) -> float:
        return max(0.0, self.total_ms - self.downtime_ms)

    @property
    def backoff_ms(self) -> float:
        return max(0.0, self.stall_ms - self.downtime_ms)


def vm_row(vms: int, vm: str, engine: Engine, spent: Sequence[Spent]) -> Row:
    """The medians of one VM."""
    return {
        "vms": vms,
        "vm": vm,
        "engine": engine.value,
        "uptime_ms": median([each.uptime_ms for each in spent]),
        "downtime_ms": median([each.downtime_ms for each in spent]),
        "tcp_backoff_ms": median([each.backoff_ms for each in spent]),
        "stall_without_snapshot_ms": median([each.quiet_ms for each in spent]),
    }


def summarise(rows: Sequence[Row]) -> list[Row]:
    """For each VNE the median VM and the worst one."""
    table = []
    for vms, group in groupby(rows, lambda row: row["vms"]):
        of_vne = list(group)
        row: Row = {"vms": vms, "engine": of_vne[0]["engine"]}
        for name in ("uptime_ms", "downtime_ms", "tcp_backoff_ms", "stall_without_snapshot_ms"):
            values = [vm[name] for vm in of_vne]
            row[name] = f"{statistics.median(values):.0f} / {max(values):.0f}"
        table.append(row)
    return table


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for each VNE, a bar for each VM."""
    panels = {vms: list(group) for vms, group in groupby(rows, lambda row: row["vms"])}
    return draw_bars(
        {
            f"{vms} VMs": [
                Bar(row["vm"], (row["uptime_ms"], row["downtime_ms"], row["tcp_backoff_ms"])) for row in of_vne
            ]
            for vms, of_vne in panels.items()
        },
        ("uptime during the snapshot", "downtime", "TCP back-off"),
    )


# ---- test guests ----


async def measure(runs: int, screen: Screen) -> list[Row]:
    """VNEs of small guests, each sending TCP to the next one."""
    rows: list[Row] = []
    for vms in VMS:
        with screen.step(f"Saving {vms} VMs, TCP between them"), temporary_place() as place:
            settings = {"memory_mib": MEMORY_MIB, "backing": Backing.HUGETLB, **GUEST}
            async with running_guests(place, vms=vms, **settings) as guests:
                runs_spent = [await save_once(guests, place) for _ in range(runs)]
            rows += [
                vm_row(vms, guest.name, Engine.BACKGROUND, [run[index] for run in runs_spent])
                for index, guest in enumerate(guests)
            ]
    return rows


async def save_once(guests: Sequence[Guest], place: qsnap.Place) -> list[Spent]:
    """One snapshot after a quiet window: what each guest spent."""
    _, quiet = await disrupt(guests, trio.lowlevel.checkpoint)
    save = partial(qsnap.snapshot, VNE, SNAPSHOT, engine=Engine.BACKGROUND, cut=Cut.COLOUR, place=place)
    saved, disruption = await disrupt(guests, save)
    await qsnap.remove(VNE, SNAPSHOT, place=place)
    return [
        Spent(vm.measurements.total_ms, vm.measurements.downtime_ms, stall_ms, quiet_ms)
        for vm, stall_ms, quiet_ms in zip(saved.vms, disruption.stalls_ms, quiet.stalls_ms, strict=True)
    ]


# ---- a swarm ----


async def measure_swarm(runs: int, screen: Screen) -> list[Row]:
    """The VMs of the scenario while their clients fetch a file."""
    scenario = load(SWARM)
    with screen.step(f"Saving a BitTorrent swarm {runs} times"), memory_directory() as root:
        async with open_lab(scenario.vne(), root) as lab:
            await lab.up()
            workload = scenario.make(lab.guests, False)
            await workload.start()
            with trio.fail_after(DOWNLOAD_S):
                while (shares := (await workload.progress()).values()) and sum(shares) / len(shares) < BEGIN_SHARE:
                    await trio.sleep(0.5)
            netns = lab.places[""].runtime().load(lab.vne.name).netns
            taken = [await save_swarm(lab, netns) for _ in range(runs)]
            if max((await workload.progress()).values()) >= 1:
                raise RuntimeError("a download was done before the last snapshot: what was measured is no swarm")
    first, _ = taken[0]
    return [
        vm_row(len(first.vms), vm.vm.name, vm.engine, [spent[index] for _, spent in taken])
        for index, vm in enumerate(first.vms)
    ]


async def save_swarm(lab: Lab, netns: str) -> tuple[Snapshot, list[Spent]]:
    """One snapshot, with an ear on all taps."""
    async with open_captures(lab.vne, netns) as captures:
        begun_s = steady_s()
        await trio.sleep(QUIET_S)
        saved: Snapshot = await lab.snapshot(SNAPSHOT, Engine.AUTO, Cut.COLOUR)
        await trio.sleep(AFTER_S)
        ended_s = steady_s()
    await lab.remove(SNAPSHOT)
    first_stop_s = min(vm.measurements.stop_instant_s for vm in saved.vms)
    spent = []
    for vm in saved.vms:
        sent_s = sorted(each.instant_s for capture in captures[vm.vm.name] for each in capture.flows.sent)
        stall_ms, quiet_ms = (
            longest_gap_ms(sent_s, begin_s, end_s)
            for begin_s, end_s in ((first_stop_s, ended_s), (begun_s, begun_s + QUIET_S))
        )
        spent.append(Spent(vm.measurements.total_ms, vm.measurements.downtime_ms, stall_ms, quiet_ms))
    return saved, spent


def longest_gap_ms(instants_s: Sequence[float], begin_s: float, end_s: float) -> float:
    """The longest time in a window without any of these instants; they are in order."""
    inside = [begin_s, *(each for each in instants_s if begin_s < each < end_s), end_s]
    return max(after - before for before, after in pairwise(inside)) * 1e3


@asynccontextmanager
async def open_captures(vne: qsnap.VNE, netns: str) -> AsyncIterator[Mapping[str, Sequence[Capture]]]:
    """The captures of each VM: one of each NIC."""
    async with AsyncExitStack() as stack:
        yield {
            vm.name: [
                await stack.enter_async_context(open_capture(netns, tap_name(index, nic)))
                for nic in range(len(vm.nics))
            ]
            for index, vm in enumerate(vne.vms)
        }


PART = Part(
    "breakdown",
    "What each VM goes through (VNsnap, Figures 5 and 6)",
    f"""\
Guests of {MEMORY_MIB} MiB in huge pages, each sending 8 Mbit/s of TCP to the next one, saved by `background` with a
coloured cut. *Uptime* is how long a VM runs while it is being saved: the duration of its capture less its downtime.
*TCP back-off* is the longest time without progress of its incoming stream around the snapshot, less its own
downtime; so it has what the stream's sender stood still, what the guest waited for memory that was being saved, and
what TCP lost. The last column is the longest time without progress in a window as long without a snapshot: from 8
VMs on, there are not enough processors for the guests alone. In the table: the median VM, and the worst.""",
    measure,
    summarise,
    draw,
)
SWARM_PART = Part(
    "bittorrent",
    "What each VM of a BitTorrent swarm goes through (VNsnap, Figure 8)",
    """\
The six VMs of the scenario [bittorrent](../scenarios/bittorrent), in the middle of a download of 64 MB to each
client, saved by the engine that qsnap takes by itself, with a coloured cut. *TCP back-off* is the longest time from
the first VM's stop to 3 s after the snapshot in which the VM sent no TCP segment with data, less its downtime, on
all its taps; the last column is the same over the 3 s before. BitTorrent is not a steady stream: clients are held
to 768 kB/s, and fetch in turns.""",
    measure_swarm,
    draw=draw,
)
