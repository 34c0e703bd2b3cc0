"""What it costs per host to coordinate: 10, 100 and 1000 simulated hosts with 10 VMs each.

The coordinator and all agents are in this process, and are what qsnap runs: messages, frames, heartbeats, the tables,
`lead`, `Agent`. Simulated is what is around them: streams in memory in place of TLS and TCP, whose round trip takes
20 ms of a clock that does not wait; and the work of a host, which takes no time, but tells of its progress and returns
as much as real VMs do.

- `messages`, `kib`: to and from one host, heartbeats included, the mean of all;
- `cpu_ms`: processor time per host, of the coordinator and that host's agent together, from the first connection to
  the last answer to COMMIT; of a snapshot the median of at least 5 runs;
- `memory_kib`: the most that was allocated at once meanwhile, per host, in a further run;
- `round_trips`: how long all of it took by the simulated clock, in round trips.

The bars: a host among 1000 costs a snapshot at most 1.5 times what one among 100 does, the messages are the same, and
all of it takes no more round trips. `up` has to tell each host of all others, which its tunnels lead to; so it is here
for comparison only.
"""

from __future__ import annotations

import gc
import hashlib
import sys
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio
from attrs import define, evolve, field, frozen
from trio.testing import MockClock

from bench.report import Bar, Options, Report, Row, median, run
from qsnap.fleet.agent import Agent
from qsnap.fleet.channel import Connection
from qsnap.fleet.coordinator import lead, open_remotes
from qsnap.fleet.identity import Peer
from qsnap.fleet.participants import Order, phases_of
from qsnap.host.place import Place, Progress, no_progress
from qsnap.model import (
    VM,
    VNE,
    Accelerator,
    BaseImage,
    Colour,
    Disk,
    DiskEngine,
    DiskImage,
    Engine,
    Host,
    Measurements,
    Network,
    Nic,
    Outcome,
    RamBlockFile,
    Snapshot,
    SnapshotOrder,
    StoredFile,
    UpOrder,
    VMSnapshot,
    VMStatus,
    VNEStatus,
)
from qsnap.rules.commit import Phase
from qsnap.rules.parts import whole_snapshot, whole_status

HOSTS = (10, 100, 1000)
VMS = 10  #: of each host
FILE = __file__  #: an agent looks whether there is one of this name
ROUND_TRIP_S = 0.02
FLAT = 1.5  #: times what is allowed to a host among ten times as many
HARDWARE = tuple(f"-device;virtio-net-pci,netdev=net{i},mac=52:54:00:00:00:0{i},addr=0x{i}" for i in range(8))


