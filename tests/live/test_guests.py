"""The kinds of guests that users bring: each is saved by every engine, killed, restored, and lives on from the cut."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

import qsnap
from qsnap import Backing, Disk, Engine, EngineRefusedError
from qsnap.host.memory import data_extents
from testbed.state import PAGE_BYTES, STAMP_MAGIC
from tests.live.lab import (
    QEMU_7,
    QEMU_7_ARM,
    QEMU_11_ARM,
    READY_S,
    check_continues,
    judge,
    make_vne,
    open_consoles,
    ram_path,
    statuses,
    wait_ready,
)

MIB = 1 << 20
NODES = {"memory": 192 * MIB, "numa": (96 * MIB, 96 * MIB), "guest": {"dirty_mb": 80}}
DIMMS = {"dimms": (128 * MIB, 128 * MIB), "guest": {"dirty_mb": 160}, "boot": "memhp_default_state=online"}
UEFI = tuple(Disk(f"/usr/share/OVMF/OVMF_{part}_4M.fd", "raw", "pflash") for part in ("CODE", "VARS"))
VIRT = {"machine": "virt", "cpu": "cortex-a57", "memory": 192 * MIB, "boot": "console=ttyAMA0"}
BELOW_4_GIB = 2 << 30  #: of a q35 with as much memory as HIGH has; the rest is above 4 GiB
MICROVM = {"machine": "microvm", "boot": "tsc_early_khz=1000000 no_timer_check"}  # it has no timer to measure others by
HIGH = {"machine": "q35", "memory": 3584 * MIB, "vms": 1}
BOTH = (Engine.BACKGROUND, Engine.PRECOPY)

KINDS: dict[str, tuple[tuple[Engine, ...], dict[str, Any]]] = {
    "tmpfs-two-processors": (BOTH, {"backing": Backing.TMPFS, "vcpus": 2}),
    "numa-hugetlb": ((Engine.BACKGROUND,), {**NODES, "backing": Backing.HUGETLB}),
    "dimms-7.2": ((Engine.BACKGROUND,), {**DIMMS, "qemu": QEMU_7}),
    "microvm": (BOTH, {**MICROVM, "nic": "virtio-net-device", "interfaces": ("virtio-blk-device",)}),
    "above-4-gib": ((Engine.PRECOPY,), HIGH),
    "uefi-disks-nics": (
        BOTH,
        {
            "machine": "q35",
            "memory": 192 * MIB,
            "disks": UEFI,
            "networks": 2,
            "interfaces": ("virtio-blk-pci", "ide-hd"),
            "guest": {"net": "10.0.0,10.0.1"},
        },
    ),
    "disks-on-buses": (
        BOTH,
        {
            "machine": "q35",
            "interfaces": ("ide-hd,bus=ide.2", "scsi-hd,rotation_rate=1"),
            "extra": ("-device", "virtio-scsi-pci"),
        },
    ),
    "virt": (BOTH, {**VIRT, "qemu": QEMU_11_ARM}),
    "virt-7.2": ((Engine.BACKGROUND,), {**VIRT, "qemu": QEMU_7_ARM, "backing": Backing.MEMFD}),
}


def make_kind(directory: Path, *, interfaces: tuple[str, ...] = (), **settings: Any) -> qsnap.VNE:
    """A VNE of this kind, whose VMs share the base images."""
    disks = list(settings.pop("disks", ()))
    for interface in interfaces:
        base = directory / f"{interface}.img"
        base.write_bytes(bytes(4 * MIB))
        disks.append(Disk(str(base), "raw", interface))
    return make_vne("kind", **{"vms": 2, **settings}, disks=tuple(disks))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_saved_by_each_engine_and_restored(
    kind: tuple[tuple[Engine, ...], dict[str, Any]], place: qsnap.Place, tmp_path: Path
) -> None:
    engines, settings = kind
    vne = make_kind(tmp_path, **settings)
    await qsnap.up(vne, place=place)
    await wait_booted(place)
    async with open_consoles("kind", place, len(vne.vms)) as consoles:
        await wait_ready(consoles)
    for engine in engines:
        saved = await qsnap.snapshot("kind", engine.value, engine=engine, place=place)
        verdict = judge(saved, place)
        assert verdict.wrong_stamps == 0
        for vm in saved.vms:
            assert sum(block.used_length for block in vm.ram) == vm.vm.ram_bytes
            assert len(vm.disks) == len(vm.vm.disks)
        if settings is HIGH:
            assert holds_stamps(ram_path(saved, place, 0), BELOW_4_GIB)
        for status in (await qsnap.status("kind", place=place)).vms:
            os.kill(status.pid, signal.SIGKILL)
        await qsnap.restore("kind", engine.value, place=place)
        async with open_consoles("kind", place, len(vne.vms)) as consoles:
            await check_continues(consoles, verdict.states)


async def wait_booted(place: qsnap.Place) -> None:
    """Return when every guest has spoken. QEMU's pl011 reads no more if it was sent too much before Linux set it up."""
    with trio.fail_after(READY_S):
        for log in place.run.glob("kind/*/console.log"):
            while b'"ready"' not in log.read_bytes():
                await trio.sleep(0.1)


def holds_stamps(path: Path, start: int) -> bool:
    """Whether there is a page of a guest's working set from this offset on."""
    with path.open("rb") as file:
        for begin, end in data_extents(file.fileno(), path.stat().st_size):
            for offset in range(max(begin, start), end, PAGE_BYTES):
                if os.pread(file.fileno(), len(STAMP_MAGIC), offset) == STAMP_MAGIC:
                    return True
    return False


MEMORY_DEVICE = ("-object", "memory-backend-ram,id=more,size=64M", "-device", "virtio-mem-pci,id=growing,memdev=more")

REFUSED = {
    "a device that cannot migrate": (("-device", "nec-usb-xhci", "-device", "usb-uas"), Engine.AUTO, "usb-uas"),
    "virtio-mem": (("-m", "maxmem=256M", *MEMORY_DEVICE), Engine.BACKGROUND, "virtio-mem device growing"),
    "memory in pieces": (("-object", "memory-backend-ram,id=more,size=64M"), Engine.PRECOPY, "several pieces"),
}


@pytest.mark.parametrize(("extra", "engine", "named"), REFUSED.values(), ids=REFUSED)
async def test_a_refusal_names_the_cause_and_pauses_nothing(
    extra: tuple[str, ...], engine: Engine, named: str, place: qsnap.Place
) -> None:
    await qsnap.up(make_vne("kind", vms=1, memory=192 * MIB, extra=extra), place=place)
    async with open_consoles("kind", place, 1) as consoles:
        await wait_ready(consoles)
        with pytest.raises(EngineRefusedError, match=named) as caught:
            await qsnap.snapshot("kind", "never", engine=engine, place=place)
        assert caught.value.advice
        (state,) = await statuses(consoles)
        assert state.ready
    assert await qsnap.snapshots("kind", place=place) == ()


async def test_a_guest_that_has_nothing_to_do_waits(place: qsnap.Place) -> None:
    """A turn of its loop takes long where it is emulated: many guests would take the processors from what is tested."""
    await qsnap.up(make_vne("idle", vms=1, guest={"rate_mb": 0, "udp": 0, "tcp": 0}), place=place)
    async with open_consoles("idle", place, 1) as consoles:
        await wait_ready(consoles)
        (before,) = await statuses(consoles)
        await trio.sleep(2)
        (after,) = await statuses(consoles)
        assert 0 < after.ticks - before.ticks < 200
