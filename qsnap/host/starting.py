"""What `up` and `restore` have in common: the namespace with its networks, a VM's disks, and its process."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio
from attrs import evolve, frozen

from qsnap.errors import HostError, QemuError
from qsnap.host.bridges import open_links
from qsnap.host.disks import create_overlay, find_devices, new_path, read_disks
from qsnap.host.netns import enter_command, make_netns, remove_netns
from qsnap.host.qemu import Process, did_not_start, find_program, last_words, program_version, start_qemu
from qsnap.host.qmp import QemuGoneError, Qmp, open_qmp
from qsnap.host.runtime import LiveVM, LiveVNE, Runtime
from qsnap.host.store import Store
from qsnap.host.tasks import run_all
from qsnap.model import VM, Accelerator, BootFile, StoredFile
from qsnap.rules.colouring import plan_networks, tap_name
from qsnap.rules.command import (
    DISK_NODE,
    Backends,
    FilledRam,
    MemfdRam,
    MemoryBackend,
    boot_paths,
    plan_command,
    with_machine_type,
)
from qsnap.rules.engine import must_be_told_to_hold

GREETING_S = 60.0
VHOST_NET = "/dev/vhost-net"
POLL_S = 0.01
_MACHINE_TYPE = re.compile(r"[A-Za-z0-9._-]+")  # it becomes a part of command lines


@frozen
class DiskBase:
    """What a new layer of a disk goes on top of: an image of the user's, or the newest layer of a snapshot."""

    image: str
    format: str


@frozen
class Start:
    """Everything needed to start one VM. `index` is its place in the description."""

    vm: VM
    index: int
    hardware: tuple[str, ...]
    accelerator: Accelerator
    ram: tuple[MemoryBackend, ...]
    disks: tuple[DiskBase, ...]
    incoming: bool = False
    boot: tuple[BootFile, ...] = ()


@asynccontextmanager
async def build_networks(live: LiveVNE) -> AsyncIterator[LiveVNE]:
    """Make the namespace of a VNE with all its bridges, links and taps. One that a crash left behind goes first.

    The VMs must be started inside the block: without privileges nothing else keeps the namespace.
    """
    await remove_netns(live.netns)
    async with make_netns(live.netns) as netns:
        async with open_links(netns) as links:
            await links.apply(plan_networks(live.vne, live.active))
        yield evolve(live, netns=netns)


def find_qemu_img(qemu: str) -> str:
    """The qemu-img that belongs to a QEMU: beside it, else the one on the path."""
    beside = os.path.join(os.path.dirname(find_program(qemu)), "qemu-img")
    return beside if os.path.exists(beside) else find_program("qemu-img")


async def start_process(live: LiveVNE, runtime: Runtime, start: Start) -> Process:
    """Make a VM's disk layers and start its QEMU, paused. Its QMP socket answers when this returns."""
    vm = start.vm
    calls: list[Callable[[], Awaitable[Any]]] = [partial(_make_layers, live, start), partial(_told_to_hold, vm.qemu)]
    layers, told_to_hold = await run_all(calls)
    directory = runtime.make_vm_directory(live.vne.name, vm.name)
    backends = Backends(
        directory=str(directory),
        ram=start.ram,
        disks=layers,
        taps=tuple(tap_name(start.index, nic) for nic in range(len(vm.nics))),
        incoming=start.incoming,
        vhost=start.accelerator is Accelerator.KVM and os.access(VHOST_NET, os.R_OK | os.W_OK),
        boot={each.option: os.path.abspath(f"{live.store}/{live.vne.name}/{each.file.path}") for each in start.boot},
    )
    name = f"{live.vne.name}/{vm.name}"
    command = plan_command(vm, name, start.hardware, start.accelerator, backends, told_to_hold=told_to_hold)
    fds = [block.ram.fd for block in start.ram if isinstance(block.ram, FilledRam)]
    enter = enter_command(live.netns)
    return await start_qemu(command, enter=enter, directory=str(directory), vm=vm.name, fds=fds)


