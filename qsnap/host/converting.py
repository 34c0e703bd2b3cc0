"""Converting a recorded snapshot: each VM's stream becomes flat RAM files and a device stream. No QEMU runs."""

from __future__ import annotations

from functools import partial

import trio
from attrs import evolve

from qsnap.errors import StateError, StreamError
from qsnap.host.daemon import open_converter
from qsnap.host.journal import Kind, Operation
from qsnap.host.keeping import seal_state
from qsnap.host.place import Place, Progress, no_progress
from qsnap.host.recovery import exclusive
from qsnap.host.saving import DEVICE_RAM_BYTES
from qsnap.host.store import Store
from qsnap.host.tasks import run_all
from qsnap.model import Snapshot, VMSnapshot
from qsnap.rules.command import AnonymousRam, plan_ram
from qsnap.rules.manifest import files_in, snapshot_dir


async def convert(vne: str, name: str, *, place: Place | None = None, progress: Progress = no_progress) -> Snapshot:
    """Turn a snapshot of the engine `record` into the flat form, which can be mapped, and return what it is now.

    Up or not, the VNE is left alone, but no other operation on it can begin meanwhile. Raises StateError if the
    snapshot is flat already, IntegrityError naming the first altered file. Whatever happens, the snapshot is there in
    one form or the other, with nothing beside it.
    """
    place = place or Place()
    async with exclusive(place.runtime(), vne) as journal:
        store = place.snapshots()
        saved = await _load(store, vne, name, progress)
        journal.begin(Operation(Kind.CONVERT, name, str(place.store)))
        await store.prune(vne, name)  # what an attempt left whose journal a crash of the host has taken
        async with trio.open_nursery() as nursery:
            vms = await run_all([partial(_flatten, nursery, store, saved, vm, progress) for vm in saved.vms])
        flat = evolve(saved, vms=tuple(vms))
        await store.replace(flat)
        await store.prune(vne, name)
    return flat


async def _load(store: Store, vne: str, name: str, progress: Progress) -> Snapshot:
    saved = await store.load(vne, name)
    if not any(vm.recorded and vm.has_state(saved.vne.here) for vm in saved.vms):
        raise StateError(f"snapshot {name} of {vne} is flat already", advice="There is nothing to convert.")
    total, done = sum(file.size_bytes for file in files_in(saved)), 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress("check", vne, done, total)

    return await store.check_quick(vne, name, count)


async def _flatten(
    nursery: trio.Nursery, store: Store, saved: Snapshot, vm: VMSnapshot, progress: Progress
) -> VMSnapshot:
    if not (vm.recorded and vm.has_state(saved.vne.here)):
        return vm
    vne, size = saved.vne.name, vm.device_stream.size_bytes
    folder = f"{snapshot_dir(saved.name)}/{vm.vm.name}"
    progress("convert", vm.vm.name, 0, size)
    converter = open_converter(
        nursery,
        store.root / vne / folder,
        store.root / vne / vm.device_stream.path,
        backed=tuple(block.idstr for block in plan_ram(vm.vm, AnonymousRam())),
        ram_limit_bytes=vm.vm.ram_bytes + DEVICE_RAM_BYTES,
        on_bytes=lambda done: progress("convert", vm.vm.name, done, size),
    )
    async with converter as daemon:
        try:
            receipt = await daemon.wait_done()
        except StreamError as error:
            error.advice = error.advice or "It can still be restored as it is."
            raise
    files = await seal_state(store, vne, folder, receipt)
    ratio = files.image_bytes / receipt["ram_bytes"]
    measurements = evolve(vm.measurements, image_bytes=files.image_bytes, image_to_memory=ratio)
    return evolve(vm, ram=files.ram, device_stream=files.device_stream, measurements=measurements)
