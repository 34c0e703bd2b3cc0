"""What goes wrong with disks: the VM runs on with the files it had, and nothing is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from cattrs.preconf.json import make_converter

import qsnap
from qsnap import DiskEngine, Engine
from qsnap.host.disks import DiskCut, DiskPlan, jobs, plan_disks, read_disks
from qsnap.host.disks.jobs import Report, find_job
from qsnap.host.qmp import Qmp, open_loop, open_qmp
from qsnap.host.starting import find_qemu_img
from tests.live.lab import QEMU_7, QEMU_11, make_vne
from tests.live.test_disks import bases, cloning_place, holds, write
from tests.live.test_faults import receivers

__all__ = ["bases", "cloning_place"]
QEMUS = pytest.mark.parametrize("qemu", [QEMU_7, QEMU_11], ids=["7.2", "11.1"])
NO_CUT = {"type": "blockdev-snapshot", "data": {"node": "nowhere", "overlay": "nowhere"}}
converter = make_converter()


@asynccontextmanager
async def open_vm(place: qsnap.Place) -> AsyncIterator[Qmp]:
    async with open_loop(), open_qmp(place.runtime().qmp_path("disks", "vm1"), vm="vm1") as qmp:
        yield qmp


async def check_unharmed(place: qsnap.Place) -> None:
    """The VM runs on what the state file names; no job and no other file is open; the store holds no more."""
    live = place.runtime().load("disks").vms[0]
    directory = place.store / "disks/disks"
    async with open_vm(place) as qmp:
        assert (await qmp.execute("query-status"))["status"] == "running"
        assert await read_disks(qmp, [disk.device for disk in live.disks], str(directory)) == live.disks
        assert await qmp.execute("query-jobs") == []
        nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
        assert {node["node-name"] for node in nodes if node["node-name"][0] != "#"} == {"disk0", "disk1"}
    assert {path.name for path in directory.iterdir()} == {Path(disk.layers[0].path).name for disk in live.disks}
    assert list((place.store / "disks/snapshots").iterdir()) == []


def before_finish(monkeypatch: pytest.MonkeyPatch, strike: Callable[[DiskCut], None]) -> None:
    """Let a fault strike when the VM runs on and its copies have begun."""
    finish = DiskCut.finish

    async def strike_and_finish(self: DiskCut, report: Report | None = None) -> None:
        strike(self)
        await finish(self, report)

    monkeypatch.setattr(DiskCut, "finish", strike_and_finish)


async def test_a_job_that_ends_while_it_is_ended(
    bases: tuple[qsnap.Disk, ...], place: qsnap.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What QEMU says of a job may be past by the time that it is cancelled."""
    await qsnap.up(make_vne("disks", vms=1, qemu=QEMU_11, disks=bases), place=place)
    async with open_vm(place) as qmp:
        looks = []

        async def look(qmp: Qmp, job: str) -> dict[str, Any] | None:
            found = await find_job(qmp, job)
            looks.append(found)
            return {**found, "status": "running"} if found and len(looks) == 1 else found

        await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "nowhere", "size": 1 << 20})
        job = {"job-id": "short", "device": "nowhere", "target": "nowhere-too", "sync": "full", "auto-dismiss": False}
        await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "nowhere-too", "size": 1 << 20})
        await qmp.execute("blockdev-backup", job)
        with trio.fail_after(30):
            while ((found := await find_job(qmp, "short")) or {})["status"] != "concluded":
                await trio.sleep(0.01)
        monkeypatch.setattr(jobs, "find_job", look)
        await jobs.end_job(qmp, "short")
        assert looks[0] == found
        assert await find_job(qmp, "short") is None