async def _told_to_hold(qemu: str) -> bool:
    with suppress(HostError):  # what is not QEMU is found out when it is to be started
        return must_be_told_to_hold(await program_version(qemu))
    return False


async def _make_layers(live: LiveVNE, start: Start) -> tuple[str, ...]:
    directory = await layers_directory(live)

    async def make(index: int, base: DiskBase) -> str:
        path = new_path(directory, start.vm.name, index, "qcow2")
        await create_overlay(find_qemu_img(start.vm.qemu), path, base=base.image, base_format=base.format)
        return path

    calls = [lambda index=index, base=base: make(index, base) for index, base in enumerate(start.disks)]
    return tuple(await run_all(calls))


async def keep_boot_files(store: Store, vne: str, hardware: Iterable[tuple[str, ...]]) -> list[tuple[BootFile, ...]]:
    """For the hardware of each VM copies of what its guest boots from: a snapshot is to need no other file.

    What is missing is left for QEMU to complain of.
    """
    kept: dict[str, StoredFile] = {}
    found = []
    for named in map(boot_paths, hardware):
        for path in named.values():
            if path not in kept and os.path.isfile(path):
                kept[path] = await store.keep_file(vne, path)
        found.append(tuple(BootFile(option, kept[path]) for option, path in named.items() if path in kept))
    return found


async def layers_directory(live: LiveVNE) -> str:
    """The directory for the disk layers of a VNE, by absolute path: QEMU may work in another directory."""
    return os.path.abspath(await Store(Path(live.store)).layers_directory(live.vne.name))


async def open_started(stack: AsyncExitStack, runtime: Runtime, vne: str, process: Process, vm: str) -> Qmp:
    """The first QMP session with a QEMU, for as long as `stack` lasts.

    Its socket is there a moment before QEMU listens on it, and on a busy host the greeting takes its time. Raises
    QemuError with QEMU's own words if it has ended: it makes its sockets before it looks at its other options.
    """
    deadline_s = trio.current_time() + GREETING_S
    while True:
        try:
            return await stack.enter_async_context(open_qmp(runtime.qmp_path(vne, vm), vm=vm, timeout_s=GREETING_S))
        except QemuGoneError as error:
            if not process.is_alive() or trio.current_time() > deadline_s:
                log = runtime.vm_directory(vne, vm) / "qemu.log"
                words = (last_words(log) if not process.is_alive() else "") or error.message
                raise did_not_start(words, vm) from error
        await trio.sleep(POLL_S)


async def describe(qmp: Qmp, start: Start, process: Process, directory: str) -> LiveVM:
    """What is to be known about a VM that was started, with the alias of its machine type resolved.

    `directory` has the disk layers of its VNE.
    """
    version, machine = await qmp.execute_all(
        ("query-version", {}), ("qom-get", {"path": "/machine", "property": "type"})
    )
    numbers = version["qemu"]
    machine_type = parse_machine_type(machine, start.vm)
    devices = await find_devices(qmp, [DISK_NODE.format(index) for index in range(len(start.disks))])
    return LiveVM(
        vm=start.vm,
        process=process,
        hardware=with_machine_type(start.hardware, machine_type),
        machine_type=machine_type,
        accelerator=start.accelerator,
        qemu_version=(numbers["major"], numbers["minor"], numbers["micro"]),
        hugetlb=in_huge_pages(start.ram),
        disks=await read_disks(qmp, devices, directory),
        boot=start.boot,
    )


def in_huge_pages(ram: Sequence[MemoryBackend]) -> bool:
    """Whether all of it is."""
    return all(block.ram == MemfdRam(hugetlb=True) for block in ram)


def parse_machine_type(machine: object, vm: VM) -> str:
    """The versioned machine type, of the type of QEMU's object `/machine`. Raises QemuError for anything else."""
    if not (isinstance(machine, str) and _MACHINE_TYPE.fullmatch(machine)):
        raise QemuError(f"QEMU says that its machine type is {machine!r:.80}", where=f"VM {vm.name}")
    return machine.removesuffix("-machine")
