"""VMs whose RAM and device state are saved on another host than they run on."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import pytest
import trio
from attrs import evolve

import qsnap
from qsnap import Engine
from qsnap.fleet.pki import issue
from qsnap.host.qemu import find_processes
from qsnap.rules.commit import Phase
from testbed.fleet import Fleet
from testbed.guests import GuestConsole
from testbed.hosts import NamespaceHost
from testbed.state import find_orphans
from tests.live.fleet_state import check_logs, check_processes, wait_settled
from tests.live.lab import QEMU_7, QEMU_11, check_continues, make_vne, statuses
from tests.live.test_fleet import open_consoles, running_fleet, running_vne, saved_states
from tests.live.test_fleet_faults import strike
from tests.live.test_host_faults import remount, tmpfs
from tests.live.test_killed import check_store
from tests.live.tiny import check_echo, make_boot_disk, make_tiny_vne


def kept(fleet: Fleet, vne: qsnap.VNE, keepers: dict[str, str]) -> qsnap.VNE:
    """The VNE dealt out to alpha and beta, with some VMs saved elsewhere."""
    spread = fleet.spread(vne)
    hosts = [each for each in fleet.table if each.name in ("alpha", "beta", "gamma")]
    names = ("alpha", "beta")
    vms = tuple(
        evolve(vm, host=names[index % 2], saved_on=keepers.get(vm.name, "")) for index, vm in enumerate(spread.vms)
    )
    return evolve(spread, vms=vms, hosts=tuple(hosts))


def files(fleet: Fleet, hosts: Iterable[str]) -> dict[str, list[str]]:
    """The files of snapshots in the stores of hosts."""
    found = {}
    for host in hosts:
        home = fleet.place(host).store / "lab"
        found[host] = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    return found


def where_saved(saved: qsnap.Snapshot) -> qsnap.Snapshot:
    """As if each VM were on the host that has its RAM."""
    return evolve(saved, vms=tuple(evolve(vm, vm=evolve(vm.vm, host=vm.kept_on or vm.vm.host)) for vm in saved.vms))


async def test_guests_go_on_from_what_another_host_kept() -> None:
    async with running_fleet() as fleet:
        vne = kept(fleet, make_vne("lab", vms=2, backing=qsnap.Backing.ANONYMOUS), {"vm1": "gamma", "vm2": "alpha"})
        async with running_vne(fleet, vne):
            for engine in (Engine.BACKGROUND, Engine.PRECOPY):
                saved = await fleet.call(qsnap.snapshot, "lab", engine.value, engine=engine)
                print([(vm.vm.name, vm.measurements) for vm in saved.vms])
                assert [(vm.vm.host, vm.kept_on) for vm in saved.vms] == [("alpha", "gamma"), ("beta", "alpha")]
                assert not find_orphans(saved_states(fleet, where_saved(saved)))
        found = files(fleet, ("alpha", "beta", "gamma"))
        assert "snapshots/precopy/vm1/device.stream" in found["gamma"]
        assert not [path for path in found["beta"] if "vm" in path]
        shown = await fleet.call(qsnap.verify, "lab", "precopy")
        assert shown == saved
        await fleet.call(qsnap.restore, "lab", "precopy")
        async with open_consoles(fleet, vne) as consoles:
            await check_continues(consoles, saved_states(fleet, where_saved(saved)))
        await fleet.call(qsnap.down, "lab")
        await fleet.run("rm", "lab", "background", "precopy")
        assert files(fleet, fleet.hosts) == {host: [] for host in fleet.hosts}


async def test_restored_wherever_it_may_be(tmp_path: Path) -> None:
    """On the keeper, which fetches disks; on a third host, which fetches all; where it was, with what was converted."""
    async with running_fleet() as fleet:
        tiny = make_tiny_vne("lab", make_boot_disk(tmp_path / "boot.img"))
        vne = kept(fleet, tiny, {"vm1": "gamma"})
        ca, identity = fleet.root / "ca", fleet.place("alpha").identity
        await fleet.call(qsnap.up, vne)
        identity.unlink()
        issue(ca, "alpha", ("other-*",))
        with pytest.raises(qsnap.StateError, match="host gamma: alpha may not use VNE lab here"):
            await fleet.call(qsnap.snapshot, "lab", "new")
        identity.unlink()
        issue(ca, "alpha")
        for name, engine in (("one", Engine.BACKGROUND), ("two", Engine.RECORD)):
            saved = await fleet.call(qsnap.snapshot, "lab", name, engine=engine)
            assert saved.vms[0].kept_on == "gamma"
        await fleet.call(qsnap.down, "lab")
        flat = await fleet.call(qsnap.convert, "lab", "two")
        assert flat.vms[0].ram
        await fleet.kill("gamma")
        for function in (qsnap.verify, qsnap.restore):
            with pytest.raises(qsnap.ConnectionLostError, match="host gamma: nothing listens"):
                await fleet.call(function, "lab", "two")
        await fleet.start("gamma")
        for name, host in (("one", "gamma"), ("two", "beta"), ("one", "alpha")):
            await fleet.run("restore", "lab", name, "--place", f"vm1={host}")
            await check_echo("lab", ["vm1"], fleet.place(host))
            again = await fleet.call(qsnap.snapshot, "lab", "again")
            assert again.vms[0].kept_on == ("" if host == "gamma" else "gamma")
            await fleet.call(qsnap.remove, "lab", "again")
            await fleet.call(qsnap.down, "lab")
            await fleet.call(qsnap.verify, "lab", name)
        assert [each.name for each in await fleet.call(qsnap.snapshots, "lab")] == ["one", "two"]
        for name in ("one", "two"):
            await fleet.call(qsnap.remove, "lab", name)
        assert files(fleet, fleet.hosts) == {host: [] for host in fleet.hosts}


@asynccontextmanager
async def watched(fleet: Fleet, engine: Engine) -> AsyncIterator[trio.Event]:
    """A snapshot `new` that is to fail. The event is set in the middle of its stream."""
    way = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def watch(stage: str, vm: str, done: int, total: int) -> None:
        if stage == "save" and done > 8 << 20:
            token.run_sync_soon(way.set)

    async def fail() -> None:
        with pytest.raises((qsnap.ConnectionLostError, qsnap.HostError, qsnap.QemuError, qsnap.StreamError)) as caught:
            await fleet.call(qsnap.snapshot, "lab", "new", engine=engine, progress=watch)
        print(engine, caught.value, getattr(caught.value, "__notes__", ""))
        failures.append(str(caught.value))

    failures: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        yield way
    assert "gamma" in failures[0] or "alpha" in failures[0]


async def check_undone(fleet: Fleet, consoles: list[GuestConsole]) -> None:
    """The guest runs, and nothing of the snapshot is anywhere."""
    before = (await statuses(consoles))[0].ticks
    await trio.sleep(0.2)
    assert (await statuses(consoles))[0].ticks > before, "the guest stands still"
    await wait_settled(fleet)
    assert [vm.state for vm in (await fleet.call(qsnap.status, "lab")).vms] == ["running"]
    for host in fleet.hosts:
        assert await check_store(fleet.place(host)) == set()
        await check_processes(fleet, host, "lab")
    check_logs(fleet)


@pytest.mark.parametrize(
    ("qemu", "engine"),
    [(QEMU_11, Engine.BACKGROUND), (QEMU_11, Engine.PRECOPY), (QEMU_7, Engine.BACKGROUND)],
    ids=["background", "precopy", "old"],
)
async def test_faults_in_the_middle_of_the_stream(qemu: str, engine: Engine) -> None:
    async with running_fleet(("alpha", "gamma")) as fleet:
        gamma, store = fleet.hosts["gamma"], fleet.place("gamma").store
        assert isinstance(gamma, NamespaceHost)
        guest = {"dirty_mb": 96, "rate_mb": 10}
        lab = make_vne("lab", vms=1, qemu=qemu, memory=224 << 20, backing=qsnap.Backing.ANONYMOUS, guest=guest)
        vne = evolve(lab, vms=(evolve(lab.vms[0], host="alpha", saved_on="gamma"),), hosts=fleet.table)
        with tmpfs(store):
            async with running_vne(fleet, vne) as consoles:
                async with watched(fleet, engine) as way:
                    await way.wait()
                    await fleet.kill("gamma")
                await fleet.start("gamma")
                await check_undone(fleet, consoles)

                async with watched(fleet, engine) as way:
                    await way.wait()
                    await fleet.kill("alpha")
                    await statuses(consoles)  # its guest runs,
                    await wait_settled(fleet)  # and all is put right, whether an agent is there or not
                await fleet.start("alpha")
                await check_undone(fleet, consoles)

                if (qemu, engine) == (QEMU_11, Engine.BACKGROUND):  # what does not depend on them
                    async with watched(fleet, engine) as way:
                        await way.wait()
                        await gamma.unplug()
                    await gamma.plug()
                    await check_undone(fleet, consoles)

                    async with watched(fleet, engine) as way:
                        await way.wait()
                        (receiver,) = find_processes([f"{store}/lab/snapshots/"])
                        os.kill(receiver.pid, signal.SIGKILL)
                    await check_undone(fleet, consoles)

                    remount(store, "size=32m")
                    with pytest.raises(qsnap.HostError, match="host gamma, VM vm1: the store is full"):
                        await fleet.call(qsnap.snapshot, "lab", "new", engine=engine)
                    remount(store, "size=1g")
                    await check_undone(fleet, consoles)

                await fleet.call(qsnap.snapshot, "lab", "new", engine=engine)
                await fleet.call(qsnap.verify, "lab", "new")
                await fleet.call(qsnap.remove, "lab", "new")
                await check_undone(fleet, consoles)


async def test_a_keeper_without_vms_that_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed at a barrier, before its vote, and before its own and the other host's commit."""
    monkeypatch.setattr("qsnap.fleet.remote.INQUIRY_S", 1.0)
    async with running_fleet(("alpha", "beta")) as fleet:
        tiny = make_tiny_vne("lab", make_boot_disk(tmp_path / "boot.img"), vms=2)
        vne = evolve(tiny, vms=tuple(evolve(vm, host="beta", saved_on="alpha") for vm in tiny.vms), hosts=fleet.table)

        async def kill() -> None:
            await fleet.kill("alpha")

        async def strike_during(host: str, step: Phase | str, error: type[qsnap.QsnapError] | None) -> None:
            with monkeypatch.context() as patch, pytest.raises(error) if error else nullcontext():
                strike(patch, host, step, before=kill)
                await fleet.call(qsnap.snapshot, "lab", "new", cut=qsnap.Cut.BARRIER)
            await check_echo("lab", ["vm1", "vm2"], fleet.place("beta"))
            await fleet.start("alpha")
            await wait_settled(fleet)

        await fleet.call(qsnap.up, vne)
        await strike_during("beta", Phase.RESUME, qsnap.ConnectionLostError)
        await strike_during("beta", Phase.COLLECT, qsnap.ConnectionLostError)
        await strike_during("alpha", "commit", qsnap.InDoubtError)
        await strike_during("beta", "commit", None)
        for host in fleet.hosts:
            assert await check_store(fleet.place(host)) == {"new"}
            await check_processes(fleet, host, "lab")
        await fleet.call(qsnap.down, "lab")
        await fleet.call(qsnap.restore, "lab", "new")
        await check_echo("lab", ["vm1", "vm2"], fleet.place("beta"))
        await fleet.call(qsnap.down, "lab")
        check_logs(fleet)
