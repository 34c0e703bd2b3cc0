"""Attaching to VMs that somebody else has started: finding out all that a snapshot needs, and letting go again.

Nothing is changed in a VM. Beside the bridges that its taps are on, blue ones are put; that is all.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio
from attrs import evolve, frozen

from qsnap.errors import AttachRefusedError, HostError, StateError
from qsnap.host.bridges import check_networking, open_links
from qsnap.host.disks import LiveDisk, find_devices, read_disks
from qsnap.host.journal import Kind, Operation
from qsnap.host.lifecycle import status
from qsnap.host.owner import read_settings
from qsnap.host.place import Place
from qsnap.host.qemu import Process, command_line, find_program, process_of
from qsnap.host.qmp import QemuGoneError, Qmp, open_qmp
from qsnap.host.recovery import exclusive
from qsnap.host.runtime import LiveVM, LiveVNE
from qsnap.host.starting import parse_machine_type
from qsnap.host.takedown import take_down
from qsnap.host.tasks import run_all
from qsnap.model import VM, VNE, Accelerator, AttachReport, Colour, Disk
from qsnap.rules.adopt import Adopted, Netdev, adopt, match_nics, parse_cards, strip_loader
from qsnap.rules.colouring import bridge_name, plan_networks

GREETING_S = 3.0


@frozen
class Found:
    """A VM as it was found running, the namespace it is in, and its network backends that join no VM."""

    live: LiveVM
    netns: str
    outside: tuple[str, ...]


async def attach(vne: VNE, *, place: Place | None = None) -> AttachReport:
    """Make the running VMs that a description names known to qsnap. They need a QMP socket that nobody else uses.

    Raises AttachRefusedError, by name, for whatever a restore could not bring back. On any failure nothing stays.
    """
    if not all(vm.qmp for vm in vne.vms):
        raise StateError(f"VNE {vne.name} is described, not running", advice="Start it: qsnap up LAB.toml")
    check_networking()
    place = place or Place()
    runtime = place.runtime()
    async with exclusive(runtime, vne.name) as journal:
        if vne.name in runtime.names():
            advice = f"qsnap down {vne.name}, or qsnap detach {vne.name}"
            raise StateError(f"VNE {vne.name} is up or attached already", advice=advice)
        layers = os.path.abspath(await place.snapshots().layers_directory(vne.name))
        found = await run_all([partial(_find, vm, layers) for vm in vne.vms])
        vne, why = await _survey(evolve(vne, vms=tuple(each.live.vm for each in found)), found)
        live = LiveVNE(vne, str(place.store), found[0].netns, Colour.RED, tuple(each.live for each in found), why)
        journal.begin(Operation(Kind.ATTACH))
        runtime.save(live)
        for vm in vne.vms:
            runtime.link_sockets(vne.name, vm.name, vm.qmp)
        async with open_links(live.netns) as links:
            await links.apply(plan_networks(vne, Colour.RED))
        outside = {each.live.vm.name: each.outside for each in found if each.outside}
        return AttachReport(await status(vne.name, place=place), why, outside)


async def detach(vne: str, *, place: Place | None = None) -> None:
    """Forget a VNE that qsnap is attached to. Its VMs run on; taps and bridges are as they were found."""
    runtime = (place or Place()).runtime()
    async with exclusive(runtime, vne) as journal:
        if not runtime.load(vne).vne.attached:
            raise StateError(f"qsnap has started VNE {vne} itself", advice=f"End it: qsnap down {vne}")
        journal.begin(Operation(Kind.DETACH))
        await take_down(vne, runtime)


async def _find(vm: VM, layers: str) -> Found:
    """All that is to be known of a running VM, from itself, its command line and the kernel; `layers` is the VNE's."""
    started = await trio.to_thread.run_sync(_read_process, vm)
    try:
        async with open_qmp(vm.qmp, vm=vm.name, timeout_s=GREETING_S) as qmp:
            facts = await _ask(qmp)
            settings = await read_settings(qmp)
            machine_type = parse_machine_type(facts["type"], vm)
            adopted = adopt(started.arguments, vm=vm.name, machine_type=machine_type, directory=started.directory)
            _check_devices(adopted, facts, f"VM {vm.name}")
            disks = await read_disks(qmp, await find_devices(qmp, adopted.disks), layers)
    except QemuGoneError as error:
        advice = "QEMU serves one client on it at a time: end the other one, or start the VM with a second -qmp."
        where = f"VM {vm.name}"
        raise StateError(f"its QMP socket {vm.qmp} does not answer", where=where, advice=advice) from error
    _check_paths(disks, f"VM {vm.name}")
    taps = [_tap(started.proc, netdev) for netdev in adopted.netdevs]
    version, memory = facts["query-version"]["qemu"], facts["query-memory-size-summary"]
    described = evolve(
        vm,
        memory_bytes=memory["base-memory"] + memory.get("plugged-memory", 0),
        vcpus=len(facts["query-cpus-fast"]),
        machine=machine_type,
        accelerator=Accelerator.KVM if facts["query-kvm"]["enabled"] else Accelerator.TCG,
        qemu=find_program(vm.qemu) if vm.qemu else started.program_for_restore(vm),
        disks=tuple(Disk(disk.files[0].path, disk.files[0].format) for disk in disks),
        nics=match_nics(vm, parse_cards(adopted.netdevs, taps, facts["info network"])),
    )
    live = LiveVM(
        vm=described,
        process=started.process,
        hardware=adopted.hardware,
        machine_type=machine_type,
        accelerator=described.accelerator,
        qemu_version=(version["major"], version["minor"], version["micro"]),
        hugetlb=_is_hugetlb(started.proc, described.memory_bytes),
        disks=disks,
        settings=settings,
    )
    return Found(live, _netns(started.proc), adopted.outside)


