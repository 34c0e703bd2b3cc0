"""The QEMU command line of one VM, in two halves.

The *hardware* half is what the guest can see. It is recorded in every snapshot and used again at restore word for
word, so that the machine a stream is loaded into is the machine it came from. The *backend* half is what the host
gives it (RAM, files, taps, sockets), and is made anew each time.
"""

from __future__ import annotations

import json

from attrs import frozen

from qsnap.model import VM, Accelerator

RAM_ID = "pc.ram"  #: also the idstr of the RAMBlock, so streams move between all kinds of RAM (hw/core/machine.c)
DISK_NODE = "disk{}"  #: the block node a disk device is started with


@frozen
class AnonymousRam:
    """Private anonymous memory, in 4 KiB pages."""


@frozen
class MemfdRam:
    """A memfd of QEMU's own; with `hugetlb` preallocated in huge pages, so that nothing is left to populate."""

    hugetlb: bool


@frozen
class MappedRam:
    """The flat file of a snapshot, mapped copy-on-write. The file never changes."""

    path: str


@frozen
class FilledRam:
    """A file descriptor that QEMU inherits, already holding the content: a memfd, in huge pages or not."""

    fd: int


Ram = AnonymousRam | MemfdRam | MappedRam | FilledRam


@frozen
class Backends:
    """What the host gives a VM: `directory` holds its sockets and logs, `disks` its newest layers, `taps` its NICs."""

    directory: str
    ram: Ram
    disks: tuple[str, ...]
    taps: tuple[str, ...]
    incoming: bool = False


def plan_hardware(vm: VM, accelerator: Accelerator) -> tuple[str, ...]:
    """The guest-visible half of the command line. `machine` may still be an alias such as `pc`."""
    cpu = vm.cpu or ("host" if accelerator is Accelerator.KVM else "")
    arguments = [
        *("-machine", f"{vm.machine},memory-backend={RAM_ID}"),
        *("-m", f"{vm.memory_bytes}B"),
        *("-smp", str(vm.vcpus)),
        *(("-cpu", cpu) if cpu else ()),
        *("-nodefaults", "-no-user-config"),
        *("-serial", "chardev:console"),
    ]
    for index, disk in enumerate(vm.disks):
        node = DISK_NODE.format(index)
        arguments += ["-device", f"{disk.interface},drive={node},id={node}-device"]
    for index, nic in enumerate(vm.nics):
        # without a boot ROM: its size differs between QEMU versions, which a stream would not survive
        arguments += ["-device", f"{nic.model},netdev=net{index},mac={nic.mac},id=nic{index},romfile="]
    for option in ("kernel", "initrd", "append"):
        if value := getattr(vm, option):
            arguments += [f"-{option}", value]
    return (*arguments, *vm.extra)


def with_machine_type(hardware: tuple[str, ...], machine_type: str) -> tuple[str, ...]:
    """The same hardware with the alias replaced by the versioned machine type that QEMU made of it."""
    options = hardware[1].partition(",")[2]
    return (hardware[0], f"{machine_type},{options}", *hardware[2:])


def plan_command(
    vm: VM, name: str, hardware: tuple[str, ...], accelerator: Accelerator, backends: Backends
) -> list[str]:
    """The whole command line. The VM starts paused, and with `incoming` waits for a stream."""
    directory = backends.directory.replace(",", ",,")
    sockets = (
        f"socket,id=qmp,path={directory}/qmp.sock,server=on,wait=off",
        f"socket,id=monitor,path={directory}/monitor.sock,server=on,wait=off",
        f"socket,id=console,path={directory}/console.sock,server=on,wait=off,logfile={directory}/console.log",
    )
    return [
        *(vm.qemu, "-name", name, "-S", "-display", "none"),
        *("-accel", accelerator.value),
        *("-object", _ram_object(backends.ram, vm.memory_bytes)),
        *(word for chardev in sockets for word in ("-chardev", chardev)),
        *("-mon", "chardev=qmp,mode=control", "-mon", "chardev=monitor,mode=control"),
        *_disk_arguments(backends.disks),
        *_network_arguments(backends.taps),
        *hardware,
        *(("-incoming", "defer") if backends.incoming else ()),
    ]


def disk_node(path: str, node: str) -> dict[str, object]:
    """A qcow2 node on `path` (`BlockdevOptions`).

    Flushes end in the host's page cache: a live layer is of use only while its VM's RAM is, and that dies with
    the host. What a snapshot keeps is fsynced when it is committed. So no `stop` waits for a disk.
    """
    return {
        "driver": "qcow2",
        "node-name": node,
        "file": {"driver": "file", "filename": path},
        "cache": {"no-flush": True},
        "discard": "unmap",
    }


def _disk_arguments(disks: tuple[str, ...]) -> list[str]:
    nodes = (disk_node(path, DISK_NODE.format(index)) for index, path in enumerate(disks))
    return [word for node in nodes for word in ("-blockdev", json.dumps(node))]


def _network_arguments(taps: tuple[str, ...]) -> list[str]:
    return [
        word
        for index, tap in enumerate(taps)
        for word in ("-netdev", f"tap,id=net{index},ifname={tap},script=no,downscript=no")
    ]


def _ram_object(ram: Ram, size_bytes: int) -> str:
    common = {"id": RAM_ID, "size": size_bytes}
    match ram:
        case AnonymousRam():
            backend = {"qom-type": "memory-backend-ram", **common}
        case MemfdRam(hugetlb):
            backend = {"qom-type": "memory-backend-memfd", "hugetlb": hugetlb, "prealloc": hugetlb, **common}
        case MappedRam(path):
            backend = {"qom-type": "memory-backend-file", "mem-path": path, "share": False, **common}
        case FilledRam(fd):
            path = f"/proc/self/fd/{fd}"
            backend = {"qom-type": "memory-backend-file", "mem-path": path, "share": True, **common}
    return json.dumps(backend)
