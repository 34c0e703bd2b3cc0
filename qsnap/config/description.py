"""The form of a VNE description, as a table of readers: one for each key of a VM.

`[defaults]` takes the same keys as a VM and is read by the same readers, so a fault in it is reported there.
A value keeps its place until the VM is complete, for the rules that concern more than one value.
"""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
import re
from collections.abc import Iterable
from typing import Any

from attrs import evolve

from qsnap.config.key_lines import Key, KeyLines, dotted, parse_dotted
from qsnap.config.readers import (
    Reader,
    Source,
    matching,
    member,
    memory,
    name,
    nearest,
    one_of,
    parse_toml,
    path,
    required,
    string,
    table,
    tuple_of,
    typed,
    whole,
)
from qsnap.errors import ConfigError
from qsnap.model import VM, VNE, VNI_LIMIT, Accelerator, Backing, Disk, Host, Network, Nic

Settings = dict[str, tuple[Key, Any]]  #: field of VM -> where it was given, and its value
MacKey = tuple[Key, int]  #: the place of a VM, and the index of one of its NICs

MTU_LIMIT = 65521  #: of a tap: the kernel's 65535 with a frame's header
AGENT_PORT = 7907  #: where an agent listens if nothing else is said
_HOST_PORT = re.compile(r"(\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<host>[A-Za-z0-9._-]+))(:(?P<port>[0-9]{1,5}))?")
_FORMATS = ("qcow2", "raw", "vdi", "vhdx", "vmdk", "vpc")
_FIELDS = {"memory": "memory_bytes", "network": "nics"}  # keys that are not called like the VM's field
_ATTACHED_FIELDS = ("qmp", "nics", "network", "qemu", "host")  # all else is learned from the running VM
_INNER_NETDEV = re.compile(r"(type=)?(user|passt)(,.*)?", re.DOTALL)
_DISK_OPTIONS = "drive blockdev hda hdb hdc hdd cdrom fda fdb sd mtdblock pflash"
_OWN_OPTIONS = "qmp qmp-pretty daemonize pidfile name uuid nodefaults no-user-config no-shutdown nographic readconfig"
_START_OPTIONS = "S incoming loadvm snapshot preconfig"
_REFUSED_OPTIONS = {
    "m": "Use the key `memory`.",
    **dict.fromkeys(("machine", "M"), "Use the key `machine`."),
    **dict.fromkeys(("accel", "enable-kvm"), "Use the key `accelerator`."),
    **dict.fromkeys(("mem-path", "mem-prealloc"), "Use the key `backing`."),
    "numa": "Use the key `numa`.",
    **dict.fromkeys(("net", "nic"), "Use the key `nics`; to reach the outside, -netdev user and a -device."),
    **dict.fromkeys(_DISK_OPTIONS.split(), "Use the key `disks`: snapshots would miss other disks."),
    **{key: f"Use the key `{key}`." for key in ("cpu", "kernel", "initrd", "append")},
    "smp": "Use the key `vcpus`.",
    **dict.fromkeys(_OWN_OPTIONS.split(), "qsnap sets this itself."),
    **dict.fromkeys(_START_OPTIONS.split(), "qsnap decides how the VM starts."),
}


def parse_description(text: str, *, file: str, base_dir: str = "") -> VNE:
    """The VNE that `text` (TOML) describes; its VMs are in the order of the text.

    `file` is the description's name for messages; relative paths in it are resolved against `base_dir`.

    Raises:
        ConfigError: the text is not TOML, or not a valid description. The first fault found is reported.
    """
    source = Source(text, file, base_dir)
    top = table(source, (), parse_toml(source), ("name", "defaults", "hosts", "network", "vm"))
    vne_name = name(source, ("name",), required(source, (), top, "name", 'name = "lab"'))
    networks = tuple(_network(source, key, value) for key, value in _named_tables(source, top, "network"))
    hosts = tuple(_host(source, key, value) for key, value in _named_tables(source, top, "hosts"))
    _check_tunnels(source, hosts)
    source = evolve(source, networks=tuple(network.name for network in networks))
    defaults = _settings(source, ("defaults",), top.get("defaults", {}))
    given = {key: {**defaults, **_settings(source, key, value)} for key, value in _named_tables(source, top, "vm")}
    if not given:
        raise source.error(("vm",), "a VNE needs at least one VM", "Add a table such as [vm.alice].")
    _check_all_or_none_run(source, given)
    _check_hosts(source, given, [host.name for host in hosts])
    macs = _macs(source, vne_name, given)
    vms = tuple(_vm(source, key, settings, macs) for key, settings in given.items())
    return VNE(vne_name, vms, networks, hosts)


