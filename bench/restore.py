"""How soon a saved VM runs again, at 0.5, 2 and 8 GiB.

Counted from the start of its QEMU to the guest's RESUME, with memory mapped from the flat file and copied from it. Next
to it, in the same rounds:

- the start of the same QEMU to its first QMP greeting, which its monitor's thread sends before there is a machine, and
  to its first answer, for which there has to be one;
- the replay of a full migration stream (`stop`, `migrate exec:cat` without a bandwidth limit) into the same QEMU.

All files are on tmpfs. `call_ms` is from the call of `qsnap.restore`, with all that it does before it starts QEMU.

The guest rewrites its working set as fast as it can: `touched_ms` is from RESUME until it has been through all of it.
Medians of at least 5 runs.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import trio
from attrs import define, field

import qsnap
from bench.guest import VNE, WORKING_SET_MB, running_guest, temporary_place
from bench.probe import Probe, find_ram, memory_path
from bench.report import Bar, Options, Report, Row, median, run
from bench.ways import SNAPSHOT, STOP_AND_COPY_UNLIMITED, copy_directory
from qsnap.host.clock import steady_s
from qsnap.host.qemu import Process
from qsnap.host.qmp import open_loop, open_qmp
from qsnap.host.restoring import feed, run_on
from qsnap.host.runtime import LiveVNE
from qsnap.host.starting import DiskBase, Start, build_networks, start_process
from qsnap.host.takedown import take_down
from qsnap.model import Colour, Engine, RamMode, StoredFile, VMSnapshot
from qsnap.rules.command import AnonymousRam, MappedRam, Ram, plan_ram
from testbed.state import GuestState

MEMORY_MIB = (512, 2048, 8192)
WORKING_SETS_MB = {512: WORKING_SET_MB, 2048: 800, 8192: 2000}
AS_FAST_AS_IT_GOES_MB = 100_000
GREETING_LIMIT = 1.5  #: no restore can do without a QEMU that has started
TIMES_FASTER = 10  #: than the replay of a full stream
TOUCH_S = 120.0
MAPPED, COPIED, REPLAYED = "mapped", "copied", "full stream"
GREETING, ANSWER = "QEMU's greeting", "QEMU's first answer"
WAYS = (MAPPED, COPIED, REPLAYED, GREETING, ANSWER)


@define
class Times:
    """All runs of one way to get a VM running."""

    running_ms: list[float] = field(factory=list)
    call_ms: list[float] = field(factory=list)
    touched_ms: list[float] = field(factory=list)

    def row(self) -> Row:
        """The medians of what was measured."""
        figures = {"running_ms": self.running_ms, "call_ms": self.call_ms, "touched_ms": self.touched_ms}
        return {name: median(values) if values else None for name, values in figures.items()}


@define
class Case:
    """One saved guest, and a full stream of the same. `offset` is where its state page is in its RAM."""

    place: qsnap.Place
    saved: qsnap.Snapshot
    stream: Path
    offset: int

    async def restore(self, mode: RamMode, times: Times) -> None:
        """A restore, until the guest has touched its working set."""
        report = await qsnap.restore(VNE, SNAPSHOT, ram=mode, place=self.place)
        try:
            (running_ms,) = report.running_ms.values()
            times.running_ms.append(running_ms)
            times.call_ms.append(report.ready_ms)
            process = self.place.runtime().load(VNE).vms[0].process
            with closing(Probe(str(self.flat), 0, self.offset)) as image, closing(await self._probe(process)) as probe:
                touched_s = await touched_all(probe, since=image.state())
            times.touched_ms.append((touched_s - process.spawned_s) * 1e3 - running_ms)
        finally:
            await qsnap.down(VNE, place=self.place)

    async def replay(self, times: Times) -> None:
        """The same with the full stream, into an empty VM."""
        path = self.place.runtime().qmp_path(VNE, self.vm.vm.name)
        async with self._qemu(AnonymousRam()) as process, open_loop(), open_qmp(path, vm="replay") as qmp:
            await feed(qmp, self.stream, lambda done, total: None)
            with closing(await self._probe(process)) as probe:
                loaded = probe.state()
                await run_on(qmp)
                resumed = await qmp.wait_event(lambda event: event.name == "RESUME")
                touched_s = await touched_all(probe, since=loaded)
        times.running_ms.append((resumed.instant_s - process.spawned_s) * 1e3)
        times.touched_ms.append((touched_s - resumed.instant_s) * 1e3)

    async def greet(self, greeting: Times, answer: Times) -> None:
        """The same QEMU, as for a mapped restore, to the first thing it says, and to its first answer."""
        path = self.place.runtime().qmp_path(VNE, self.vm.vm.name)
        async with self._qemu(MappedRam(str(self.flat))) as process, await connect(path) as socket:
            await socket.receive_some()
            greeting.running_ms.append((steady_s() - process.spawned_s) * 1e3)
            await socket.send_all(b'{"execute":"qmp_capabilities"}\n')
            await socket.receive_some()
            answer.running_ms.append((steady_s() - process.spawned_s) * 1e3)

    @property
    def vm(self) -> VMSnapshot:
        return self.saved.vms[0]

    @property
    def flat(self) -> Path:
        """The flat file of the guest's memory."""
        return self._stored(self.vm.ram[0].file)

    def _stored(self, file: StoredFile) -> Path:
        return self.place.store / VNE / file.path

    @asynccontextmanager
    async def _qemu(self, ram: Ram) -> AsyncIterator[Process]:
        """The guest's QEMU, waiting for a stream."""
        runtime = self.place.runtime()
        live = LiveVNE(self.saved.vne, str(self.place.store), runtime.netns(VNE), Colour.RED, ())
        runtime.save(live)
        try:
            disks = tuple(DiskBase(str(self._stored(disk.layers[0])), disk.top_format) for disk in self.vm.disks)
            vm, hardware, accelerator = self.vm.vm, self.vm.hardware, self.vm.accelerator
            start = Start(vm, 0, hardware, accelerator, plan_ram(vm, ram), disks, incoming=True)
            async with build_networks(live) as live:
                process = await start_process(live, runtime, start)
            yield process
        finally:
            await take_down(VNE, runtime)

    async def _probe(self, process: Process) -> Probe:
        base = await find_ram(self.place.runtime().monitor_path(VNE, self.vm.vm.name))
        return Probe(memory_path(process.pid), base, self.offset)


