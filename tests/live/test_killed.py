"""qsnap killed with SIGKILL before each step of each operation: whoever comes next finishes it or undoes it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGKILL

import pytest
import trio
from pyroute2 import IPRoute, netns

import qsnap
from qsnap.host.disks import read_disks
from qsnap.host.journal import Kind, Operation
from qsnap.host.netns import run_in_netns
from qsnap.host.qemu import find_processes
from qsnap.host.qmp import open_loop, open_qmp
from qsnap.rules.colouring import bridge_name, tap_name
from tests.live.lab import GUEST, QEMU_7, QEMU_11, ROOT, finish, make_vne, open_consoles, statuses, wait_ready
from tests.live.test_faults import check_unharmed, receivers, wait_half_way

MOST_STEPS = 200
QUIET = {"rate_mb": 2, "udp": 20}  #: other tests are about guests under load
PATIENCE_S = 60


def run_killed(fatal: int, place: qsnap.Place, *operation: str) -> list[str] | None:
    """Run an operation that dies before its step `fatal`; its steps if it had fewer."""
    command = [sys.executable, "-m", "tests.live.killing", str(fatal), str(place.run), str(place.store), *operation]
    with tempfile.TemporaryFile("w+") as output:  # no pipe: what outlives the process would keep it open
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, timeout=PATIENCE_S, check=False)
        output.seek(0)
        said = output.read()
    if done.returncode == -SIGKILL:
        return None
    assert done.returncode == 0, said
    return said.split("\n")


async def kill_at_each_step(check: Callable[[], Awaitable[bool]], place: qsnap.Place, *operation: str) -> None:
    """Kill the operation before its first step, its second ... until it has no more, and put things right after each.

    `check` looks at what there is then, and says whether the operation was finished; else it was undone.
    """
    outcomes = set()
    for fatal in range(1, MOST_STEPS):
        steps = await trio.to_thread.run_sync(run_killed, fatal, place, *operation)
        with trio.fail_after(PATIENCE_S):
            await qsnap.recover(place=place)
            while place.runtime().interrupted():  # a receiver that lost its parent may be at it already
                await trio.sleep(0.05)
        outcomes.add(await check())
        if steps is not None:
            assert len(steps) > 5, f"these are no steps: {steps}"
            assert outcomes == {True, False}
            return
    pytest.fail(f"more than {MOST_STEPS} steps")


@asynccontextmanager
async def booted(place: qsnap.Place, base: Path, *, vms: int, qemu: str) -> AsyncIterator[None]:
    """A VNE `lab` whose guests exchange traffic; at the end it is seen to do so still, without a wrong byte."""
    disks = (qsnap.Disk(str(base), "raw"),)
    async with qsnap.running(make_vne("lab", vms=vms, qemu=qemu, disks=disks, guest=QUIET), place=place):
        async with open_consoles("lab", place, vms) as consoles:
            await wait_ready(consoles)
        yield
        async with open_consoles("lab", place, vms) as consoles:
            await finish(consoles)
            for state in await statuses(consoles):
                assert state.stamp_errors == state.stream_errors == 0
                assert state.streams_completed == state.streams_matched
                assert state.streams_completed > 0 or vms == 1


@pytest.fixture
def base(tmp_path: Path) -> Path:
    image = tmp_path / "base.img"
    image.write_bytes(bytes(1 << 20))
    return image


async def check_running(place: qsnap.Place, vms: int) -> None:
    """Every VM runs, as `check_wired` has it, and its guest answers."""
    await check_wired(place, "lab", vms)
    async with open_consoles("lab", place, vms) as consoles:
        await statuses(consoles)  # a guest whose memory was left protected does not answer


async def check_wired(place: qsnap.Place, vne: str, vms: int) -> None:
    """Every VM runs, no migration is left, and its tap and its disk are those that the state file names."""
    live = place.runtime().load(vne)
    found = await qsnap.status(vne, place=place)
    assert [vm.state for vm in found.vms] == ["running"] * vms
    masters = await run_in_netns(live.netns, masters_of_links)
    async with open_loop():
        for index, vm in enumerate(live.vms):
            assert masters[tap_name(index, 0)] == bridge_name(live.vne, 0, live.active)
            async with open_qmp(place.runtime().qmp_path(vne, vm.vm.name), vm=vm.vm.name) as qmp:
                capabilities = await qmp.execute("query-migrate-capabilities")
                devices = [each.device for each in vm.disks]
                real = await read_disks(qmp, devices, f"{live.store}/{vne}/disks")
                for disk, known in zip(real, vm.disks, strict=True):
                    assert disk.node == known.node
                    assert set(disk.layers) <= set(known.layers)  # a merge of layers may have ended alone
            assert not [each for each in capabilities if each["capability"] == "background-snapshot" and each["state"]]


def masters_of_links() -> dict[str, str]:
    with IPRoute() as ip:
        links = {link["index"]: link for link in ip.get_links()}
        return {
            link.get_attr("IFLA_IFNAME"): links[master].get_attr("IFLA_IFNAME")
            for link in links.values()
            if (master := link.get_attr("IFLA_MASTER")) in links
        }


async def check_store(place: qsnap.Place, vne: str = "lab") -> set[str]:
    """What is in the store is what its snapshots and running VMs need. Returns the names of the snapshots."""
    names = {saved.name for saved in await qsnap.snapshots(vne, place=place)}
    for name in names:
        await qsnap.verify(vne, name, place=place)
    home = place.store / vne
    before = {path for path in home.rglob("*") if path.is_file()} if home.exists() else set()
    up = vne in place.runtime().names()
    in_use = place.runtime().load(vne).files_in_use() if up else ()
    assert await place.snapshots().collect(vne, in_use) == (), before
    assert {path.name for path in (home / "snapshots").glob("*")} == names
    return names


async def check_processes(place: qsnap.Place) -> None:
    """Only VMs are left: no receiver, and soon nobody who puts things right."""
    up = "lab" in place.runtime().names()
    expected = {vm.process.pid for vm in place.runtime().load("lab").vms} if up else set()
    with trio.fail_after(PATIENCE_S):
        while {process.pid for process in find_processes([str(place.run), str(place.store)])} != expected:
            await trio.sleep(0.1)


@pytest.mark.parametrize(
    ("qemu", "vms", "engine", "cut", "disks"),
    [
        (QEMU_11, 2, "background", "colour", "overlay"),
        (QEMU_11, 1, "precopy", "barrier", "copy"),
        (QEMU_7, 1, "background", "barrier", "overlay"),
        (QEMU_7, 1, "background", "barrier", "copy"),
    ],
)
async def test_snapshot(qemu: str, vms: int, engine: str, cut: str, disks: str, place: qsnap.Place, base: Path) -> None:
    async def check() -> bool:
        await check_processes(place)
        await check_running(place, vms)
        names = await check_store(place)
        if names:
            await qsnap.remove("lab", "new", place=place)
        return bool(names)

    async with booted(place, base, vms=vms, qemu=qemu):
        await kill_at_each_step(
            check, place, "snapshot", "lab", "new", f"engine={engine}", f"cut={cut}", f"disks={disks}"
        )


async def test_image_tool(place: qsnap.Place, base: Path) -> None:
    """A qemu-img that outlives the qsnap that started it, and would make its image after all was put right."""
    base.write_bytes(os.urandom(8 << 20))
    async with booted(place, base, vms=1, qemu=QEMU_11):
        late = place.store / "lab/disks/late.qcow2"
        slow = ["qemu-img", "convert", "-r", "65536", "-O", "qcow2", "-f", "raw", str(base), str(late)]
        tool = await trio.lowlevel.open_process(slow)
        try:
            place.runtime().journal("lab").begin(Operation(Kind.SNAPSHOT, "new"))
            with trio.fail_after(PATIENCE_S):
                while not late.exists():
                    await trio.sleep(0.01)
                assert await qsnap.recover(place=place) == ("lab",)
            assert not late.exists()
            assert not find_processes([str(late)])
        finally:
            tool.kill()
            await tool.wait()
        await check_running(place, 1)


@pytest.mark.parametrize("ram", ["map", "eager"])
async def test_restore(ram: str, place: qsnap.Place, base: Path) -> None:
    async def check() -> bool:
        restored = await check_all_or_nothing(place)
        if restored:
            await qsnap.down("lab", place=place)
        return restored

    await save(place, base)
    await kill_at_each_step(check, place, "restore", "lab", "saved", f"ram={ram}")
    await qsnap.verify("lab", "saved", place=place)


async def test_down(place: qsnap.Place, base: Path) -> None:
    async def check() -> bool:
        ended = not await check_all_or_nothing(place)
        if ended:
            await qsnap.restore("lab", "saved", place=place)
        return ended

    await save(place, base)
    await qsnap.restore("lab", "saved", place=place)
    await kill_at_each_step(check, place, "down", "lab")
    await qsnap.down("lab", place=place)


async def save(place: qsnap.Place, base: Path) -> None:
    """Leave a snapshot `saved` of a VNE that is down."""
    async with booted(place, base, vms=2, qemu=QEMU_11):
        await qsnap.snapshot("lab", "saved", place=place)


async def check_all_or_nothing(place: qsnap.Place) -> bool:
    """The VNE is up with all its VMs, or nothing of it is left. Returns whether it is up."""
    await check_processes(place)
    await check_store(place)
    if "lab" in place.runtime().names():
        await check_running(place, 2)
        return True
    assert place.runtime().netns("lab") not in netns.listnetns()
    assert not [path for path in place.run.iterdir() if path.suffix != ".lock"]
    return False


async def test_up(place: qsnap.Place, base: Path, tmp_path: Path) -> None:
    """With huge pages that are reserved for it."""
    description = tmp_path / "lab.toml"
    description.write_text(
        f"""name = "lab"
        [network.lan]
        [defaults]
        memory = "96M"
        backing = "hugetlb"
        qemu = "{QEMU_11}"
        kernel = "{GUEST / "vmlinuz"}"
        disks = [{{ file = "{base}", format = "raw" }}]
        network = "lan"
        accelerator = "tcg"
        [vm.vm1]
        [vm.vm2]
        """
    )

    async def check() -> bool:
        await check_processes(place)
        up = "lab" in place.runtime().names()
        if up:
            await qsnap.down("lab", place=place)
        assert not [path for path in place.run.iterdir() if path.suffix != ".lock"]
        assert place.runtime().netns("lab") not in netns.listnetns()
        assert not list((place.store / "lab/disks").glob("*"))
        return up

    await kill_at_each_step(check, place, "up", str(description))


async def test_rm(place: qsnap.Place, base: Path) -> None:
    async def check() -> bool:
        names = await check_store(place)
        assert "kept" in names
        if "doomed" not in names:
            await qsnap.snapshot("lab", "doomed", place=place)
        return "doomed" not in names

    async with booted(place, base, vms=1, qemu=QEMU_11):
        await qsnap.snapshot("lab", "kept", place=place)
        await qsnap.snapshot("lab", "doomed", place=place)
        await kill_at_each_step(check, place, "remove", "lab", "doomed")
        await check_running(place, 1)


@pytest.mark.parametrize("vne", ["seven", "eleven"])
async def test_with_all_its_receivers(vne: str, golden: qsnap.Place, eleven: qsnap.Place, seven: qsnap.Place) -> None:
    """Nobody is left to read the streams, or to notice. A QEMU before 8.1 may not even answer then (decision 0007)."""
    await qsnap.restore(vne, "booted", place=golden)
    command = [sys.executable, "-m", "tests.live.killing", "0", str(golden.run), str(golden.store)]
    words = ["snapshot", vne, "doomed", "engine=background"]
    doomed = await trio.lowlevel.open_process([*command, *words], cwd=ROOT)
    try:
        await wait_half_way(golden.store / vne / "snapshots/doomed/vm1")
        for process in receivers(golden.store / vne):
            os.kill(process.pid, SIGKILL)
    finally:
        doomed.kill()
        await doomed.wait()
    assert await qsnap.recover(vne, place=golden) == (vne,)
    await check_unharmed(vne, golden, ["running"] * 3)
