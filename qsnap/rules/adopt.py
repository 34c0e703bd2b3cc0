"""The command line of a QEMU that somebody else has started, taken apart.

What the guest can see is kept, in its order and with its ids and addresses: it is the `hardware` of `rules.command`.
What the host gave to it becomes a slot that the host of a restore fills: `diskN`, `netN`, the chardev `console`, memory
backends. The meaning of options is that of softmmu/vl.c. One that is not known here is refused by name: to find out at
the restore, when the original is gone, would be too late.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence

from attrs import define, evolve, field, frozen

from qsnap.errors import AttachRefusedError
from qsnap.model import VM, Nic
from qsnap.rules.command import DISK_NODE, RAM_ID, TOLD_TO_HOLD
from qsnap.rules.options import Properties, escape, parse_properties, split_options

_KEPT_FLAGS = "nodefaults no-user-config no-reboot no-shutdown no-acpi no-hpet no-fd-bootchk usb win2k-hack"
_KEPT = "cpu smp m numa boot rtc vga g uuid global append icount watchdog-action action seed"
_KEPT_FILES = "kernel initrd dtb bios L option-rom"
_FILE_PROPERTIES = ("fw_cfg", "smbios", "acpitable")
_DROPPED_FLAGS = (
    "S daemonize enable-kvm nographic mem-prealloc only-migratable full-screen s no-quit enable-sync-profile"
)
_DROPPED = (
    "name pidfile D d dfilter display vnc spice monitor qmp qmp-pretty mon k accel mem-path sandbox runas run-with "
    "chroot user msg trace incoming overcommit add-fd compat gdb echr loadvm tb-size async-teardown"
)
_COLLECTED = "machine M chardev netdev blockdev"
_FLAGS = frozenset(f"{_KEPT_FLAGS} {_DROPPED_FLAGS} snapshot preconfig xen-attach semihosting".split())

_PLACES = {  # what the short forms of -drive stand for (softmmu/vl.c)
    "hda": "index=0,media=disk",
    "hdb": "index=1,media=disk",
    "hdc": "index=2,media=disk",
    "hdd": "index=3,media=disk",
    "cdrom": "index=2,media=cdrom",
    "fda": "if=floppy,index=0",
    "fdb": "if=floppy,index=1",
    "pflash": "if=pflash",
}
_DRIVE_KEPT = ("if", "bus", "unit", "index", "media", "id", "werror", "rerror", "copy-on-read", "cache.writeback")
_WRITETHROUGH = ("writethrough", "directsync")  # the guest sees a disk without write cache
_OBJECTS_KEPT = re.compile(r"iothread|main-loop|rng-(random|builtin|egd)")
_OBJECTS_DROPPED = re.compile(r"(memory-backend|secret|tls|authz|monitor|throttle|thread)\b.*")
_CONSOLES = ("isa-serial", "pci-serial", "virtconsole")
_DEVICES_REFUSED = {
    r"vfio-.*|.*-host|scsi-(generic|block)": "It is a device of this host.",
    r"(.*-)?vhost-.*|ivshmem-.*|tpm-.*|virtio-9p-.*": "Part of its state is in another process or in a directory.",
    r"qxl.*|usb-redir|ccid-card-.*|.*-gl(-.*)?": "It does not work without a display client.",
    r"nvdimm|virtio-pmem-.*": "It writes to a file of this host.",
}
_NETDEVS_OUTSIDE = ("user", "passt")
_NETDEVS_REPLACED = ("tap", "bridge", "socket", "stream", "dgram", "vde", "l2tpv3")
_NIC_KEYS = ("model", "mac", "addr", "vectors")
_USB_DEVICES = ("tablet", "mouse", "keyboard", "wacom-tablet")
_LOADER_OPTIONS = ("--argv0", "--library-path", "--preload", "--audit", "--glibc-hwcaps-prepend", "--glibc-hwcaps-mask")
_REMEDY = "Start the VM without it; a snapshot could not bring it back."


@frozen
class Netdev:
    """A network backend that became a slot. `ifname` names its tap, or `fd` is the descriptor that QEMU was given."""

    id: str
    ifname: str = ""
    fd: str = ""


@frozen
class Adopted:
    """What a command line says, in terms of slots.

    `disks` and `netdevs` are the backends of the slots `disk0`, `disk1` ... and `net0`, `net1` ...; a disk's is the
    name of a block backend or of a node. `ids` are the devices that have one, `outside` the network backends that join
    no VM and stay as they are.
    """

    hardware: tuple[str, ...]
    disks: tuple[str, ...]
    netdevs: tuple[Netdev, ...]
    ids: tuple[str, ...]
    outside: tuple[str, ...]


def strip_loader(words: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """(program, its arguments), where the program may have been given to a dynamic linker (ld.so(8))."""
    if not re.fullmatch(r"ld[-.].*so.*", posixpath.basename(words[0])):
        return words[0], tuple(words[1:])
    index = 1
    while words[index].startswith("--"):
        index += 2 if words[index] in _LOADER_OPTIONS else 1
    return words[index], tuple(words[index + 1 :])


def adopt(words: Sequence[str], *, vm: str, machine_type: str, directory: str = "/") -> Adopted:
    """Take the arguments of a QEMU apart. `machine_type` is what QEMU says that it is, without alias.

    Relative paths start at `directory`. Raises AttachRefusedError for what could not be restored.
    """
    adopting = _Adopting(list(split_options(words, _FLAGS)), vm, machine_type, directory)
    try:
        return adopting.run()
    except ValueError as error:
        raise AttachRefusedError(f"its command line cannot be read: {error}", where=f"VM {vm}") from error


@define
class _Adopting:
    """The work on one command line. `backends` are those that are kept, put there when a device refers to them."""

    options: list[tuple[str, str]]
    vm: str
    machine_type: str
    directory: str
    netdevs: dict[str, Properties] = field(factory=dict)
    nodes: dict[str, Properties] = field(factory=dict)
    drives: set[str] = field(factory=set)
    backends: list[str] = field(factory=list)
    disks: list[str] = field(factory=list)
    slots: list[Netdev] = field(factory=list)
    ids: list[str] = field(factory=list)
    outside: list[str] = field(factory=list)
    chardevs: dict[str, str] = field(factory=dict)  # id -> its name in the hardware
    units: dict[str, list[int]] = field(factory=dict)  # kind of legacy drive -> the units that are taken

    def run(self) -> Adopted:
        self.netdevs = {each.get("id"): each for each in self._all("netdev", "type")}
        self.nodes = {each.get("node-name"): each for each in self._all("blockdev", "driver")}
        self.drives = {each.get("id") for each in self._all("drive", "")}
        machine = self._machine()
        words = [word for option, argument in self.options for word in self._translate(option, argument)]
        return Adopted(
            hardware=(*machine, *self.backends, *words, *self._default_serial()),
            disks=tuple(self.disks),
            netdevs=tuple(self.slots),
            ids=tuple(self.ids),
            outside=tuple(self.outside),
        )

    def _all(self, option: str, implied: str) -> list[Properties]:
        return [parse_properties(argument, implied) for name, argument in self.options if name == option]

    def _has(self, *options: str) -> bool:
        return any(name in options for name, _ in self.options)

    def _refused(self, what: str, advice: str = "") -> AttachRefusedError:
        return AttachRefusedError(
            f"it was started with {what}", where=f"VM {self.vm}", advice=f"{advice} {_REMEDY}".strip()
        )

    def _path(self, path: str) -> str:
        return posixpath.join(self.directory, path) if path and not re.match(r"[a-z0-9+-]+:", path) else path

    def _translate(self, option: str, argument: str) -> list[str]:
        """What becomes of one option."""
        if argument == TOLD_TO_HOLD:  # nothing that the guest sees, and older QEMUs do not know it
            return []
        if option in _KEPT_FLAGS.split():
            return [f"-{option}"]
        if option in _KEPT.split():
            return [f"-{option}", argument]
        if option in _KEPT_FILES.split():
            return [f"-{option}", self._path(argument)]
        if option in f"{_DROPPED_FLAGS} {_DROPPED} {_COLLECTED}".split():
            return []
        if option in _PLACES:
            return self._drive(f"file={escape(argument)},{_PLACES[option]}")
        if option in _FILE_PROPERTIES:
            return [f"-{option}", self._files(argument)]
        if option in _HANDLERS:
            return _HANDLERS[option](self, argument)
        raise self._refused(f"-{option}, which qsnap does not know how to restore")

    def _machine(self) -> list[str]:
        merged = {
            key: each.get(key) for name in ("machine", "M") for each in self._all(name, "type") for key in each.values
        }
        merged["type"] = self.machine_type
        merged.pop("accel", None)
        if not any("memdev" in each.values for each in self._all("numa", "type")):
            merged.setdefault("memory-backend", RAM_ID)
        for key in ("pflash0", "pflash1"):
            if key in merged:
                merged[key] = self._disk(merged[key])
        order = sorted(merged, key=lambda key: key != "type")
        return ["-machine", Properties({key: merged[key] for key in order}, "type", is_json=False).encode()]

    def _default_serial(self) -> list[str]:
        """The serial port that QEMU makes of itself, if it does, joined to qsnap's console."""
        given = self._has("nodefaults", "serial") or any(
            each.get("driver") == "isa-serial" for each in self._all("device", "driver")
        )
        return [] if given else ["-serial", "chardev:console"]

    def _serial(self, argument: str) -> list[str]:
        if argument == "none":
            return ["-serial", "none"]
        return ["-serial", f"chardev:{self._chardev(argument, is_console=True)}"]

    def _parallel(self, argument: str) -> list[str]:
        return ["-parallel", "none" if argument == "none" else "null"]

    def _chardev(self, id: str, *, is_console: bool) -> str:
        """The first serial port becomes the console; what else was joined to the world meets silence."""
        if id not in self.chardevs:
            if is_console and "console" not in self.chardevs.values():
                self.chardevs[id] = "console"
            else:
                self.chardevs[id] = f"null{len(self.chardevs)}"
                self.backends += ["-chardev", f"null,id={self.chardevs[id]}"]
        return self.chardevs[id]

    def _files(self, argument: str) -> str:
        given = parse_properties(argument, "name")
        files = {key: self._path(given.get(key)) for key in ("file", "data") if key in given.values}
        return given.changed(**files).encode() if files else argument

    def _device(self, argument: str) -> list[str]:
        given = parse_properties(argument, "driver")
        driver = given.get("driver")
        for pattern, why in _DEVICES_REFUSED.items():
            if re.fullmatch(pattern, driver):
                raise self._refused(f"the device {driver}", why)
        if given.get("id"):
            self.ids.append(given.get("id"))
        changes = {}
        if "drive" in given.values and given.get("drive") not in self.drives:
            changes["drive"] = self._disk(given.get("drive"))
        if "netdev" in given.values:
            changes["netdev"] = self._netdev(given.get("netdev"))
        if "chardev" in given.values:
            changes["chardev"] = self._chardev(given.get("chardev"), is_console=driver in _CONSOLES)
        if given.get("romfile"):
            changes["romfile"] = self._path(given.get("romfile"))
        return ["-device", given.changed(**changes).encode() if changes else argument]

    def _usb_device(self, argument: str) -> list[str]:
        if argument not in _USB_DEVICES:
            raise self._refused(f"-usbdevice {argument}")
        return ["-usbdevice", argument]

    def _object(self, argument: str) -> list[str]:
        given = parse_properties(argument, "qom-type")
        kind = given.get("qom-type")
        if _OBJECTS_DROPPED.fullmatch(kind):
            return []
        if not _OBJECTS_KEPT.fullmatch(kind):
            raise self._refused(f"the object {kind}")
        if "chardev" in given.values:
            given = given.changed(chardev=self._chardev(given.get("chardev"), is_console=False))
        return ["-object", given.encode()]

    def _audiodev(self, argument: str) -> list[str]:
        return ["-audiodev", f"none,id={escape(parse_properties(argument, 'driver').get('id'))}"]

    # -- disks

    def _new_disk(self, name: str) -> str:
        self.disks.append(name)
        return DISK_NODE.format(len(self.disks) - 1)

    def _disk(self, node: str) -> str:
        """The name of the node that takes the place of `node`. One that is only read stays where it is."""
        if node not in self.nodes:
            raise self._refused(f"a drive {node!r} that is not on its command line")
        if self.nodes[node].get("read-only") != "on":
            return self._new_disk(node)
        self._keep_node(node)
        return node

    def _keep_node(self, name: str) -> None:
        node = self.nodes[name]
        if "key-secret" in node.values or re.fullmatch(r"disk\d+", name):
            raise self._refused(f"the block node {name}", "It is encrypted, or named as qsnap's own are.")
        for key, value in node.values.items():
            if key != "node-name" and isinstance(value, str) and value in self.nodes:
                self._keep_node(value)
        files = {key: self._path(node.get(key)) for key in ("filename", "file.filename") if key in node.values}
        self.backends += ["-blockdev", evolve(node, values=node.values | files).encode()]

    def _drive(self, argument: str) -> list[str]:
        """A -drive keeps its place in the machine, and gets its file from the slot that `node-name` names."""
        given = parse_properties(argument, "")
        name = given.get("id") or self._legacy_name(given)
        if given.get("snapshot") == "on":
            raise self._refused("-drive snapshot=on", "What it writes is in a file without name.")
        if given.get("media") == "cdrom" or "on" in (given.get("readonly"), given.get("read-only")):
            files: dict[str, str] = {
                key: self._path(given.get(key)) for key in ("file", "file.filename") if key in given.values
            }
            return ["-drive", evolve(given, values=given.values | files).encode()]
        kept = {key: given.values[key] for key in _DRIVE_KEPT if key in given.values}
        if given.get("cache") in _WRITETHROUGH:
            kept["cache.writeback"] = "off"
        if {"file", "file.filename", "file.driver", "driver"} & given.values.keys():
            kept["node-name"] = self._new_disk(name)
        return ["-drive", Properties(kept, "", is_json=False).encode()]

    def _legacy_name(self, given: Properties) -> str:
        """What QEMU calls the backend of a drive without id: `ide0-hd0`, `virtio1` (drive_new, blockdev.c)."""
        kind = given.get("if") or "ide"
        per_bus = {"ide": 1 if "q35" in self.machine_type else 2, "scsi": 7}.get(kind, 0)
        taken = self.units.setdefault(kind, [])
        place = int(given.get("bus") or 0) * per_bus + int(given.get("unit")) if given.get("unit") else None
        index = int(given.get("index")) if given.get("index") else place
        if index is None:
            index = next(unit for unit in range(len(taken) + 1) if unit not in taken)
        taken.append(index)
        if not per_bus:
            return f"{kind}{index}"
        media = "cd" if given.get("media") == "cdrom" else "hd"
        return f"{kind}{index // per_bus}-{media}{index % per_bus}"

    # -- networks

    def _netdev(self, id: str) -> str:
        if id not in self.netdevs:
            raise self._refused(f"a netdev {id!r} that is not on its command line")
        return self._new_netdev(self.netdevs[id])

    def _new_netdev(self, given: Properties) -> str:
        """The id of the netdev that takes this one's place."""
        kind, id = given.get("type"), given.get("id")
        if kind in _NETDEVS_OUTSIDE:
            self.outside.append(f"{id or kind} ({kind})")
            name = f"outside{len(self.outside) - 1}"
            self.backends += ["-netdev", given.changed(id=name).encode()]
            return name
        if kind not in _NETDEVS_REPLACED:
            raise self._refused(f"the netdev {kind}")
        if given.get("queues") not in ("", "1") or "fds" in given.values:
            raise self._refused(f"the netdev {id} of several queues")
        self.slots.append(Netdev(id, given.get("ifname"), given.get("fd")))
        return f"net{len(self.slots) - 1}"

    def _nic(self, argument: str) -> list[str]:
        given = parse_properties(argument, "type")
        if given.get("type") == "none":
            return ["-nic", "none"]
        card = {key.replace("mac", "macaddr"): given.values[key] for key in _NIC_KEYS if key in given.values}
        netdev = self._new_netdev(given.changed(**dict.fromkeys(_NIC_KEYS)))
        return ["-net", Properties({"type": "nic", "netdev": netdev, **card}, "type", is_json=False).encode()]

    def _net(self, argument: str) -> list[str]:
        """One card and one backend without a netdev are joined by a hub; here, by a netdev."""
        given = parse_properties(argument, "type")
        if given.get("type") == "none":
            return ["-net", "none"]
        if given.get("type") != "nic":
            return []
        if "netdev" in given.values:
            return ["-net", given.changed(netdev=self._netdev(given.get("netdev"))).encode()]
        on_hub = [
            each for each in self._all("net", "type") if "netdev" not in each.values and each.get("type") != "none"
        ]
        backends = [each for each in on_hub if each.get("type") != "nic"]
        if self._has("nic") or len(on_hub) - len(backends) > 1 or len(backends) > 1:
            raise self._refused("several NICs by -net", "Give each a -netdev, or use -nic for all.")
        return ["-net", given.changed(netdev=self._new_netdev(backends[0])).encode() if backends else argument]


