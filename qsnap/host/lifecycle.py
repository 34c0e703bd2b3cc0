"""Bringing a VNE up from its description, looking at it, and taking it down."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import trio
from attrs import evolve, frozen

from qsnap.errors import HostError, QemuError, StateError
from qsnap.host import hugepages
from qsnap.host.bridges import check_networking
from qsnap.host.console import is_taken
from qsnap.host.journal import Kind, Operation
from qsnap.host.place import Place, Progress, no_progress
from qsnap.host.qemu import choose_accelerator
from qsnap.host.qmp import open_loop, open_qmp
from qsnap.host.recovery import exclusive, recover
from qsnap.host.runtime import LiveVM, LiveVNE, Runtime
from qsnap.host.starting import DiskBase, Start, build_networks, describe, layers_directory, open_started, start_process
from qsnap.host.takedown import take_down
from qsnap.host.tasks import one_error, run_all
from qsnap.model import VM, VNE, Accelerator, Backing, Colour
from qsnap.rules.command import AnonymousRam, MemfdRam, Ram, TmpfsRam, plan_hardware, plan_ram

STATUS_S = 3.0
DEAD = "dead"  #: the state of a VM whose process has ended


@frozen
class VMStatus:
    """One VM of a running VNE. `state` is QEMU's run state, or `dead`; `busy` if its only QMP socket is in use."""

    name: str
    state: str
    pid: int
    accelerator: Accelerator
    qemu_version: tuple[int, int, int]
    machine_type: str
    memory_bytes: int
    hugetlb: bool


@frozen
class VNEStatus:
    """A VNE that was brought up.

    `netns` is the network namespace that holds its VMs and networks: a name; or without root the path
    /proc/PID/ns/net, and nothing once all VMs are dead.
    """

    name: str
    netns: str
    colour: Colour
    store: str
    vms: tuple[VMStatus, ...]


async def up(vne: VNE, *, place: Place | None = None, progress: Progress = no_progress) -> VNEStatus:
    """Start all VMs of a VNE in a network namespace of their own, and let them run together.

    Raises StateError if it is up already. On any failure everything that was made is taken away again.
    """
    if vne.attached:
        raise StateError(f"the VMs of VNE {vne.name} are run by somebody else", advice="qsnap attach LAB.toml")
    check_networking()
    place = place or Place()
    runtime = place.runtime()
    async with exclusive(runtime, vne.name) as journal:
        if vne.name in runtime.names():
            raise StateError(f"VNE {vne.name} is up already, or was not taken down", advice=f"qsnap down {vne.name}")
        journal.begin(Operation(Kind.UP))
        await _bring_up(LiveVNE(vne, str(place.store), runtime.netns(vne.name), Colour.RED, ()), runtime, progress)
        return await status(vne.name, place=place)


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
    async with build_networks(live) as live:
        vms = await run_all([partial(_start, live, runtime, start, progress) for start in starts])
    live = evolve(live, vms=tuple(vms))
    runtime.save(live)
    await set_going(live, runtime)


async def _start(live: LiveVNE, runtime: Runtime, start: Start, progress: Progress) -> LiveVM:
    progress("start", start.vm.name, 0, 1)
    process = await start_process(live, runtime, start)
    async with AsyncExitStack() as stack:
        qmp = await open_started(stack, runtime, live.vne.name, start.vm.name)
        started = await describe(qmp, start, process, await layers_directory(live))
    progress("start", start.vm.name, 1, 1)
    return started


async def set_going(live: LiveVNE, runtime: Runtime) -> None:
    """Let all VMs run, at the same moment as far as one host can."""
    async with AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(open_qmp(runtime.qmp_path(live.vne.name, name), vm=name))
            for name in (vm.vm.name for vm in live.vms)
        ]
        await run_all([partial(qmp.execute, "cont") for qmp in sessions])


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


@asynccontextmanager
async def running(vne: VNE, *, place: Place | None = None) -> AsyncIterator[VNEStatus]:
    """A VNE that is up inside the block and down after it, whatever state it is in by then."""
    runtime = (place or Place()).runtime()
    started = await up(vne, place=place)
    try:
        yield started
    finally:
        with trio.CancelScope(shield=True):
            if vne.name in runtime.names():
                await down(vne.name, place=place)


def console_path(vne: str, vm: str, *, place: Place | None = None) -> str:
    """The Unix socket of a VM's serial console. Raises StateError if there is no such VM or VNE."""
    runtime = (place or Place()).runtime()
    runtime.load(vne).find(vm)
    return runtime.console_path(vne, vm)