@QEMUS
async def test_the_store_fills_up_during_a_copy(
    qemu: str, bases: tuple[qsnap.Disk, ...], cloning_place: qsnap.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = cloning_place
    await qsnap.up(make_vne("disks", vms=1, qemu=qemu, disks=bases), place=place)
    await write(place, 0x11)
    filler = place.store / "filler"

    def fill_up(self: DiskCut) -> None:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass

    with monkeypatch.context() as patch:
        before_finish(patch, fill_up)
        with pytest.raises(qsnap.QsnapError, match=r"[Nn]o space|full"):
            await qsnap.snapshot("disks", "doomed", disks=DiskEngine.COPY, place=place)
    filler.unlink()
    await check_unharmed(place)
    assert await holds(place, 0x11)
    await qsnap.snapshot("disks", "again", disks=DiskEngine.COPY, place=place)


@QEMUS
async def test_the_receiver_is_killed_while_a_copy_is_under_way(
    qemu: str, bases: tuple[qsnap.Disk, ...], place: qsnap.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qsnap.up(make_vne("disks", vms=1, qemu=qemu, disks=bases), place=place)
    await write(place, 0x11)

    def kill(self: DiskCut) -> None:
        for process in receivers(place.store / "disks/snapshots/doomed"):
            os.kill(process.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        before_finish(patch, kill)
        with pytest.raises(qsnap.QsnapError):
            await qsnap.snapshot("disks", "doomed", disks=DiskEngine.COPY, engine=Engine.BACKGROUND, place=place)
    await check_unharmed(place)
    assert await holds(place, 0x11)


@pytest.mark.parametrize("cut", qsnap.Cut)
@pytest.mark.parametrize(
    ("qemu", "engine"), [(QEMU_7, Engine.BACKGROUND), (QEMU_11, Engine.BACKGROUND), (QEMU_11, Engine.PRECOPY)]
)
async def test_disks_that_cannot_be_cut(
    qemu: str,
    engine: Engine,
    cut: qsnap.Cut,
    bases: tuple[qsnap.Disk, ...],
    place: qsnap.Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """QEMU says so when the VM has stopped, or already runs again."""
    await qsnap.up(make_vne("disks", vms=1, qemu=qemu, disks=bases), place=place)
    with monkeypatch.context() as patch:
        patch.setattr(DiskCut, "_overlay_actions", lambda self: [NO_CUT])
        with pytest.raises(qsnap.QemuError, match=r"VM vm1: transaction: .*nowhere"):
            await qsnap.snapshot("disks", "doomed", engine=engine, cut=cut, disks=DiskEngine.OVERLAY, place=place)
    await check_unharmed(place)
    await qsnap.snapshot("disks", "again", engine=engine, cut=cut, disks=DiskEngine.OVERLAY, place=place)


async def test_a_store_with_too_little_room_is_named_before_the_pause(
    bases: tuple[qsnap.Disk, ...], cloning_place: qsnap.Place
) -> None:
    place = cloning_place
    await qsnap.up(make_vne("disks", vms=1, disks=bases), place=place)
    space = os.statvfs(place.store)
    with (place.store / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - (3 << 20))
    with pytest.raises(qsnap.EngineRefusedError, match="a copy takes"):
        await qsnap.snapshot("disks", "doomed", disks=DiskEngine.COPY, place=place)
    await check_unharmed(place)


async def test_a_file_system_that_cannot_clone_is_named(bases: tuple[qsnap.Disk, ...], place: qsnap.Place) -> None:
    await qsnap.up(make_vne("disks", vms=1, disks=bases), place=place)
    with pytest.raises(qsnap.EngineRefusedError, match="reflink: its file system cannot clone files"):
        await qsnap.snapshot("disks", "doomed", disks=DiskEngine.REFLINK, place=place)
    await check_unharmed(place)


async def start_merging_back(qmp: Qmp, plan: DiskPlan) -> None:
    """What an undo that is killed at once has begun."""
    for step in plan.of(DiskEngine.OVERLAY):
        arguments = {"job-id": f"undo-{step.node}", "device": step.node, "base-node": step.disk.node}
        await qmp.execute("block-commit", {**arguments, "auto-dismiss": False})


@QEMUS
@pytest.mark.parametrize("engine", [DiskEngine.OVERLAY, DiskEngine.COPY])
async def test_undo_in_another_process_from_any_step(
    engine: DiskEngine, qemu: str, bases: tuple[qsnap.Disk, ...], place: qsnap.Place
) -> None:
    """All that it has is the plan as JSON. It is done twice, as after an undo that was killed at its end."""
    await qsnap.up(make_vne("disks", vms=1, qemu=qemu, disks=bases), place=place)
    await write(place, 0x11)
    live = place.runtime().load("disks").vms[0]
    directory = str(place.store / "disks/disks")
    for reached in range(5):
        await write(place, 0x20 + reached)
        async with open_vm(place) as qmp:
            disks = await read_disks(qmp, [disk.device for disk in live.disks], directory)
            version, qemu_img = live.qemu_version, find_qemu_img(qemu)
            plan = await plan_disks(engine, "vm1", disks, directory=directory, version=version, qemu_img=qemu_img)
            cut = DiskCut(qmp, plan)
            if reached >= 1:
                await cut.prepare()
            if reached >= 2:
                await qmp.execute_all(("stop", {}), *cut.commands(), ("cont", {}))
        if reached >= 2:
            await write(place, 0x30 + reached)
        async with open_vm(place) as qmp:
            if reached == 3:
                await start_merging_back(qmp, plan)
            if reached == 4:
                for step in plan.of(DiskEngine.COPY):
                    await qmp.execute("block-job-set-speed", {"device": step.node, "speed": 0})
        kept = converter.loads(converter.dumps(plan), DiskPlan)
        assert kept == plan
        for _ in range(2):
            async with open_vm(place) as qmp:
                await DiskCut(qmp, kept).undo()
        await place.snapshots().collect("disks", place.runtime().load("disks").files_in_use())
        assert await holds(place, (0x30 if reached >= 2 else 0x20) + reached), f"step {reached}"
        (place.store / "disks/snapshots").mkdir(exist_ok=True)
        await check_unharmed(place)