@frozen
class Started:
    """A process, and how it was started: `exe` is the file that the kernel runs."""

    process: Process
    exe: str
    program: str
    arguments: tuple[str, ...]
    directory: str

    @property
    def proc(self) -> Path:
        """What the kernel tells of it."""
        return Path(f"/proc/{self.process.pid}")

    def program_for_restore(self, vm: VM) -> str:
        """The program; one that was given to a dynamic linker would not run by itself."""
        if os.path.basename(self.exe) == os.path.basename(self.program):
            return self.exe
        raise AttachRefusedError(
            f"it was started as {self.program} by {self.exe}",
            where=f"VM {vm.name}",
            advice='Name the program for a restore: qemu = "PATH"',
        )


def _read_process(vm: VM) -> Started:
    process = _owner(vm)
    proc = Path(f"/proc/{process.pid}")
    try:
        program, arguments = strip_loader(command_line(process))
        return Started(process, os.readlink(proc / "exe"), program, arguments, os.readlink(proc / "cwd"))
    except OSError as error:
        where = f"VM {vm.name}, process {process.pid}"
        raise HostError(error.strerror or str(error), where=where, advice="Run qsnap as root.") from error


def _owner(vm: VM) -> Process:
    """The process that listens on the VM's QMP socket. It need not answer."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(vm.qmp)
        except OSError as error:
            advice = "Name the socket of its option -qmp unix:PATH,server=on,wait=off."
            raise StateError(f"{error.strerror}: {vm.qmp}", where=f"VM {vm.name}", advice=advice) from error
        pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return process_of(pid)


async def _ask(qmp: Qmp) -> dict[str, Any]:
    """The answers, by command; that to `qom-get` is called `type`, that to the monitor's command as it is."""
    queries = (
        "query-version",
        "query-kvm",
        "query-memory-size-summary",
        "query-cpus-fast",
    )
    answers = await qmp.execute_all(
        *((query, {}) for query in queries),
        ("qom-get", {"path": "/machine", "property": "type"}),
        ("qom-list", {"path": "/machine/peripheral"}),
        ("human-monitor-command", {"command-line": "info network"}),
    )
    return dict(zip((*queries, "type", "peripheral", "info network"), answers, strict=True))


