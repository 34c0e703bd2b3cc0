"""Disks at the cut: what was written before is in the snapshot, what was written after is not."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

import qsnap
from qsnap import DiskEngine, Engine
from qsnap.host.disks import DiskCut, plan_disks, read_disks
from qsnap.host.disks.cut import SETTLE_S
from qsnap.host.disks.images import sync_file
from qsnap.host.disks.jobs import Report
from qsnap.host.qmp import open_loop, open_qmp
from qsnap.host.saving import Saving
from tests.live.lab import QEMU_7, QEMU_10, QEMU_11, make_vne

KINDS = [
    (QEMU_7, Engine.BACKGROUND, DiskEngine.OVERLAY),
    (QEMU_7, Engine.BACKGROUND, DiskEngine.REFLINK),
    (QEMU_7, Engine.BACKGROUND, DiskEngine.COPY),
    (QEMU_10, Engine.PRECOPY, DiskEngine.COPY),
    (QEMU_11, Engine.BACKGROUND, DiskEngine.REFLINK),
    (QEMU_11, Engine.BACKGROUND, DiskEngine.COPY),
    (QEMU_11, Engine.PRECOPY, DiskEngine.OVERLAY),
    (QEMU_11, Engine.PRECOPY, DiskEngine.REFLINK),
    (QEMU_11, Engine.PRECOPY, DiskEngine.COPY),
]
VERSIONS = {QEMU_7: "7.2", QEMU_10: "10.0", QEMU_11: "11.1"}
IDS = [f"{VERSIONS[qemu]}-{engine.value}-{disks.value}" for qemu, engine, disks in KINDS]
SIZE = 4 << 20


async def qemu_io(place: qsnap.Place, disk: int, command: str) -> str:
    """Let QEMU itself read or write a disk of the VM, below its device, as a guest's request would."""
    async with open_loop(), open_qmp(place.runtime().monitor_path("disks", "vm1"), vm="vm1") as qmp:
        line = f'qemu-io -d /machine/peripheral/disk{disk}-device/virtio-backend "{command}"'
        log = place.runtime().vm_directory("disks", "vm1") / "qemu.log"
        before = log.stat().st_size
        await qmp.execute("human-monitor-command", {"command-line": line})
    return log.read_text()[before:]  # it prints to QEMU's own output


async def holds(place: qsnap.Place, pattern: int, offset: str = "0") -> bool:
    """Whether both disks hold the pattern."""
    answers = [await qemu_io(place, disk, f"read -P {pattern:#x} {offset} 64k") for disk in (0, 1)]
    assert all("read 65536/65536" in answer for answer in answers)
    return not any("failed" in answer for answer in answers)


async def write(place: qsnap.Place, pattern: int, offset: str = "0") -> None:
    for disk in (0, 1):
        answer = await qemu_io(place, disk, f"write -P {pattern:#x} {offset} 64k")
        assert "wrote 65536/65536" in answer


@pytest.fixture
def bases(tmp_path: Path) -> tuple[qsnap.Disk, qsnap.Disk]:
    """A raw and a qcow2 image, both full of 0xee."""
    raw, qcow2 = tmp_path / "a.raw", tmp_path / "b.qcow2"
    raw.write_bytes(b"\xee" * SIZE)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    return qsnap.Disk(str(raw), "raw"), qsnap.Disk(str(qcow2))


@contextmanager
def mounted(directory: Path, kind: str) -> Iterator[None]:
    """A new file system of that kind at `directory`."""
    image = directory.with_suffix(f".{kind}")
    with image.open("xb") as file:
        file.truncate(512 << 20)
    directory.mkdir()
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "loop", image, directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)
        image.unlink()


@pytest.fixture
def cloning_place(place: qsnap.Place, request: pytest.FixtureRequest) -> Iterator[qsnap.Place]:
    """A place whose store is on a file system that clones files, XFS unless another is asked for."""
    with mounted(place.store, getattr(request, "param", "xfs")):
        yield place


