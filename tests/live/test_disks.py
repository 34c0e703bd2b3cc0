"""Disks at the cut: what was written before is in the snapshot, what was written after is not."""

from __future__ import annotations

from pathlib import Path

import pytest

import qsnap
from qsnap import Engine
from qsnap.host.qmp import open_loop, open_qmp
from tests.live.lab import QEMU_7, QEMU_11, make_vne


async def qemu_io(place: qsnap.Place, disk: int, command: str) -> str:
    """Let QEMU itself read or write a disk of the VM, below its device, as a guest's request would."""
    async with open_loop(), open_qmp(place.runtime().monitor_path("disks", "vm1"), vm="vm1") as qmp:
        line = f'qemu-io -d /machine/peripheral/disk{disk}-device/virtio-backend "{command}"'
        log = place.runtime().vm_directory("disks", "vm1") / "qemu.log"
        before = log.stat().st_size
        await qmp.execute("human-monitor-command", {"command-line": line})
    return log.read_text()[before:]  # it prints to QEMU's own output


async def holds(place: qsnap.Place, disk: int, pattern: int) -> bool:
    answer = await qemu_io(place, disk, f"read -P {pattern:#x} 0 64k")
    return "read 65536/65536" in answer and "failed" not in answer


async def write(place: qsnap.Place, pattern: int) -> None:
    for disk in (0, 1):
        answer = await qemu_io(place, disk, f"write -P {pattern:#x} 0 64k")
        assert "wrote 65536/65536" in answer


@pytest.fixture
def vne(tmp_path: Path, request: pytest.FixtureRequest) -> qsnap.VNE:
    disks = []
    for name in ("a", "b"):
        base = tmp_path / f"{name}.img"
        base.write_bytes(bytes(4 << 20))
        disks.append(qsnap.Disk(str(base), "raw"))
    return make_vne("disks", vms=1, qemu=request.param, disks=tuple(disks))


@pytest.mark.parametrize("vne", [QEMU_7, QEMU_11], indirect=True, ids=["7.2", "11.1"])
@pytest.mark.parametrize("engine", [Engine.BACKGROUND, Engine.AUTO], ids=["background", "auto"])
async def test_all_disks_are_of_the_same_cut(vne: qsnap.VNE, engine: Engine, place: qsnap.Place) -> None:
    await qsnap.up(vne, place=place)
    for pattern in (0x11, 0x22, 0x33):
        await write(place, pattern)
        await qsnap.snapshot("disks", f"with-{pattern:x}", engine=engine, place=place)
    await write(place, 0x44)
    await qsnap.down("disks", place=place)
    for disk in vne.vms[0].disks:
        assert not any(Path(disk.file).read_bytes()), "a base image was written to"
    await qsnap.remove("disks", "with-11", place=place)
    for pattern in (0x22, 0x33):
        await qsnap.restore("disks", f"with-{pattern:x}", place=place)
        assert [await holds(place, disk, pattern) for disk in (0, 1)] == [True, True]
        assert not await holds(place, 0, 0x44), "the comparison finds nothing"
        await qsnap.down("disks", place=place)
    await qsnap.remove("disks", "with-22", place=place)
    await qsnap.remove("disks", "with-33", place=place)
    assert list((place.store / "disks/disks").iterdir()) == [], "a layer was left behind"
