"""The QEMU command line of one VM, in two halves.

The *hardware* half is what the guest can see. It is recorded in every snapshot and used again at restore word for
word, so that the machine a stream is loaded into is the machine it came from. The *backend* half is what the host
gives it (RAM, files, taps, sockets), and is made anew each time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise

from attrs import field, frozen

from qsnap.model import VM, Accelerator

RAM_ID = "pc.ram"  #: of RAM in one piece; on every machine, so that its hardware is the same
OBJECTS = "/objects/"  #: the QOM path of user-created objects
NODE_RAM = "ram-node{}"
DIMM_RAM = "ram-dimm{}"
DISK_NODE = "disk{}"  #: the block node a disk device is started with
DISK_DEVICE = "disk{}-device"
PFLASH = "pflash"  #: the interface of a disk that is flash memory of the machine: firmware, or its variables
BOOT_OPTIONS = ("-kernel", "-initrd", "-dtb", "-bios")  #: name files that a guest boots from
TOLD_TO_HOLD = "migration.switchover-ack-legacy=on"
ON_A_BUS = ("scsi-", "usb-")  #: beginnings of the names of those that need a controller, which `extra` adds
NICS_WITHOUT_ROM = ("-device", "-ccw", "_isa", "usb-net")  #: ends of the names of those that are not on PCI


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
class TmpfsRam:
    """A file in /dev/shm, shared. QEMU makes it and removes its name at once (file_ram_open, softmmu/physmem.c)."""


@frozen
class FilledRam:
    """A file descriptor that QEMU inherits, already holding the content: a memfd, in huge pages or not."""

    fd: int


Ram = AnonymousRam | MemfdRam | TmpfsRam | MappedRam | FilledRam


@frozen
class MemoryBackend:
    """A memory backend: its id and its RAMBlock's name are the same, so streams move between all kinds of RAM.

    The name is the object's whole QOM path where the block was saved from an old machine type (hw_compat_3_1).
    """

    idstr: str
    size_bytes: int
    ram: Ram


@frozen
class Backends:
    """What the host gives a VM: `directory` holds its sockets and logs, `disks` its newest layers, `taps` its NICs.

    `boot` are files to boot from, by the option that names them, in place of those that the hardware names. With
    `vhost` the kernel moves the packets of virtio cards (vhost-net).
    """

    directory: str
    ram: tuple[MemoryBackend, ...]
    disks: tuple[str, ...]
    taps: tuple[str, ...]
    incoming: bool = False
    vhost: bool = False
    boot: Mapping[str, str] = field(factory=dict)


def plan_ram(vm: VM, ram: Ram) -> tuple[MemoryBackend, ...]:
    """The guest's RAM, all of it made of `ram`."""
    sizes = {NODE_RAM.format(node): size for node, size in enumerate(vm.numa)} or {RAM_ID: vm.memory_bytes}
    sizes |= {DIMM_RAM.format(index): size for index, size in enumerate(vm.dimms)}
    return tuple(MemoryBackend(idstr, size, ram) for idstr, size in sizes.items())


def plan_hardware(vm: VM, accelerator: Accelerator) -> tuple[str, ...]:
    """The guest-visible half of the command line. `machine` may still be an alias such as `pc`."""
    cpu = vm.cpu or ("host" if accelerator is Accelerator.KVM else "")
    flash = [index for index, disk in enumerate(vm.disks) if disk.interface == PFLASH]
    properties = [
        *(() if vm.numa else (f"memory-backend={RAM_ID}",)),
        *(f"{PFLASH}{unit}={DISK_NODE.format(index)}" for unit, index in enumerate(flash)),
    ]
    arguments = [
        *("-machine", ",".join((vm.machine, *properties))),
        *("-m", f"{vm.memory_bytes}B" + (f",slots={len(vm.dimms)},maxmem={vm.ram_bytes}B" if vm.dimms else "")),
        *("-smp", str(vm.vcpus)),
        *(word for node in range(len(vm.numa)) for word in ("-numa", f"node,memdev={NODE_RAM.format(node)}")),
        *(("-cpu", cpu) if cpu else ()),
        *("-nodefaults", "-no-user-config"),
        *("-serial", "chardev:console"),
    ]
    for index in range(len(vm.dimms)):
        arguments += ["-device", f"pc-dimm,memdev={DIMM_RAM.format(index)},id=dimm{index}"]
    devices = []
    for index, disk in enumerate(vm.disks):
        if index not in flash:
            devices.append(f"{disk.interface},drive={DISK_NODE.format(index)},id={DISK_DEVICE.format(index)}")
    for index, nic in enumerate(vm.nics):
        # without a boot ROM: its size differs between QEMU versions, which a stream would not survive
        rom = "" if nic.model.partition(",")[0].endswith(NICS_WITHOUT_ROM) else ",romfile="
        devices.append(f"{nic.model},netdev=net{index},mac={nic.mac},id=nic{index}{rom}")
    arguments += [word for device in devices if not device.startswith(ON_A_BUS) for word in ("-device", device)]
    for option in ("kernel", "initrd", "append"):
        if value := getattr(vm, option):
            arguments += [f"-{option}", value]
    arguments += vm.extra
    arguments += [word for device in devices if device.startswith(ON_A_BUS) for word in ("-device", device)]
    return tuple(arguments)