@define
class Wire(trio.abc.Stream):
    """One end of a connection in memory. What is sent arrives half a round trip later; `sent` counts it."""

    outgoing: trio.MemorySendChannel[tuple[float, bytes]]
    incoming: trio.MemoryReceiveChannel[tuple[float, bytes]]
    sent: Counted

    async def send_all(self, data: Any) -> None:
        """Each call is one frame."""
        self.sent.messages += 1
        self.sent.size_bytes += len(data)
        await self.outgoing.send((trio.current_time() + ROUND_TRIP_S / 2, bytes(data)))

    async def wait_send_all_might_not_block(self) -> None:
        """It never does."""
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What was sent with one call."""
        try:
            arrives_s, data = await self.incoming.receive()
        except trio.EndOfChannel:
            return b""
        await trio.sleep_until(arrives_s)
        return data

    async def aclose(self) -> None:
        """The other end finds out."""
        self.outgoing.close()
        await trio.lowlevel.checkpoint()


@define
class Counted:
    """What went over all wires."""

    messages: int = 0
    size_bytes: int = 0


def open_wire(sent: Counted) -> tuple[Wire, Wire]:
    """Both ends of a connection."""
    there_in, there = trio.open_memory_channel[tuple[float, bytes]](float("inf"))
    back_in, back = trio.open_memory_channel[tuple[float, bytes]](float("inf"))
    return Wire(there_in, back, sent), Wire(back_in, there, sent)


@define
class Took:
    """What an operation took, and what it has made."""

    sent: Counted = field(factory=Counted)
    cpu_s: float = 0.0
    simulated_s: float = 0.0
    whole: Snapshot | VNEStatus | None = None


@define
class SimulatedPart:
    """What a host does in an operation, without doing anything."""

    order: Order
    vne: VNE
    progress: Progress
    vms: tuple[VMSnapshot, ...] = ()
    round_trip_s: float = 0.0

    async def perform(self, phase: Phase, at_s: float = 0.0) -> Any:
        """The progress of a phase, and what it returns."""
        await trio.lowlevel.checkpoint()
        if phase in (Phase.PREPARE, Phase.COLLECT):
            for vm in self.vne.vms:
                self.progress(phase.value, vm.name, 0, 1)
        if phase is Phase.COLLECT:
            self.vms = tuple(map(saved, self.vne.vms))
        return self.vms

    async def commit(self, outcome: Outcome) -> Any:
        """What the operation makes."""
        await trio.lowlevel.checkpoint()
        if isinstance(self.order, SnapshotOrder):
            vne = evolve(self.vne, hosts=())
            part = Snapshot(self.order.name, vne, self.order.cut, 0.0, self.vms, operation=self.order.id)
            return outcome.applied(part)
        return VNEStatus(self.vne.name, "qsnap-bench", Colour.RED, "/var/lib/qsnap", tuple(map(started, self.vne.vms)))

    async def undo(self) -> None:
        """There is nothing to undo."""
        await trio.lowlevel.checkpoint()

    async def inquire(self) -> Outcome | None:
        """Nobody is lost."""
        raise AssertionError


@asynccontextmanager
async def open_simulated(part: VNE, order: Order, place: Place, progress: Progress) -> AsyncIterator[SimulatedPart]:
    """A host's part of an operation."""
    yield SimulatedPart(order, part, progress)


def spread_vne(hosts: int, vms: int = VMS) -> VNE:
    """A VNE on this many hosts."""
    names = [f"host{number:04}" for number in range(hosts)]
    table = tuple(Host(name, f"{name}.example", 7907, f"10.0.{i >> 8}.{i & 255}") for i, name in enumerate(names))
    machines = tuple(
        VM(
            f"{name}-vm{number}",
            512 << 20,
            kernel=FILE,
            initrd=FILE,
            append="root=/dev/vda console=ttyS0",
            disks=(Disk(FILE),),
            nics=(Nic("lan", f"52:54:00:00:{number:02x}:01"),),
            host=name,
        )
        for name in names
        for number in range(vms)
    )
    return VNE("bench", machines, (Network("lan"),), table)


def saved(vm: VM) -> VMSnapshot:
    """What a snapshot has of a VM with a disk."""

    def file(path: str) -> StoredFile:
        return StoredFile(path, 1 << 30, hashlib.sha256(path.encode()).hexdigest())

    folder = f"snapshots/one/{vm.name}"
    base = BaseImage(vm.disks[0].file, "qcow2", 2 << 30, 1_700_000_000_000_000_000)
    return VMSnapshot(
        vm=vm,
        engine=Engine.BACKGROUND,
        reason="RAM in huge pages",
        accelerator=Accelerator.KVM,
        qemu_version=(11, 1, 3),
        machine_type="pc-i440fx-11.1",
        hardware=HARDWARE,
        ram=(RamBlockFile("pc.ram", vm.memory_bytes, file(f"{folder}/ram-0.img")),),
        device_stream=file(f"{folder}/device.stream"),
        disks=(DiskImage(DiskEngine.OVERLAY, "asked for", (file(f"disks/{vm.name}-0.qcow2"),), "qcow2", base),),
        was_running=True,
        measurements=Measurements(312.5, 2, 1234, 1.7e9, 1.7e9, 1.0, 8192, 0.1, 1.7e9),
    )


def started(vm: VM) -> VMStatus:
    """What is told of a VM that was started."""
    return VMStatus(
        vm.name, "running", 4242, Accelerator.KVM, (11, 1, 3), "pc-i440fx-11.1", vm.memory_bytes, True, vm.host
    )