def _check_all_or_none_run(source: Source, given: dict[Key, Settings]) -> None:
    """Attached VMs are on networks of somebody else's, others on qsnap's: a VNE has VMs of one kind."""
    attached = [key for key, settings in given.items() if "qmp" in settings]
    for key, settings in given.items():
        if attached and key not in attached:
            advice = "Give every VM `qmp`, which attaches qsnap to VMs that run already, or none."
            raise source.error((*key, "qmp"), f"is missing, and VM {attached[0][-1]} has it", advice)
        for place, nics in [settings.get("nics", ((), ()))]:
            for index, nic in enumerate(nics):
                if nic.tap and not attached:
                    raise source.error((*place, index, "tap"), "qsnap names the taps of VMs that it starts itself")


def _check_tunnels(source: Source, hosts: tuple[Host, ...]) -> None:
    """A host that sent to its own tunnel would hear itself, and a tunnel takes one version of IP."""
    for host, other in itertools.combinations(hosts, 2):
        here, there = ipaddress.ip_address(host.tunnel), ipaddress.ip_address(other.tunnel)
        if here == there:
            raise source.error(("hosts", other.name), f"{there} is the address of {host.name}'s tunnels already")
        if here.version != there.version:
            message = f"its tunnels have an address of IPv{there.version}, and {host.name}'s of IPv{here.version}"
            raise source.error(("hosts", other.name), message, "Give all hosts a `tunnel` of one version.")


def _check_hosts(source: Source, given: dict[Key, Settings], hosts: list[str]) -> None:
    """Where there are hosts, each VM has one of them, and may be saved on one of them."""
    for key, settings in given.items():
        place, host = settings.get("host", ((*key, "host"), ""))
        if hosts and not host:
            raise source.error(place, "is required where there is a table [hosts]", nearest(host, hosts))
        for place, given_host in (settings[word] for word in ("host", "saved_on") if word in settings):
            if given_host and not hosts:
                advice = f'For example: [hosts] with {given_host} = "10.0.0.1"'
                raise source.error(place, "there is no table [hosts]", advice)
            if hosts and given_host not in hosts:
                raise source.error(place, f"unknown host {given_host!r}", nearest(given_host, hosts))
        place, keeper = settings.get("saved_on", ((), host))
        if "qmp" in settings and keeper != host:
            raise source.error(place, "a VM that runs already is saved on its own host", "Leave it out, or say `host`.")


def files_of(vne: VNE) -> tuple[tuple[str, str], ...]:
    """(dotted key, path) of every file that must exist before `vne` can be started.

    A `qemu` without a slash is looked for along PATH and is not listed.
    """
    found: list[tuple[str, str]] = []
    for vm in vne.vms:
        place = f"vm.{vm.name}"
        found.append((f"{place}.qemu", vm.qemu if "/" in vm.qemu else ""))
        found += [(f"{place}.kernel", vm.kernel), (f"{place}.initrd", vm.initrd)]
        found += [(f"{place}.disks[{index}].file", disk.file) for index, disk in enumerate(vm.disks)]
    return tuple((key, file) for key, file in found if file)