def _check_devices(adopted: Adopted, facts: dict[str, Any], where: str) -> None:
    """Raise AttachRefusedError if devices have come or gone since the VM was started with its command line."""
    there = {child["name"] for child in facts["peripheral"] if child["type"].startswith("child<")}
    for names, what in ((there - {*adopted.ids}, "plugged in"), ({*adopted.ids} - there, "unplugged")):
        if names:
            raise AttachRefusedError(
                f"the device {min(names)} was {what} after its start",
                where=where,
                advice="A restore goes by the command line: start the VM anew with the devices that it has now.",
            )


def _check_paths(disks: Sequence[LiveDisk], where: str) -> None:
    """Raise AttachRefusedError for a disk that only a process in the same directory could find."""
    for disk in disks:
        for file in disk.files:
            if not file.path.startswith("/") and ":" not in file.path:
                advice = "Start the VM with the whole path of its disk."
                raise AttachRefusedError(f"its disk {file.path} has a relative path", where=where, advice=advice)


def _tap(proc: Path, netdev: Netdev) -> str:
    """The tap of a network backend: as it was given, or as the kernel says of the descriptor that QEMU was given."""
    with suppress(OSError):
        found = re.search(r"^iff:\s*(\S+)", (proc / "fdinfo" / netdev.fd).read_text(), re.MULTILINE)
        return found[1] if found else netdev.ifname
    return netdev.ifname


def _is_hugetlb(proc: Path, memory_bytes: int) -> bool:
    """Whether the guest's RAM is in huge pages: as much memory as it has at least is mapped so."""
    sizes = re.findall(r"^Size: +(\d+) kB\nKernelPageSize: +(\d+) kB", (proc / "smaps").read_text(), re.MULTILINE)
    return sum(int(size) for size, page in sizes if int(page) > 4) << 10 >= memory_bytes


def _netns(proc: Path) -> str:
    """The path of a process's network namespace: one that outlives the process, if there is one."""
    wanted = os.stat(proc / "ns/net")
    for path in (Path("/proc/1/ns/net"), *sorted(Path("/run/netns").glob("*"))):
        with suppress(OSError):
            if os.path.samestat(os.stat(path), wanted):
                return str(path)
    return str(proc / "ns/net")


async def _survey(vne: VNE, found: Sequence[Found]) -> tuple[VNE, str]:
    """The VNE with the bridges that its taps are on; or without any, and why colours cannot be kept on them."""
    if len({each.netns for each in found}) > 1:
        return vne, "its VMs are in several network namespaces"
    for vm in vne.vms:
        for nic in vm.nics:
            if not nic.tap:
                return vne, f"the tap of a NIC of VM {vm.name} on {nic.network} is not known"
    networks = []
    async with open_links(found[0].netns) as links:
        for network in vne.networks:
            taps = [nic.tap for vm in vne.vms for nic in vm.nics if nic.network == network.name]
            ports = await links.find_ports(taps)
            obstacles = [port.obstacle for port in ports if port.obstacle]
            bridges = {port.bridge: port.mtu for port in ports}
            if obstacles:
                return vne, obstacles[0]
            if len(bridges) > 1:
                return vne, f"the taps on {network.name} are on several bridges: {', '.join(sorted(bridges))}"
            for bridge, mtu in bridges.items():
                network = evolve(network, bridge=bridge, mtu=mtu)
            networks.append(network)
        coloured = evolve(vne, networks=tuple(networks))
        given = [network.bridge for network in networks if network.bridge]
        if len(set(given)) < len(given):
            return vne, "two of its networks are one bridge"
        for index, network in enumerate(networks):
            blue = bridge_name(coloured, index, Colour.BLUE)
            if network.bridge and await links.exists(blue):
                return vne, f"there is a {blue} already: of another VNE, or left behind (ip link del {blue})"
    return coloured, ""
