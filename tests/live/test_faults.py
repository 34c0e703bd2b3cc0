"""Faults in the middle of a snapshot: every VM runs on, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from pyroute2 import IPRoute

import qsnap
from qsnap import Cut, Engine
from qsnap.host.capture import Background
from qsnap.host.netns import run_in_netns
from qsnap.host.qemu import Process, find_processes
from qsnap.host.qmp import open_loop, open_qmp
from qsnap.host.runtime import LiveVNE, Runtime
from qsnap.rules.manifest import files_in
from testbed.guests import GuestConsole
from tests.live.lab import judge, make_vne, open_consoles, wait_ready

DEADLINE_S = 30.0


def bridges_of_taps() -> set[str]:
    with IPRoute() as ip:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in ip.get_links()}
        return {
            names[link.get_attr("IFLA_MASTER")]
            for link in ip.get_links()
            if str(link.get_attr("IFLA_IFNAME")).startswith("tap")
        }


async def check_unharmed(vne: str, place: qsnap.Place, states: list[str]) -> None:
    """Every VM is in the state it should be in, and nothing of the failed snapshot is left."""
    await check_nothing_left(vne, place, states)
    running = [vm.name for vm in (await qsnap.status(vne, place=place)).vms if vm.state == "running"]
    await check_guests_answer(vne, place, running)


async def check_nothing_left(vne: str, place: qsnap.Place, states: list[str]) -> None:
    """The same, without a word to the guests."""
    status = await qsnap.status(vne, place=place)
    assert [vm.state for vm in status.vms] == states
    assert await run_in_netns(status.netns, bridges_of_taps) == {f"net0-{status.colour.value}"}
    assert not place.runtime().interrupted()
    live = place.runtime().load(vne)
    store = Path(status.store) / vne
    kept = {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}
    saved = {file.path for snapshot in await qsnap.snapshots(vne, place=place) for file in files_in(snapshot)}
    needed = {path for path in (*saved, *live.files_in_use()) if not path.startswith(("snapshots/", "/"))}
    assert {path for path in kept if not path.startswith("snapshots/")} == needed
    assert {path.name for path in (store / "snapshots").glob("*")} == {
        snapshot.name for snapshot in await qsnap.snapshots(vne, place=place)
    }
    assert not receivers(store / "snapshots"), "a receiver was left behind"


async def check_guests_answer(vne: str, place: qsnap.Place, vms: list[str]) -> None:
    """A VM can be `running` and yet stand still, its threads waiting for a page that nobody unlocks."""
    for vm in vms:
        async with GuestConsole(qsnap.console_path(vne, vm, place=place)) as console:
            with trio.fail_after(DEADLINE_S):
                before = after = await console.status()
                while not (after.ticks > before.ticks and after.touched > before.touched):
                    after = await console.status()


def receivers(directory: Path) -> list[Process]:
    """The receivers that write somewhere below the directory."""
    return find_processes([f"--directory\0{directory}"])


async def wait_half_way(directory: Path) -> None:
    """Return when a good part of the VM's memory has been written."""
    image = directory / "pc.ram.ram"
    with trio.fail_after(DEADLINE_S):
        while not image.exists() or image.stat().st_blocks * 512 < 1 << 20:
            await trio.sleep(0.001)


async def fail_in_the_middle(
    vne: str, vm: str, place: qsnap.Place, fault: Callable[[], None], **options: object
) -> qsnap.QsnapError:
    """Take a snapshot and let the fault strike while the VM's RAM is being written; return the error it ends with."""
    directory = place.store / vne / "snapshots" / "doomed" / vm

    async def strike() -> None:
        await wait_half_way(directory)
        fault()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(strike)
        with pytest.raises(qsnap.QsnapError) as caught:
            await qsnap.snapshot(vne, "doomed", place=place, **options)  # type: ignore[arg-type]
    return caught.value


def kill_receiver(place: qsnap.Place, vne: str, vm: str) -> Callable[[], None]:
    def kill() -> None:
        (process,) = receivers(place.store / vne / "snapshots" / "doomed" / vm)
        os.kill(process.pid, signal.SIGKILL)

    return kill


KINDS = [
    ("seven", Engine.BACKGROUND, Cut.COLOUR),
    ("eleven", Engine.BACKGROUND, Cut.BARRIER),
    ("eleven", Engine.PRECOPY, Cut.COLOUR),
]


@pytest.mark.parametrize(("vne", "engine", "cut"), KINDS)
async def test_receiver_killed(
    vne: str, engine: Engine, cut: Cut, golden: qsnap.Place, eleven: qsnap.Place, seven: qsnap.Place
) -> None:
    await qsnap.restore(vne, "booted", place=golden)
    fault = kill_receiver(golden, vne, "vm2")
    error = await fail_in_the_middle(vne, "vm2", golden, fault, engine=engine, cut=cut)
    assert "VM vm2" in str(error)
    await check_unharmed(vne, golden, ["running"] * 3)
    again = await qsnap.snapshot(vne, "again", engine=engine, cut=cut, place=golden)
    assert (judge(again, golden).orphans, judge(again, golden).wrong_stamps) == (0, 0)


@pytest.mark.parametrize("engine", [Engine.BACKGROUND, Engine.PRECOPY])
async def test_qemu_killed(engine: Engine, eleven: qsnap.Place) -> None:
    await qsnap.restore("eleven", "booted", place=eleven)
    pid = eleven.runtime().load("eleven").vms[1].process.pid
    error = await fail_in_the_middle("eleven", "vm2", eleven, lambda: os.kill(pid, signal.SIGKILL), engine=engine)
    assert "VM vm2" in str(error)
    await check_unharmed("eleven", eleven, ["running", "dead", "running"])
    with pytest.raises(qsnap.StateError, match="vm2 is dead"):
        await qsnap.snapshot("eleven", "again", place=eleven)