async def connect(path: str) -> trio.SocketStream:
    """A connection to a socket that QEMU has bound, but may not listen on yet."""
    while True:
        try:
            return await trio.open_unix_socket(path)
        except ConnectionRefusedError:
            await trio.sleep(0.0005)


async def touched_all(probe: Probe, since: GuestState) -> float:
    """The time at which the guest has touched its whole working set again."""
    with trio.fail_after(TOUCH_S):
        while probe.state().touched < since.touched + since.stamp_pages:
            await trio.sleep(0.001)
    return steady_s()


async def measure(memory_mib: int, runs: int) -> tuple[list[Row], list[Bar]]:
    """Save one guest, and get it running in every way in turn."""
    ways = {way: Times() for way in WAYS}
    with temporary_place() as place:
        case = await save(place, memory_mib)
        for _ in range(runs):
            await case.restore(RamMode.MAP, ways[MAPPED])
            await case.restore(RamMode.EAGER, ways[COPIED])
            await case.replay(ways[REPLAYED])
            await case.greet(ways[GREETING], ways[ANSWER])
        image_mib = case.vm.measurements.image_bytes >> 20
    rows = [{"memory_mib": memory_mib, "image_mib": image_mib, "way": way, **ways[way].row()} for way in ways]
    running_ms = {way: median(times.running_ms) for way, times in ways.items()}
    greeting, stream = running_ms[MAPPED] / running_ms[GREETING], running_ms[MAPPED] / running_ms[REPLAYED]
    return rows, [
        Bar(f"mapped over QEMU's greeting, {memory_mib} MiB", round(greeting, 2), GREETING_LIMIT),
        Bar(f"mapped over the full stream, {memory_mib} MiB", round(stream, 3), 1 / TIMES_FASTER),
    ]


async def save(place: qsnap.Place, memory_mib: int) -> Case:
    """A guest in the midst of its work, as a snapshot and as a stream."""
    settings = {"dirty_mb": WORKING_SETS_MB[memory_mib], "rate_mb": AS_FAST_AS_IT_GOES_MB}
    async with running_guest(place, memory_mib=memory_mib, **settings) as guest:
        saved = await qsnap.snapshot(VNE, SNAPSHOT, engine=Engine.BACKGROUND, place=place)
        await STOP_AND_COPY_UNLIMITED.save(guest)
        return Case(place, saved, copy_directory(guest) / "memory", guest.probe.offset)


async def benchmark(options: Options) -> Report:
    results = [await measure(size, options.runs) for size in (MEMORY_MIB[:1] if options.quick else MEMORY_MIB)]
    return Report([row for rows, _ in results for row in rows], [bar for _, bars in results for bar in bars])


if __name__ == "__main__":
    sys.exit(run(benchmark))
