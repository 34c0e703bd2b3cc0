"""Putting together what the hosts of a VNE say, each of its own part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from attrs import evolve

from qsnap.errors import IntegrityError, NotUpError, QsnapError
from qsnap.model import VM, VNE, AttachReport, Host, RestoreReport, Snapshot, VMSnapshot, VMStatus, VNEStatus

UNREACHABLE = "unreachable"  #: the state of a VM whose host does not answer
NOT_UP = "not up"  #: the state of a VM whose host says that it does not run there


def hosts_in_use(vne: VNE) -> tuple[Host, ...]:
    """The hosts that have VMs of it or keep their state, in the order of the description. The first is the decider."""
    used = {host for vm in vne.vms for host in (vm.host, vm.keeper)}
    return tuple(host for host in vne.hosts if host.name in used)


def where_known(described: VNE, known: VNE) -> VNE:
    """A VNE as it is described, with its VMs on the hosts where they are known to be, as far as these are described."""
    homes = {vm.name: vm for vm in known.vms}
    hosts = {host.name for host in described.hosts}
    at_home = [
        evolve(vm, host=home.host, saved_on=home.saved_on)
        if (home := homes.get(vm.name)) and {home.host, home.keeper or home.host} <= hosts
        else vm
        for vm in described.vms
    ]
    return evolve(described, vms=tuple(at_home))


def whole_status(parts: Sequence[VNEStatus]) -> VNEStatus:
    """The state of a VNE; that of one host is what it is."""
    if len(parts) == 1:
        return parts[0]
    vms = tuple(vm for part in parts for vm in part.vms)
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    return evolve(parts[0], netns="", store="", vms=vms, notes=notes)


def with_missing(whole: VNE, parts: Mapping[str, VNEStatus], missing: Mapping[str, QsnapError]) -> VNEStatus:
    """The state of a VNE, some hosts of which have not said what theirs is, and why."""
    vms = {
        vm.name: _absent(vm, NOT_UP if isinstance(missing[vm.host], NotUpError) else UNREACHABLE)
        for vm in whole.vms
        if vm.host in missing
    }
    vms |= {vm.name: vm for part in parts.values() for vm in part.vms}
    found = whole_status(list(parts.values()))
    notes = (*found.notes, *(str(error) for error in missing.values() if not isinstance(error, NotUpError)))
    return in_order(whole, evolve(found, vms=tuple(vms.values()), notes=notes))


def in_order(whole: VNE, status: VNEStatus) -> VNEStatus:
    """The same with its VMs in the order of the description."""
    order = {vm.name: index for index, vm in enumerate(whole.vms)}
    return evolve(status, vms=tuple(sorted(status.vms, key=lambda vm: order.get(vm.name, len(order)))))


def _absent(vm: VM, state: str) -> VMStatus:
    return VMStatus(vm.name, state, 0, vm.accelerator, (0, 0, 0), vm.machine, vm.ram_bytes, False, vm.host)


def whole_snapshot(parts: Sequence[Snapshot]) -> Snapshot:
    """A snapshot of all hosts. A VM that several of them have is taken from the first.

    Where one host has the state of a VM and another its disks, they are put together. Of a VM that lacks one of them
    there is what is known of it: `whole_vms` does not name it. Raises IntegrityError if the part of a host belongs to
    another snapshot of that name.
    """
    first = parts[0]
    if not first.operation:
        return first
    name = f"{first.vne.name}/{first.name}"
    if {part.operation for part in parts} != {first.operation}:
        raise IntegrityError("the hosts have different snapshots of this name", file=name)
    found: dict[str, VMSnapshot] = {}
    for vm in (vm for part in parts for vm in part.vms if not vm.kept_on):
        found.setdefault(vm.vm.name, vm)
    for part in parts:
        for vm in part.vms:
            found[vm.vm.name] = joined(found.get(vm.vm.name), vm, part.vne.here)
    vms = tuple(found[name] for name in dict.fromkeys(vm.vm.name for part in parts for vm in part.vms))
    return evolve(first, vne=evolve(first.vne, vms=tuple(vm.vm for vm in vms), here=""), vms=vms)


def joined(known: VMSnapshot | None, vm: VMSnapshot, host: str) -> VMSnapshot:
    """What is known of a VM, and what one host that has its state or its disks says of these."""
    if known is None or not known.kept_on:
        return known or vm
    if vm.has_state(host):
        known = evolve(known, ram=vm.ram, device_stream=vm.device_stream, measurements=vm.measurements)
    return evolve(known, disks=vm.disks, boot=vm.boot) if vm.has_disks(host) else known


def whole_vms(parts: Iterable[Snapshot]) -> set[str]:
    """The VMs of a snapshot that these hosts have all of."""
    states: set[str] = set()
    disks: set[str] = set()
    for part in parts:
        states |= {vm.vm.name for vm in part.vms if vm.has_state(part.vne.here)}
        disks |= {vm.vm.name for vm in part.vms if vm.has_disks(part.vne.here)}
    return states & disks


def whole_snapshots(parts: Iterable[Snapshot]) -> tuple[Snapshot, ...]:
    """The snapshots that these are parts of, the oldest first."""
    ordered = sorted(parts, key=lambda part: (part.created_s, part.name))
    return tuple(
        whole_snapshot(list(same)) for _, same in groupby(ordered, key=lambda part: (part.created_s, part.name))
    )


def whole_report(parts: Sequence[RestoreReport]) -> RestoreReport:
    """What a restore did on all hosts."""
    return RestoreReport(
        snapshot=whole_snapshot([part.snapshot for part in parts]),
        ready_ms=max(part.ready_ms for part in parts),
        ram={vm: how for part in parts for vm, how in part.ram.items()},
        running_ms={vm: ms for part in parts for vm, ms in part.running_ms.items()},
    )


def whole_attach_report(parts: Sequence[AttachReport]) -> AttachReport:
    """What qsnap is attached to on all hosts."""
    return AttachReport(
        status=whole_status([part.status for part in parts]),
        barrier_only=next((part.barrier_only for part in parts if part.barrier_only), ""),
        outside={vm: names for part in parts for vm, names in part.outside.items()},
    )
