"""Figures that follow from what a snapshot records, for whoever shows it."""

from __future__ import annotations

from qsnap.model import Snapshot


def stored_bytes(snapshot: Snapshot) -> int:
    """What a snapshot takes on disk. Disk layers that it shares with other snapshots are counted as its own."""
    layers = {layer for vm in snapshot.vms for disk in vm.disks for layer in disk.layers}
    images = sum(vm.measurements.image_bytes for vm in snapshot.vms)
    return images + sum(layer.size_bytes for layer in layers)


def longest_downtime_ms(snapshot: Snapshot) -> float | None:
    """The downtime of the VM that was stopped for longest; nothing if all were paused anyway."""
    return max((vm.measurements.downtime_ms for vm in snapshot.vms if vm.was_running), default=None)


def discrepancy_ms(snapshot: Snapshot) -> float | None:
    """From the first STOP to the last; nothing if there were no two."""
    return snapshot.discrepancy_ms if sum(vm.was_running for vm in snapshot.vms) > 1 else None


def reasons(snapshot: Snapshot) -> list[str]:
    """Why each engine was chosen; VMs that share engine and reason share a line."""
    chosen: dict[tuple[str, str], list[str]] = {}
    for vm in snapshot.vms:
        chosen.setdefault((vm.engine.value, vm.reason), []).append(vm.vm.name)
    if len(chosen) == 1:
        return [f"Engine {engine}: {reason}." for engine, reason in chosen]
    return [f"Engine {engine} for {', '.join(names)}: {reason}." for (engine, reason), names in chosen.items()]
