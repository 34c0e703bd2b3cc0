"""Bringing a VNE up from its description, looking at it, and taking it down."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from attrs import define, evolve

from qsnap.errors import HostError, QemuError, StateError
from qsnap.host import hugepages
from qsnap.host.bridges import check_networking
from qsnap.host.console import is_taken
from qsnap.host.journal import VOTED, Journal, Kind, Operation
from qsnap.host.place import Place, Progress
from qsnap.host.qemu import choose_accelerator
from qsnap.host.qmp import open_loop, open_qmp
from qsnap.host.recovery import exclusive, let_run, recover
from qsnap.host.runtime import LiveVM, LiveVNE, Runtime
from qsnap.host.starting import (
    DiskBase,
    Start,
    build_networks,
    describe,
    in_huge_pages,
    keep_boot_files,
    layers_directory,
    open_started,
    start_process,
)
from qsnap.host.store import Store
from qsnap.host.takedown import take_down
from qsnap.host.tasks import one_error, run_all
from qsnap.host.tunnels import check_tunnels
from qsnap.model import VM, Backing, Colour, UpOrder, VMStatus, VNEStatus
from qsnap.rules.command import AnonymousRam, MemfdRam, Ram, TmpfsRam, plan_hardware, plan_ram

STATUS_S = 3.0
DEAD = "dead"  #: the state of a VM whose process has ended


@asynccontextmanager
async def open_up(order: UpOrder, place: Place, progress: Progress) -> AsyncIterator[Up]:
    """The start of what this host has of a VNE, in a network namespace of its own.

    Raises StateError if it is up already. A block that is left without a commit leaves nothing, unless this host has
    voted and another one decides.
    """
    vne = order.vne
    if vne.attached:
        raise StateError(f"the VMs of VNE {vne.name} are run by somebody else", advice="qsnap attach LAB.toml")
    check_networking()
    runtime = place.runtime()
    async with exclusive(runtime, vne.name) as journal:
        if vne.name in runtime.names():
            raise StateError(f"VNE {vne.name} is up already, or was not taken down", advice=f"qsnap down {vne.name}")
        yield Up(order, place, runtime, journal, progress)


@define
class Up:
    """A start under way: `prepare`, `commit`. Made by `open_up`."""

    order: UpOrder
    place: Place
    runtime: Runtime
    journal: Journal
    progress: Progress
    note: str = ""

    async def prepare(self) -> None:
        """Have all VMs started, and paused."""
        vne = self.order.vne
        self.note = await check_tunnels(vne)
        self.journal.begin(Operation(Kind.UP, id=self.order.id, decider=self.order.decider))
        live = LiveVNE(vne, str(self.place.store), self.runtime.netns(vne.name), Colour.RED, ())
        await _bring_up(live, self.runtime, self.progress)
        if self.order.decider:
            self.journal.note(VOTED)

    async def commit(self) -> VNEStatus:
        """Let all of them run, at the same moment as far as one host can."""
        live = evolve(self.runtime.load(self.order.vne.name), started=self.order.id)
        self.runtime.save(live)
        await let_run(live, self.runtime)
        started = await status(live.vne.name, place=self.place)
        return evolve(started, notes=(self.note,) if self.note else ())

    async def undo(self) -> None:
        """Take all of it away."""
        await take_down(self.order.vne.name, self.runtime)
        self.journal.end()


async def _bring_up(live: LiveVNE, runtime: Runtime, progress: Progress) -> None:
    runtime.save(live)
    asked = sum(hugepages.pages_for(vm.ram_bytes) for vm in live.vne.vms if vm.backing is Backing.HUGETLB)
    if asked:
        runtime.huge_pages().reserve(live.vne.name, asked)
    rams = choose_rams(live.vne.vms, hugepages.free_pages() - asked)
    starts = [
        Start(
            vm=vm,
            index=index,
            hardware=plan_hardware(vm, accelerator := await choose_accelerator(vm.accelerator, vm.qemu)),
            accelerator=accelerator,
            ram=plan_ram(vm, ram),
            disks=tuple(DiskBase(disk.file, disk.format) for disk in vm.disks),
        )
        for index, (vm, ram) in enumerate(zip(live.vne.vms, rams, strict=True))
    ]
    boot = await keep_boot_files(Store(Path(live.store)), live.vne.name, [start.hardware for start in starts])
    starts = [evolve(start, boot=files) for start, files in zip(starts, boot, strict=True)]
    async with build_networks(live) as live:
        vms = await run_all([partial(_start, live, runtime, start, progress) for start in starts])
    runtime.save(evolve(live, vms=tuple(vms), waiting=tuple(vm.vm.name for vm in vms)))


async def _start(live: LiveVNE, runtime: Runtime, start: Start, progress: Progress) -> LiveVM:
    progress("start", start.vm.name, 0, 1)
    try:
        started = await _start_with(live, runtime, start)
    except QemuError:
        if start.vm.backing is not Backing.AUTO or not in_huge_pages(start.ram):
            raise
        plain = plan_ram(start.vm, AnonymousRam())  # another program may have been faster to take the huge pages
        started = await _start_with(live, runtime, evolve(start, ram=plain))
    progress("start", start.vm.name, 1, 1)
    return started


async def _start_with(live: LiveVNE, runtime: Runtime, start: Start) -> LiveVM:
    process = await start_process(live, runtime, start)
    async with AsyncExitStack() as stack:
        qmp = await open_started(stack, runtime, live.vne.name, process, start.vm.name)
        return await describe(qmp, start, process, await layers_directory(live))


def choose_rams(vms: Sequence[VM], free: int) -> list[Ram]:
    """RAM for each VM; `free` huge pages are for those that did not ask for them."""
    rams: list[Ram] = []
    for vm in vms:
        needed = hugepages.pages_for(vm.ram_bytes)
        sizes = (vm.memory_bytes, *vm.numa, *vm.dimms)
        fits = needed <= free and not any(size % hugepages.HUGE_PAGE_BYTES for size in sizes)
        match vm.backing:
            case Backing.HUGETLB:
                rams.append(MemfdRam(hugetlb=True))
            case Backing.AUTO if fits:
                free -= needed
                rams.append(MemfdRam(hugetlb=True))
            case Backing.MEMFD:
                rams.append(MemfdRam(hugetlb=False))
            case Backing.TMPFS:
                rams.append(TmpfsRam())
            case _:
                rams.append(AnonymousRam())
    return rams


async def status(vne: str, *, place: Place | None = None) -> VNEStatus:
    """The state of one VNE and its VMs. Raises StateError if it is not up."""
    runtime = (place or Place()).runtime()
    live = runtime.load(vne)
    with one_error():
        async with open_loop():
            vms = await run_all([partial(_vm_status, vm, runtime, vne) for vm in live.vms])
    return VNEStatus(vne, live.way_in(), live.active, live.store, tuple(vms))


async def statuses(*, place: Place | None = None) -> tuple[VNEStatus, ...]:
    """The state of every VNE that is up on this host."""
    place = place or Place()
    await recover(place=place)
    return tuple([await status(name, place=place) for name in place.runtime().names()])


async def _vm_status(live: LiveVM, runtime: Runtime, vne: str) -> VMStatus:
    return VMStatus(
        name=live.vm.name,
        state=await _run_state(live, runtime, vne),
        pid=live.process.pid,
        accelerator=live.accelerator,
        qemu_version=live.qemu_version,
        machine_type=live.machine_type,
        memory_bytes=live.vm.ram_bytes,
        hugetlb=live.hugetlb,
        host=live.vm.host,
    )


async def _run_state(live: LiveVM, runtime: Runtime, vne: str) -> str:
    if not live.process.is_alive():
        return DEAD
    if live.vm.qmp and is_taken(live.vm.qmp):
        return "busy"
    try:
        path = runtime.monitor_path(vne, live.vm.name)
        async with open_qmp(path, vm=live.vm.name, timeout_s=STATUS_S, answer_s=STATUS_S) as qmp:
            return str((await qmp.execute("query-status"))["status"])
    except QemuError:
        return "not answering" if live.process.is_alive() else DEAD


async def down(vne: str, *, place: Place | None = None) -> None:
    """End a VNE: its VMs, networks, huge pages and every disk layer that no snapshot holds.

    What its disks held since the last snapshot is lost. Raises StateError if it is not up. Where the state file is
    damaged, its processes and networks are found by name; layers that only the file knew stay.
    """
    runtime = (place or Place()).runtime()
    async with exclusive(runtime, vne, after_all=True) as journal:
        with suppress(HostError):
            if runtime.load(vne).vne.attached:
                advice = f"To let go of them: qsnap detach {vne}. To end them is for whoever started them."
                raise StateError("its VMs were not started by qsnap", where=f"VNE {vne}", advice=advice)
        journal.begin(Operation(Kind.DOWN))
        await take_down(vne, runtime)


def console_path(vne: str, vm: str, *, place: Place | None = None) -> str:
    """The Unix socket of a VM's serial console. Raises StateError if there is no such VM or VNE."""
    runtime = (place or Place()).runtime()
    runtime.load(vne).find(vm)
    return runtime.console_path(vne, vm)