def missing_file_error(text: str, file: str, key: str, path: str, fault: str = "no such file") -> ConfigError:
    """The error for a (key, path) of `files_of` that has a fault; `text` and `file` are the description's.

    A value that a VM took from `[defaults]` is reported there.
    """
    place = parse_dotted(key)
    lines = KeyLines(text)
    if place[:3] not in lines.found:
        place = ("defaults", *place[2:])
    advice = "Relative paths start at the description's own directory."
    line = lines.line_of(place)
    return ConfigError(f"{fault}: {path}", file=file, line=line, key=dotted(place), advice=advice)


def _named_tables(source: Source, top: dict[str, object], kind: str) -> list[tuple[Key, object]]:
    """(place, value) of each table of [network] or [vm], their names checked."""
    tables: dict[str, object] = typed(source, (kind,), top.get(kind, {}), dict)
    return [((kind, name(source, (kind, word), word)), value) for word, value in tables.items()]


def _network(source: Source, key: Key, value: object) -> Network:
    given = table(source, key, value, ("mtu", "vni"))
    readers: dict[str, Reader[Any]] = {"mtu": whole(68, MTU_LIMIT), "vni": _vni}
    values = {word: readers[word](source, (*key, word), item) for word, item in given.items()}
    return Network(str(key[-1]), **values)


def _vni(source: Source, key: Key, value: object) -> int:
    number = whole(2, VNI_LIMIT - 2)(source, key, value)
    if number % 2:
        raise source.error(key, f"{number} is odd", "It must be even: the next number is taken as well.")
    return number


def _host(source: Source, key: Key, value: object) -> Host:
    """`NAME = "ADDRESS[:PORT]"`, or a table with `tunnel` where tunnels end at another address."""
    given = table(source, key, {"address": value} if isinstance(value, str) else value, ("address", "tunnel"))
    place = key if isinstance(value, str) else (*key, "address")
    text = required(source, key, given, "address", '{ address = "10.0.0.1" }')
    address, port = _address(source, place, text)
    tunnel = string(source, (*key, "tunnel"), given.get("tunnel", address))
    if not _is_ip(tunnel):
        advice = 'Tunnels need an IP address: { address = "alpha.example", tunnel = "10.0.0.1" }'
        raise source.error((*key, "tunnel") if "tunnel" in given else place, f"{tunnel!r} is no IP address", advice)
    return Host(str(key[-1]), address, port, tunnel)


def _address(source: Source, key: Key, value: object) -> tuple[str, int]:
    """HOST, HOST:PORT, [IPv6]:PORT, or IPv6 alone."""
    text = string(source, key, value)
    if _is_ip(text):
        return text, AGENT_PORT
    found = _HOST_PORT.fullmatch(text)
    if not found or not 0 < (port := int(found["port"] or AGENT_PORT)) < 65536:
        raise source.error(key, f"{text!r} is no address", f'For example "10.0.0.1" or "alpha.example:{AGENT_PORT}"')
    return found["ipv6"] or found["host"], port


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _settings(source: Source, key: Key, value: object) -> Settings:
    """What a VM's table or [defaults] gives, converted."""
    given = table(source, key, value, _READERS)
    if "network" in given and "nics" in given:
        raise source.error((*key, "network"), "`network` stands for one NIC, and `nics` are given too")
    return {
        _FIELDS.get(word, word): ((*key, word), _READERS[word](source, (*key, word), item))
        for word, item in given.items()
    }