@pytest.mark.parametrize(("qemu", "engine", "disks"), KINDS, ids=IDS)
async def test_all_disks_are_of_the_same_cut(
    qemu: str,
    engine: Engine,
    disks: DiskEngine,
    bases: tuple[qsnap.Disk, ...],
    cloning_place: qsnap.Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy is written to while it is under way."""
    place, finish = cloning_place, DiskCut.finish

    async def write_and_finish(self: DiskCut, report: Report | None = None) -> None:
        copies = await self.qmp.execute("query-block-jobs")
        assert len(copies) == 2 * (disks is DiskEngine.COPY)
        await write(place, 0x66, "2M")
        await finish(self, report)

    monkeypatch.setattr(DiskCut, "finish", write_and_finish)
    before = [Path(disk.file).read_bytes() for disk in bases]
    await qsnap.up(make_vne("disks", vms=1, qemu=qemu, disks=bases), place=place)
    for pattern in (0x11, 0x22, 0x33):
        await write(place, pattern)
        await write(place, 0x55, "2M")
        saved = await qsnap.snapshot("disks", f"with-{pattern:x}", engine=engine, disks=disks, place=place)
        assert [disk.engine for disk in saved.vms[0].disks] == [disks] * 2
        assert await holds(place, 0x66, "2M")
    await write(place, 0x44)
    await qsnap.down("disks", place=place)
    assert [Path(disk.file).read_bytes() for disk in bases] == before, "a base image was written to"
    await qsnap.remove("disks", "with-11", place=place)
    for pattern in (0x22, 0x33):
        await qsnap.restore("disks", f"with-{pattern:x}", place=place)
        assert await holds(place, pattern)
        assert await holds(place, 0x55, "2M"), "what was written after the cut is in the snapshot"
        assert await holds(place, 0xEE, "3M")
        assert not await holds(place, 0x44), "the comparison finds nothing"
        await qsnap.down("disks", place=place)
    for pattern in (0x22, 0x33):
        await qsnap.verify("disks", f"with-{pattern:x}", place=place)
        await qsnap.remove("disks", f"with-{pattern:x}", place=place)
    assert list((place.store / "disks/disks").iterdir()) == [], "a layer was left behind"


@pytest.fixture
def device(bases: tuple[qsnap.Disk, ...]) -> Iterator[str]:
    """A block device with the content of the raw image."""
    attached = subprocess.run(["losetup", "-f", "--show", bases[0].file], check=True, capture_output=True, text=True)
    yield attached.stdout.strip()
    subprocess.run(["losetup", "-d", attached.stdout.strip()], check=True)


async def test_a_block_device_is_known_again(bases: tuple[qsnap.Disk, ...], device: str, place: qsnap.Place) -> None:
    """By its size: the time of its name is that of the last boot."""
    await qsnap.up(make_vne("disks", vms=1, disks=(qsnap.Disk(device, "raw"), bases[1])), place=place)
    await write(place, 0x11)
    saved = await qsnap.snapshot("disks", "cut", place=place)
    await qsnap.down("disks", place=place)
    base = saved.vms[0].disks[0].base
    assert base is not None
    assert (base.size_bytes, base.mtime_ns) == (SIZE, 0)
    Path(device).touch()
    await qsnap.restore("disks", "cut", place=place)
    assert await holds(place, 0x11)
    assert await holds(place, 0xEE, "3M")
    await qsnap.down("disks", place=place)
    os.truncate(bases[0].file, SIZE // 2)
    await trio.run_process(["losetup", "-c", device])
    with pytest.raises(qsnap.IntegrityError, match="base image of VM vm1 was changed"):
        await qsnap.restore("disks", "cut", place=place)


@pytest.mark.parametrize("qemu", [QEMU_7, QEMU_11], ids=["7.2", "11.1"])
async def test_five_generations(qemu: str, bases: tuple[qsnap.Disk, ...], cloning_place: qsnap.Place) -> None:
    """Each VNE is restored from a snapshot of the one before, kept in another way; then the store is moved."""
    place = cloning_place
    await qsnap.up(make_vne("disks", vms=1, qemu=qemu, disks=bases), place=place)
    engines = [*(each for each in DiskEngine if each is not DiskEngine.LVM), DiskEngine.OVERLAY]
    for generation, engine in enumerate(engines):
        await write(place, 0x10 + generation, f"{generation * 64}k")
        await qsnap.snapshot("disks", f"g{generation}", disks=engine, place=place)
        await write(place, 0xFF, f"{generation * 64}k")
        await qsnap.down("disks", place=place)
        await qsnap.restore("disks", f"g{generation}", place=place)
    await qsnap.down("disks", place=place)
    moved = place.store / "moved"
    moved.mkdir()
    (place.store / "disks").rename(moved / "disks")
    elsewhere = qsnap.Place(place.run, moved)
    for generation in reversed(range(len(engines))):
        await qsnap.restore("disks", f"g{generation}", place=elsewhere)
        for written in range(len(engines)):
            pattern = 0x10 + written if written <= generation else 0xEE
            assert await holds(elsewhere, pattern, f"{written * 64}k")
        await qsnap.down("disks", place=elsewhere)
        await qsnap.remove("disks", f"g{generation}", place=elsewhere)


async def test_files_to_be_cloned_are_written_out_before_the_cut(
    bases: tuple[qsnap.Disk, ...], cloning_place: qsnap.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again and again while it waits for others: or one host's disks would hold up its own cut, but not theirs."""
    synced: list[str] = []
    at_cut: list[int] = []
    cut = Saving.cut

    def note(path: str) -> None:
        synced.append(path)
        sync_file(path)

    async def dawdle(self: Saving, at_s: float) -> None:
        at_cut.append(len(synced))
        await trio.sleep(10 * SETTLE_S)
        at_cut.append(len(synced))
        await cut(self, at_s)

    monkeypatch.setattr("qsnap.host.disks.cut.sync_file", note)
    monkeypatch.setattr(Saving, "cut", dawdle)
    await qsnap.up(make_vne("disks", vms=1, qemu=QEMU_11, disks=bases), place=cloning_place)
    await qsnap.snapshot("disks", "s1", disks=DiskEngine.REFLINK, place=cloning_place)
    before, after = at_cut
    assert before > 0
    assert after - before > 2
    assert after < len(synced)
    ended = len(synced)
    await trio.sleep(5 * SETTLE_S)
    assert len(synced) == ended


@pytest.mark.parametrize("qemu", [QEMU_7, QEMU_11], ids=["7.2", "11.1"])
@pytest.mark.parametrize(
    ("cloning_place", "engine"),
    [("xfs", DiskEngine.REFLINK), ("btrfs", DiskEngine.REFLINK), ("ext4", DiskEngine.COPY)],
    indirect=["cloning_place"],
)
async def test_files_of_the_users_stay_in_use(
    qemu: str, engine: DiskEngine, bases: tuple[qsnap.Disk, ...], cloning_place: qsnap.Place
) -> None:
    """Disks outside the store are cloned, and where that is impossible copied as a whole, and never overlaid."""
    place, directory = cloning_place, str(cloning_place.store / "elsewhere")
    await qsnap.up(make_vne("disks", vms=1, qemu=qemu, disks=bases), place=place)
    await write(place, 0x11)
    Path(directory).mkdir()
    live = place.runtime().load("disks").vms[0]
    async with open_loop(), open_qmp(place.runtime().qmp_path("disks", "vm1"), vm="vm1") as qmp:
        disks = await read_disks(qmp, [disk.device for disk in live.disks], directory)
        assert not any(disk.layers for disk in disks)
        plan = await plan_disks(
            DiskEngine.AUTO, "vm1", disks, directory=directory, version=live.qemu_version, qemu_img="qemu-img"
        )
        assert [step.engine for step in plan.steps] == [engine] * 2
        cut = DiskCut(qmp, plan)
        await cut.prepare()
        await qmp.execute_all(("stop", {}), *cut.commands())
        await cut.clone()
        await qmp.execute("cont")
        await write(place, 0x22)
        await cut.finish()
        assert await read_disks(qmp, [disk.device for disk in disks], directory) == disks
    for step in plan.steps:
        layers, below = step.saved
        assert bool(below) == (engine is DiskEngine.REFLINK), "a copy is complete, a clone lies on what the disk lay on"
        reads = ["-c", "read -P 0x11 0 64k", "-c", "read -P 0xee 64k 64k"]
        found = await trio.run_process(["qemu-io", "-r", *reads, layers[0].path], capture_stdout=True)
        assert found.stdout.count(b"read 65536/65536") == 2
        assert b"failed" not in found.stdout