@frozen
class Fleet:
    """An agent for each host, and wires to them."""

    agents: dict[str, Agent]
    sent: Counted

    @asynccontextmanager
    async def dial(self, host: Host) -> AsyncIterator[Connection]:
        """A connection to the agent of a host, without the greetings of `connect`."""
        ours, theirs = open_wire(self.sent)
        async with trio.open_nursery() as nursery:
            connection, at_agent = Connection(ours, Peer(host.name)), Connection(theirs, Peer("initiator"))
            for task in connection.run, at_agent.run, partial(self.agents[host.name].handle, at_agent):
                nursery.start_soon(task)
            try:
                yield connection
            finally:
                nursery.cancel_scope.cancel()
                connection.end()
                at_agent.end()


async def carry_out(order: Order, vne: VNE) -> Took:
    """Do an operation on all of these hosts."""
    took = Took()
    with tempfile.TemporaryDirectory(prefix="qsnap-bench-") as empty:
        place = Place(f"{empty}/run", f"{empty}/store")
        parts = {host.name: vne.part(host.name) for host in vne.hosts}
        agents = {name: Agent(place, open_part=partial(open_simulated, part)) for name, part in parts.items()}
        begun_s, begun_cpu_s = trio.current_time(), time.process_time()
        async with open_remotes(order, vne, Fleet(agents, took.sent).dial, no_progress) as remotes:
            results = await lead(remotes, phases_of(order), lambda votes: Outcome())
            took.whole = whole_snapshot(results) if isinstance(order, SnapshotOrder) else whole_status(results)
        took.cpu_s, took.simulated_s = time.process_time() - begun_cpu_s, trio.current_time() - begun_s
    return took


def simulate(order: Order, vne: VNE) -> Took:
    """The same, by a clock of its own."""
    gc.collect()
    return trio.run(carry_out, order, vne, clock=MockClock(autojump_threshold=0))


def allocated_bytes(order: Order, vne: VNE) -> int:
    """The most that the operation has allocated at once."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    simulate(order, vne)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most - before


def order_for(operation: str, vne: VNE) -> Order:
    """What is to be done."""
    return UpOrder(vne) if operation == "up" else SnapshotOrder(vne.name, "one")


def measure(operation: str, hosts: int, runs: int) -> Row:
    """One line of the table."""
    vne = spread_vne(hosts)
    order = order_for(operation, vne)
    took = [simulate(order, vne) for _ in range(runs)]
    sent = took[-1].sent
    return {
        "operation": operation,
        "hosts": hosts,
        "vms": len(vne.vms),
        "messages": round(sent.messages / hosts, 2),
        "kib": round(sent.size_bytes / hosts / 1024, 1),
        "cpu_ms": median([each.cpu_s / hosts * 1e3 for each in took]),
        "memory_kib": round(allocated_bytes(order, vne) / hosts / 1024, 1) if operation == "snapshot" else None,
        "round_trips": round(took[-1].simulated_s / ROUND_TRIP_S, 2),
    }


def judge(fewer: Row, more: Row) -> list[Bar]:
    """A snapshot of many hosts next to one of fewer."""
    what = f"at {more['hosts']} hosts over {fewer['hosts']}"
    limits = {"messages": 1.0, "round_trips": 1.0, "cpu_ms": FLAT, "memory_kib": FLAT}
    return [Bar(f"{name} {what}", round(more[name] / fewer[name], 3), limit) for name, limit in limits.items()]


async def benchmark(options: Options) -> Report:
    hosts = HOSTS[:2] if options.quick else HOSTS

    def measure_all(operation: str, runs: int) -> list[Row]:
        return [measure(operation, each, runs) for each in hosts]

    snapshots = await trio.to_thread.run_sync(measure_all, "snapshot", options.runs)
    starts = await trio.to_thread.run_sync(measure_all, "up", 1)
    return Report(snapshots + starts, judge(*snapshots[-2:]))


if __name__ == "__main__":
    sys.exit(run(benchmark))