def _vm(source: Source, key: Key, settings: Settings, macs: dict[MacKey, str]) -> VM:
    fields = {field: value for field, (_, value) in settings.items()}
    if fields.get("qmp"):
        return _attached_vm(source, key, settings)
    if "memory_bytes" not in fields:
        raise source.error((*key, "memory"), "is required and missing", 'For example: memory = "512M"')
    if fields.get("numa") and sum(fields["numa"]) != fields["memory_bytes"]:
        message = f"the nodes have {sum(fields['numa'])} bytes, and `memory` is {fields['memory_bytes']}"
        raise source.error(settings["numa"][0], message, "`memory` must be the sum of all nodes.")
    if not (fields.get("kernel") or fields.get("disks")):
        raise source.error(key, "the VM has nothing to boot from", "Give it `kernel` or `disks`.")
    for word in ("initrd", "append"):
        if fields.get(word) and not fields.get("kernel"):
            raise source.error(settings[word][0], f"`{word}` goes with `kernel`, which VM {key[-1]} has not")
    bus = "device" if fields.get("machine", "").startswith("microvm") else "pci"  # virtio-mmio: it has no PCI
    disks = (evolve(disk, interface=disk.interface or f"virtio-blk-{bus}") for disk in fields.pop("disks", ()))
    nics = (evolve(nic, mac=macs[key, index]) for index, nic in enumerate(_cards(fields.pop("nics", ()), bus)))
    return VM(name=str(key[-1]), disks=tuple(disks), nics=tuple(nics), **fields)


def _cards(nics: tuple[Nic, ...], bus: str) -> tuple[Nic, ...]:
    return tuple(evolve(nic, model=nic.model or f"virtio-net-{bus}") for nic in nics)


def _attached_vm(source: Source, key: Key, settings: Settings) -> VM:
    """A VM that runs already: all but its place in the VNE is learned from it."""
    fields = {field: value for field, (_, value) in settings.items()}
    for field, (place, _) in settings.items():
        if field not in _ATTACHED_FIELDS and place[:2] == key:
            advice = f"Beside `qmp` there may be: {', '.join(_ATTACHED_FIELDS)}."
            raise source.error(place, "is learned from the running VM", advice)
    nics = _cards(fields.get("nics", ()), "pci")
    told = {"qemu": "", **{field: fields[field] for field in ("qmp", "qemu", "host") if field in fields}}
    return VM(name=str(key[-1]), memory_bytes=0, nics=nics, **told)


def _macs(source: Source, vne_name: str, given: dict[Key, Settings]) -> dict[MacKey, str]:
    """The MAC of every NIC: the one asked for, or one derived from the VNE, the VM and the NIC's index.

    The same description gives the same MACs, and no two are equal.
    """
    nics = [
        ((vm, index), (*place, index, "mac"), nic.mac)
        for vm, settings in given.items()
        for place, each in [settings.get("nics", ((), ()))]
        if "qmp" not in settings
        for index, nic in enumerate(each)
    ]
    macs: dict[MacKey, str] = {}
    owners: dict[str, tuple[MacKey, Key]] = {}
    for key, place, mac in sorted(nics, key=lambda nic: not nic[2]):
        if mac in owners:
            (other, _), other_place = owners[mac]
            both = f"VM {key[0][-1]} and VM {other[-1]} (line {source.line_of(other_place)})"
            raise source.error(place, f"the MAC {mac} is given to {both}", "Leave MACs out to have them made.")
        macs[key] = mac or _derived_mac(f"{vne_name}/{key[0][-1]}/{key[1]}", owners)
        owners[macs[key]] = (key, place)
    return macs


def _derived_mac(seed: str, taken: Iterable[str]) -> str:
    """A MAC of QEMU's locally administered range 52:54:00 that is not `taken`."""
    digest = hashlib.sha256(seed.encode()).digest()
    mac = f"52:54:00:{digest[:3].hex(':')}"
    return _derived_mac(f"{seed}/", taken) if mac in taken else mac


def _mac(source: Source, key: Key, value: object) -> str:
    mac = _mac_form(source, key, value).lower()
    if int(mac[:2], 16) & 1:
        raise source.error(
            key, f"{mac} is a multicast address", "The first byte must be even, as in 52:54:00:12:34:56."
        )
    if mac == "00:00:00:00:00:00":
        raise source.error(key, f"{mac} is no address of a card")
    return mac


def _network_name(source: Source, key: Key, value: object) -> str:
    word = string(source, key, value)
    if word not in source.networks:
        raise source.error(key, f"unknown network {word!r}", nearest(word, source.networks))
    return word


