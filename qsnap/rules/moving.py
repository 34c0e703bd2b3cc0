"""Restoring on other hosts than those of the snapshot: what goes where, and what of it is there already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import evolve, frozen

from qsnap.errors import ProtocolError, StateError
from qsnap.model import VM, VNE, DiskImage, Snapshot, StoredFile, VMSnapshot
from qsnap.rules.manifest import files_of, snapshot_dir
from qsnap.rules.parts import whole_snapshot

Sources = Mapping[str, tuple[str, ...]]  #: by VM the hosts that have of it what another one lacks


@frozen
class Move:
    """The VNE as it is to be restored; and for each host that lacks something of its VMs, who has that."""

    vne: VNE
    sources: Mapping[str, Sources]


def plan_move(whole: VNE, parts: Mapping[str, Snapshot], placement: Mapping[str, str]) -> Move:
    """Where the VMs of a snapshot go: as `placement` says, else as `whole` has them, else where they were.

    `whole` has the hosts there are, and `parts` what each has of the snapshot. Raises StateError for a VM that the
    snapshot lacks, a host that does not exist, or the state of a VM that no host has.
    """
    saved = whole_snapshot(list(parts.values()))
    names = [vm.vm.name for vm in saved.vms]
    for name in (*placement, *(vm.name for vm in whole.vms)):
        if name not in names:
            message = f"snapshot {saved.name} of {whole.name} has no VM {name} on any host"
            raise StateError(message, advice=f"It has: {', '.join(names)}")
    described = {vm.name: vm for vm in whole.vms}
    vms = tuple(_placed(vm.vm, described.get(vm.vm.name, vm.vm), placement) for vm in saved.vms)
    known = [host.name for host in whole.hosts]
    for vm in vms:
        if vm.host not in known:
            raise StateError(f"there is no host {vm.host} for VM {vm.name}", advice=f"[hosts] has: {', '.join(known)}")
    sources: dict[str, dict[str, tuple[str, ...]]] = {}
    for vm in vms:
        if lacking := _sources(vm, parts):
            sources.setdefault(vm.host, {})[vm.name] = lacking
    numbers = {network.name: network.vni for network in whole.networks}
    networks = tuple(evolve(each, vni=numbers.get(each.name, each.vni)) for each in saved.vne.networks)
    return Move(evolve(saved.vne, vms=vms, networks=networks, hosts=whole.hosts, here=""), sources)


def with_vms(part: Snapshot, vms: Iterable[VMSnapshot], vne: VNE) -> Snapshot:
    """The part of a snapshot, whatever host it is of, as it is where it has these VMs, and `vne` is the VNE's part."""
    moved = tuple(vm if vm.kept_on else evolve(vm, vm=evolve(vm.vm, host=vne.here)) for vm in vms)
    return evolve(part, vne=evolve(vne, vms=tuple(vm.vm for vm in moved)), vms=moved)


def with_layers(vm: VMSnapshot, changed: Mapping[str, StoredFile]) -> VMSnapshot:
    """The VM with those of its disk layers, by path, that are no longer what they were."""
    disks = [evolve(disk, layers=tuple(changed.get(file.path, file) for file in disk.layers)) for disk in vm.disks]
    return evolve(vm, disks=tuple(disks))


def check_paths(snapshot: str, vm: VMSnapshot) -> None:
    """Raise ProtocolError for a file of a VM, as another host has it, that would be put where it does not belong."""
    directories = {layer: "disks" for disk in vm.disks for layer in disk.layers} | {
        each.file: "boot" for each in vm.boot
    }
    for file in files_of(vm):
        directory = directories.get(file, f"{snapshot_dir(snapshot)}/{vm.vm.name}")
        if file.path.rpartition("/")[0] != directory:
            raise ProtocolError(f"{file.path[:200]!r} is not in {directory}")


def known_layers(disks: Iterable[DiskImage]) -> dict[str, DiskImage]:
    """For each layer of these disks, by its path, the disk that it is the newest layer of.

    A layer is never changed, and its name is given once: who has a layer of that name has what it lies on as well.
    """
    return {
        layer.path: evolve(disk, layers=disk.layers[index:])
        for disk in disks
        for index, layer in enumerate(disk.layers)
    }


def base_path(sha256: str, image_format: str) -> str:
    """What a base image of this content is called where it becomes a layer."""
    return f"disks/base-{sha256[:12]}.{image_format}"


def _placed(vm: VM, described: VM, placement: Mapping[str, str]) -> VM:
    return evolve(vm, host=placement.get(vm.name, described.host), saved_on=described.saved_on)


def _sources(vm: VM, parts: Mapping[str, Snapshot]) -> tuple[str, ...]:
    """The hosts that have of a VM what its own lacks: its state, its disks, or both."""
    having = {host: found for host, part in parts.items() for found in part.vms if found.vm.name == vm.name}
    lists = (
        [host for host, found in having.items() if found.has_state(host)],
        [host for host, found in having.items() if found.has_disks(host)],
    )
    for what, hosts in zip(("RAM", "disks"), lists, strict=True):
        if not hosts:
            kept_on = next(found.kept_on if what == "RAM" else found.vm.host for found in having.values())
            raise StateError(f"no host has the {what} of VM {vm.name}", advice=f"They were kept on {kept_on}.")
    both = [host for host in lists[0] if host in lists[1]]
    lacking = [hosts for hosts in lists if vm.host not in hosts]
    return tuple(dict.fromkeys((both if len(lacking) == 2 and both else hosts)[0] for hosts in lacking))