_HANDLERS: dict[str, Callable[[_Adopting, str], list[str]]] = {
    "serial": _Adopting._serial,
    "parallel": _Adopting._parallel,
    "device": _Adopting._device,
    "usbdevice": _Adopting._usb_device,
    "object": _Adopting._object,
    "audiodev": _Adopting._audiodev,
    "drive": _Adopting._drive,
    "nic": _Adopting._nic,
    "net": _Adopting._net,
}


@frozen
class Card:
    """A network card of a running VM, in the order of its slots: `tap` is empty where it is not known."""

    tap: str
    model: str
    mac: str


def parse_cards(netdevs: Sequence[Netdev], taps: Sequence[str], info: str) -> tuple[Card, ...]:
    """The cards of the slots, by the monitor's `info network`: each card, and below it what it is joined to."""
    found = re.findall(r"model=([^,\s]+),macaddr=(\S+)(?:\r?\n \\ (\S+): )?", info)
    by_peer = {peer: (model, mac) for model, mac, peer in found}
    others = iter([(model, mac) for model, mac, peer in found if peer not in {each.id for each in netdevs}])
    cards = (by_peer.get(each.id) or next(others, ("", "")) for each in netdevs)
    return tuple(Card(tap, *card) for tap, card in zip(taps, cards, strict=True))