def _nic(source: Source, key: Key, value: object) -> Nic:
    """A NIC whose MAC and model are empty if none were asked for."""
    if isinstance(value, str):
        return Nic(_network_name(source, key, value), "", "")
    given = table(source, key, value, ("network", "mac", "model", "tap"))
    required(source, key, given, "network", '{ network = "lan" }')
    readers: dict[str, Reader[str]] = {"network": _network_name, "mac": _mac, "model": _device, "tap": _interface}
    values = {word: readers[word](source, (*key, word), item) for word, item in given.items()}
    return Nic(**{"mac": "", "model": "", **values})


def _disk(source: Source, key: Key, value: object) -> Disk:
    """A disk whose interface is empty if none was asked for."""
    if isinstance(value, str):
        return Disk(_disk_file(source, key, value), interface="")
    given = table(source, key, value, ("file", "format", "interface"))
    required(source, key, given, "file", '{ file = "disk.qcow2" }')
    readers: dict[str, Reader[str]] = {"file": _disk_file, "format": one_of(_FORMATS), "interface": _device}
    values = {word: readers[word](source, (*key, word), item) for word, item in given.items()}
    return Disk(**{"interface": "", **values})


def _disk_file(source: Source, key: Key, value: object) -> str:
    return path(source, key, _filled(source, key, value))


def _qemu(source: Source, key: Key, value: object) -> str:
    program = _filled(source, key, value)
    return path(source, key, program) if "/" in program else program


def _extra(source: Source, key: Key, value: object) -> tuple[str, ...]:
    """Further options for QEMU, without those that would take something out of qsnap's hands."""
    items = tuple_of(string)(source, key, value)
    padded = ("", *items, "")
    for index, item in enumerate(items):
        before, after = padded[index], padded[index + 2]
        place = (*key, index)
        if item.startswith("-"):
            _check_option(source, place, item, after)
        elif not before.startswith("-"):
            raise source.error(place, f"{item!r} belongs to no option", "QEMU would take it for a disk image.")
    return items


def _check_option(source: Source, key: Key, option: str, argument: str) -> None:
    word = option.removeprefix("-").removeprefix("-")
    reason = _REFUSED_OPTIONS.get(word, "")
    if word == "object" and "memory-backend" in argument:
        reason = "Use the key `backing`."
    if word == "netdev" and not _INNER_NETDEV.fullmatch(argument):
        reason = "Use the key `nics`: only `user` and `passt` join no VMs behind qsnap's back."
    if reason:
        raise source.error(key, f"the option {option} cannot be given here", reason)


_machine = matching(r"[A-Za-z0-9][A-Za-z0-9._-]*", "the name of a QEMU machine; properties cannot be added")
_device = matching(
    r"[A-Za-z0-9][A-Za-z0-9._-]*(,(?!(drive|id|netdev|mac)=)[A-Za-z][A-Za-z0-9._-]*=[^,]+)*",
    'a QEMU device, such as "ide-hd,bus=ide.2": a name, and properties but for those that qsnap sets',
)
_interface = matching(r"[^\s/]{1,15}", "the name of a network interface: 1 to 15 characters")
_filled = matching(r"(?s:.+)", "a file")
_mac_form = matching(r"(?i:[0-9a-f]{2}(:[0-9a-f]{2}){5})", 'a MAC: six bytes such as "52:54:00:12:34:56"')
_READERS: dict[str, Reader[Any]] = {
    "memory": memory,
    "numa": tuple_of(memory),
    "dimms": tuple_of(memory),
    "backing": member(Backing),
    "vcpus": whole(1, 255),
    "machine": _machine,
    "cpu": string,
    "accelerator": member(Accelerator),
    "qemu": _qemu,
    "kernel": path,
    "initrd": path,
    "append": string,
    "disks": tuple_of(_disk),
    "nics": tuple_of(_nic),
    "network": lambda source, key, value: (Nic(_network_name(source, key, value), "", ""),),
    "extra": _extra,
    "host": string,
    "saved_on": string,
    "qmp": lambda source, key, value: path(source, key, _filled(source, key, value)),
}