@pytest.fixture
def small_store(place: qsnap.Place) -> Iterator[qsnap.Place]:
    """A place whose store is a tmpfs with room for less than one VM's memory."""
    place.store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place.store)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place.store)], check=True)


@pytest.mark.parametrize("engine", [Engine.BACKGROUND, Engine.PRECOPY])
async def test_store_full(engine: Engine, small_store: qsnap.Place, tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(bytes(1 << 20))
    await qsnap.up(make_vne("full", vms=1, disks=(qsnap.Disk(str(base), "raw"),)), place=small_store)
    async with open_consoles("full", small_store, 1) as consoles:
        await wait_ready(consoles)
    with pytest.raises(qsnap.HostError, match="full"):
        await qsnap.snapshot("full", "doomed", engine=engine, place=small_store)
    await check_unharmed("full", small_store, ["running"])
    await qsnap.down("full", place=small_store)


async def test_second_snapshot_is_refused(eleven: qsnap.Place) -> None:
    await qsnap.restore("eleven", "booted", place=eleven)
    started = trio.Event()

    def progress(stage: str, vm: str, done: int, total: int) -> None:
        started.set()

    async def first() -> None:
        await qsnap.snapshot("eleven", "first", place=eleven, progress=progress)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await started.wait()
        with pytest.raises(qsnap.BusyError, match="at work"):
            await qsnap.snapshot("eleven", "second", place=eleven)
    assert {saved.name for saved in await qsnap.snapshots("eleven", place=eleven)} == {"booted", "first"}
    await check_unharmed("eleven", eleven, ["running"] * 3)


@pytest.mark.parametrize("step", ["halt", "stop"])
@pytest.mark.parametrize("vne", ["seven", "eleven"])
async def test_failure_when_vms_are_stopped(
    vne: str, step: str, golden: qsnap.Place, eleven: qsnap.Place, seven: qsnap.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All VMs are prepared, or halted, and then they cannot be cut."""

    async def fail(self: Background, *arguments: object) -> None:
        raise qsnap.QemuError("it cannot be stopped", where=f"VM {self.qmp.vm}")

    await qsnap.restore(vne, "booted", place=golden)
    with monkeypatch.context() as patch, trio.fail_after(DEADLINE_S):
        patch.setattr(Background, step, fail)
        with pytest.raises(qsnap.QemuError):
            await qsnap.snapshot(vne, "doomed", engine=Engine.BACKGROUND, place=golden)
    await check_unharmed(vne, golden, ["running"] * 3)
    await qsnap.snapshot(vne, "again", engine=Engine.BACKGROUND, place=golden)


@pytest.mark.parametrize("vne", ["seven", "eleven"])
async def test_cancelled(vne: str, golden: qsnap.Place, eleven: qsnap.Place, seven: qsnap.Place) -> None:
    """Ctrl-C in the middle is a fault like any other."""
    await qsnap.restore(vne, "booted", place=golden)
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: qsnap.snapshot(vne, "doomed", engine=Engine.BACKGROUND, place=golden))
            await wait_half_way(golden.store / vne / "snapshots/doomed/vm1")
            nursery.cancel_scope.cancel()
        await check_unharmed(vne, golden, ["running"] * 3)
    await qsnap.snapshot(vne, "again", engine=Engine.BACKGROUND, place=golden)


async def test_disks_are_merged_back(place: qsnap.Place, tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(bytes(1 << 20))
    await qsnap.up(make_vne("disks", vms=1, disks=(qsnap.Disk(str(base), "raw"),)), place=place)
    async with open_consoles("disks", place, 1) as consoles:
        await wait_ready(consoles)
    before = place.runtime().load("disks").vms[0].disks
    for engine in (Engine.BACKGROUND, Engine.PRECOPY):
        await fail_in_the_middle("disks", "vm1", place, kill_receiver(place, "disks", "vm1"), engine=engine)
        assert place.runtime().load("disks").vms[0].disks == before
        await check_unharmed("disks", place, ["running"])
    await qsnap.snapshot("disks", "good", place=place)
    await check_unharmed("disks", place, ["running"])


async def test_after_the_commit_nothing_is_undone(
    place: qsnap.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state file cannot be written any more; the snapshot stands, and so do the layers that it consists of."""
    base = tmp_path / "base.img"
    base.write_bytes(bytes(1 << 20))
    await qsnap.up(make_vne("disks", vms=1, disks=(qsnap.Disk(str(base), "raw"),)), place=place)

    def fail(self: Runtime, live: LiveVNE) -> None:
        raise qsnap.HostError("no space left", where=str(self.root))

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "save", fail)
        with pytest.raises(qsnap.HostError, match="no space left"):
            await qsnap.snapshot("disks", "stands", place=place)
    assert (await qsnap.status("disks", place=place)).vms[0].state == "running"
    async with open_loop(), open_qmp(place.runtime().monitor_path("disks", "vm1"), vm="vm1") as qmp:
        (disk,) = await qmp.execute("query-block")
    assert disk["inserted"]["node-name"].startswith("layer-"), "the snapshot's layer is being written to"
    await qsnap.verify("disks", "stands", place=place)
    await qsnap.down("disks", place=place)
    await qsnap.restore("disks", "stands", place=place)