def match_nics(vm: VM, cards: Sequence[Card]) -> tuple[Nic, ...]:
    """The NICs of the description that the cards are, in the order of the cards.

    Those that name a tap are found by it, the others follow the order. Raises AttachRefusedError if one is left over.
    """
    by_tap = {nic.tap: nic for nic in vm.nics if nic.tap}
    others = iter([nic for nic in vm.nics if not nic.tap])
    nics = []
    for card in cards:
        nic = by_tap.pop(card.tap, None) or next(others, None)
        if nic is None:
            what = f"the tap {card.tap}" if card.tap else f"the network card {card.mac}"
            line = f'{{ network = "NAME", tap = "{card.tap}" }}' if card.tap else '{ network = "NAME" }'
            raise AttachRefusedError(
                f"the description has no NIC for {what}", where=f"VM {vm.name}", advice=f"Add to its `nics`: {line}"
            )
        nics.append(Nic(nic.network, card.mac, card.model, card.tap))
    left = [*by_tap, *(f"on {nic.network}" for nic in others)]
    if left:
        there = ", ".join(card.tap or card.mac for card in cards) or "none"
        raise AttachRefusedError(f"it has no NIC {left[0]}", where=f"VM {vm.name}", advice=f"Its taps are: {there}.")
    return tuple(nics)