def with_machine_type(hardware: tuple[str, ...], machine_type: str) -> tuple[str, ...]:
    """The same hardware with the alias replaced by the versioned machine type that QEMU made of it."""
    _, comma, options = hardware[1].partition(",")
    return (hardware[0], f"{machine_type}{comma}{options}", *hardware[2:])


def boot_paths(hardware: tuple[str, ...]) -> dict[str, str]:
    """The files that a guest boots from, by the option that names them."""
    return {option: value for option, value in pairwise(hardware) if option in BOOT_OPTIONS}


def with_boot_files(hardware: tuple[str, ...], paths: Mapping[str, str]) -> tuple[str, ...]:
    """The same hardware with other files to boot from, by option."""
    named = pairwise(("", *hardware))
    return tuple(paths.get(option, word) if option in BOOT_OPTIONS else word for option, word in named)


def plan_command(
    vm: VM,
    name: str,
    hardware: tuple[str, ...],
    accelerator: Accelerator,
    backends: Backends,
    *,
    told_to_hold: bool = False,
) -> list[str]:
    """The whole command line. The VM starts paused, and with `incoming` waits for a stream.

    `told_to_hold` is for a QEMU that else could not be kept from the end of a precopy (`rules.engine.can_hold`).
    """
    directory = backends.directory.replace(",", ",,")
    sockets = (
        f"socket,id=monitor,path={directory}/monitor.sock,server=on,wait=off",
        f"socket,id=console,path={directory}/console.sock,server=on,wait=off,logfile={directory}/console.log",
        f"socket,id=qmp,path={directory}/qmp.sock,server=on,wait=off",  # last: when it is there, all are
    )
    return [
        *(vm.qemu, "-name", name, "-S", "-display", "none"),
        *("-accel", accelerator.value),
        *(("-global", TOLD_TO_HOLD) if told_to_hold else ()),
        *(word for block in backends.ram for word in ("-object", _ram_object(block))),
        *(word for chardev in sockets for word in ("-chardev", chardev)),
        *("-mon", "chardev=qmp,mode=control", "-mon", "chardev=monitor,mode=control"),
        *_network_arguments(vm, backends),
        *_with_disks(with_boot_files(hardware, backends.boot), backends.disks),
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


def _with_disks(hardware: tuple[str, ...], disks: tuple[str, ...]) -> list[str]:
    """The hardware and, before it, its disks; one that QEMU makes together with its device goes into its `-drive`."""
    words, nodes = list(hardware), []
    for index, path in enumerate(disks):
        name = DISK_NODE.format(index)
        node = disk_node(path, name)
        place = next((at for at, word in enumerate(words) if word.endswith(f"node-name={name}")), None)
        if place is None:
            nodes += ["-blockdev", json.dumps(node)]
        else:
            words[place] += "," + _as_drive(node)
    return nodes + words


def _as_drive(node: dict[str, object]) -> str:
    """The same node in the words of `-drive`, which has its name already."""
    flat: dict[str, object] = {}
    for key, value in node.items():
        flat |= {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {key: value}
    words = {key: "on" if value is True else str(value).replace(",", ",,") for key, value in flat.items()}
    return ",".join(f"{key}={value}" for key, value in words.items() if key != "node-name")


def _network_arguments(vm: VM, backends: Backends) -> list[str]:
    arguments = []
    for index, (nic, tap) in enumerate(zip(vm.nics, backends.taps, strict=True)):
        vhost = ",vhost=on" if backends.vhost and nic.model.startswith("virtio-net") else ""
        arguments += ["-netdev", f"tap,id=net{index},ifname={tap},script=no,downscript=no{vhost}"]
    return arguments


def _ram_object(block: MemoryBackend) -> str:
    common = {
        "id": block.idstr.removeprefix(OBJECTS),
        "size": block.size_bytes,
        "x-use-canonical-path-for-ramblock-id": block.idstr.startswith(OBJECTS),
    }
    match block.ram:
        case AnonymousRam():
            backend = {"qom-type": "memory-backend-ram", **common}
        case MemfdRam(hugetlb):
            backend = {"qom-type": "memory-backend-memfd", "hugetlb": hugetlb, "prealloc": hugetlb, **common}
        case TmpfsRam():
            backend = {"qom-type": "memory-backend-file", "mem-path": "/dev/shm", "share": True, **common}
        case MappedRam(path):
            backend = {"qom-type": "memory-backend-file", "mem-path": path, "share": False, **common}
        case FilledRam(fd):
            path = f"/proc/self/fd/{fd}"
            backend = {"qom-type": "memory-backend-file", "mem-path": path, "share": True, **common}
    return json.dumps(backend)
