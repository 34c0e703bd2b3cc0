"""Restores on other hosts than those of the snapshot."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from attrs import evolve, frozen

import qsnap
from qsnap.fleet.spread import remember
from qsnap.host import catalogue
from qsnap.host.netns import entered
from testbed.fleet import CommandError, Fleet, FleetHost
from testbed.hosts import NamespaceHost
from testbed.state import find_orphans
from tests.live.lab import QEMU_11, booting_from, check_continues, make_vne
from tests.live.test_disks import bases, holds, write
from tests.live.test_fleet import open_consoles, running_fleet, running_vne, saved_states

__all__ = ["bases"]

OLD, NEW = ("alpha", "beta"), ("gamma", "delta")


def placed(fleet: Fleet, vne: qsnap.VNE, homes: dict[str, str]) -> qsnap.VNE:
    return evolve(vne, hosts=fleet.table, vms=tuple(evolve(vm, host=homes[vm.name]) for vm in vne.vms))


async def check_restored(fleet: Fleet, vne: qsnap.VNE, name: str) -> None:
    """The guests go on from what is stored where they are now, and talk."""
    saved = await fleet.call(qsnap.show, vne.name, name)
    here = evolve(saved, vms=tuple(evolve(vm, vm=evolve(vm.vm, host=home(vne, vm.vm.name))) for vm in saved.vms))
    states = saved_states(fleet, here)
    assert not find_orphans(states)
    async with open_consoles(fleet, vne) as consoles:
        await check_continues(consoles, states)


def home(vne: qsnap.VNE, name: str) -> str:
    return next(vm.host for vm in vne.vms if vm.name == name)


DESCRIPTION = """
name = "lab"
network.lan = {{}}
vm.vm1 = {{ memory = {vm.memory_bytes}, kernel = "{vm.kernel}", qemu = "{vm.qemu}", network = "lan", host = "beta" }}
[hosts]
"""


async def test_a_description_that_puts_vms_elsewhere(tmp_path: Path) -> None:
    """Where VMs run is not forgotten for the sake of one; a restore is what moves them."""
    async with running_fleet(OLD) as fleet:
        vne = placed(fleet, make_vne("lab", vms=1), {"vm1": "alpha"})
        moved = placed(fleet, vne, {"vm1": "beta"})
        hosts = [f'{host.name} = {{ address = "{host.address}:{host.port}" }}' for host in fleet.table]
        path = tmp_path / "moved.toml"
        path.write_text(DESCRIPTION.format(vm=vne.vms[0]) + "\n".join(hosts))
        await fleet.call(qsnap.up, vne)
        await fleet.call(qsnap.snapshot, "lab", "one")
        with pytest.raises(qsnap.StateError, match="host alpha: VNE lab is up there already"):
            await fleet.call(qsnap.up, moved)
        with pytest.raises(CommandError, match="is running"):
            await fleet.run("restore", str(path), "one")
        for name in ("lab", str(path)):
            (vm,) = (await fleet.run("ps", name))["vms"]
            assert (vm["state"], vm["host"]) == ("running", "alpha")
        await fleet.run("snapshot", str(path), "two")
        for call in (
            qsnap.down("lab", place=fleet.place("alpha")),
            qsnap.remove("lab", "one", place=fleet.place("alpha")),
        ):
            with pytest.raises(qsnap.StateError, match="a part of it only"):  # nobody there knows the others
                await call
        await fleet.run("down", "lab")
        await fleet.run("restore", str(path), "one")
        (vm,) = (await fleet.run("ps", "lab"))["vms"]
        assert (vm["state"], vm["host"]) == ("running", "beta")
        await fleet.run("down", "lab")
        assert await fleet.run("ps") == []
        await catalogue.remove("lab", "one", place=fleet.place("alpha"))  # as a removal that was cut off
        await fleet.run("rm", "lab", "one", "two")
        assert await fleet.run("ls", "lab") == []


@pytest.mark.parametrize("new", [NEW, NEW[:1]], ids=len)
async def test_guests_go_on_where_they_never_were(new: Sequence[str], tmp_path: Path) -> None:
    names = [*OLD, *new]
    async with running_fleet(names) as fleet:
        described = booting_from(make_vne("lab", vms=2, backing=qsnap.Backing.ANONYMOUS), tmp_path)
        vne = placed(fleet, described, {"vm1": "alpha", "vm2": "beta"})
        async with running_vne(fleet, vne):
            await fleet.call(qsnap.snapshot, "lab", "one")
        shutil.rmtree(tmp_path)  # as it is where there is no such kernel
        where = {"vm1": new[0], "vm2": new[-1]}
        moved = placed(fleet, vne, where)
        if len(new) == 1:
            remember(moved, fleet.place())  # as if its description were named
        words = [word for vm, host in where.items() for word in ("--place", f"{vm}={host}")]
        await fleet.run("restore", "lab", "one", *(words if len(new) > 1 else ()))
        await check_restored(fleet, moved, "one")
        with pytest.raises(CommandError, match=r"is running \(vm1, vm2\)"):
            await fleet.run("restore", "lab", "one", "--place", "vm1=alpha", "--place", "vm2=alpha")
        status = await fleet.call(qsnap.status, "lab")
        assert {vm.name: (vm.host, vm.state) for vm in status.vms} == {n: (h, "running") for n, h in where.items()}

        with pytest.raises(qsnap.StateError, match="there is a snapshot one of lab"):
            await fleet.call(qsnap.snapshot, "lab", "one")
        again = await fleet.call(qsnap.snapshot, "lab", "two")
        assert not find_orphans(saved_states(fleet, again))
        await fleet.call(qsnap.down, "lab")
        assert [each.name for each in await fleet.call(qsnap.snapshots, "lab")] == ["one", "two"]
        await fleet.call(qsnap.restore, "lab", "two")  # where they were last
        async with open_consoles(fleet, moved) as consoles:
            await check_continues(consoles, saved_states(fleet, again))
        await fleet.call(qsnap.down, "lab")

        await fleet.call(qsnap.restore, "lab", "two", placement={"vm1": "beta", "vm2": "alpha"})
        await fleet.call(qsnap.down, "lab")
        for name in ("one", "two"):
            await fleet.call(qsnap.verify, "lab", name)
            await fleet.call(qsnap.remove, "lab", name)
        for host in names:
            left = [path for path in (fleet.place(host).store / "lab").rglob("*") if path.is_file()]
            assert left == [], f"files are left on {host}"


@frozen
class Blind:
    """A host that does not see a directory of this machine."""

    host: FleetHost
    directory: str
    name: str
    address: str
    tunnel: str

    def command(self, words: Sequence[str]) -> list[str]:
        hide = 'mount -t tmpfs none "$0" && exec "$@"'
        return self.host.command(["unshare", "--mount", "sh", "-c", hide, self.directory, *words])


async def hide(fleet: Fleet, name: str, directory: Path) -> None:
    """Start an agent again where it does not see a directory."""
    host = fleet.hosts[name]
    blind = Blind(host, str(directory.resolve()), host.name, host.address, host.tunnel)
    fleet.hosts = {**fleet.hosts, name: blind}
    await fleet.kill(name)
    await fleet.start(name)


def layers(fleet: Fleet, host: str) -> dict[str, int]:
    """The disk layers in the store of a host, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (fleet.place(host).store / "disks/disks").iterdir()}


async def test_disks_come_with_what_they_lie_on(bases: tuple[qsnap.Disk, ...], tmp_path: Path) -> None:
    """And later only with what is new. Back where the base images are, they lie on these."""
    raw, below = bases
    top = tmp_path / "top.qcow2"
    await trio.run_process(["qemu-img", "create", "-q", "-f", "qcow2", "-b", below.file, "-F", "qcow2", str(top)])
    described = make_vne("disks", vms=1, disks=(raw, qsnap.Disk(str(top))), backing=qsnap.Backing.ANONYMOUS)
    async with running_fleet(("alpha", "gamma")) as fleet:
        alpha, gamma = fleet.place("alpha"), fleet.place("gamma")
        await hide(fleet, "gamma", tmp_path)
        await fleet.call(qsnap.up, placed(fleet, described, {"vm1": "alpha"}))
        for name, pattern in (("one", 0x11), ("two", 0x22)):
            await write(alpha, pattern)
            await fleet.call(qsnap.snapshot, "disks", name)
        await fleet.call(qsnap.down, "disks")

        await fleet.call(qsnap.restore, "disks", "one", placement={"vm1": "gamma"})
        assert await holds(gamma, 0x11)
        assert await holds(gamma, 0xEE, "3M")
        assert not await holds(gamma, 0x22), "the comparison finds nothing"
        await write(gamma, 0x33, "1M")
        await fleet.call(qsnap.snapshot, "disks", "three")
        await fleet.call(qsnap.down, "disks")
        come = layers(fleet, "gamma")
        assert sum(name.startswith("base-") for name in come) == 3

        await fleet.call(qsnap.restore, "disks", "two")
        assert await holds(gamma, 0x22)
        await fleet.call(qsnap.down, "disks")
        after = layers(fleet, "gamma")
        assert come.items() <= after.items(), "a layer came again"
        assert len(after) == len(come) + 2

        await fleet.call(qsnap.restore, "disks", "three", placement={"vm1": "alpha"})
        assert await holds(alpha, 0x11)
        assert await holds(alpha, 0x33, "1M")
        assert await holds(alpha, 0xEE, "3M")
        assert not any(name.startswith("base-") for name in layers(fleet, "alpha"))
        await fleet.call(qsnap.down, "disks")
        for name in ("one", "two", "three"):
            await fleet.call(qsnap.verify, "disks", name)
            await fleet.call(qsnap.remove, "disks", name)
        assert (layers(fleet, "alpha"), layers(fleet, "gamma")) == ({}, {})


async def test_what_is_not_there_is_named() -> None:
    """A QEMU; a host that has VMs. One that has none need not be there."""
    async with running_fleet(("alpha", "gamma")) as fleet:
        vne = placed(fleet, make_vne("lab", vms=1, backing=qsnap.Backing.ANONYMOUS), {"vm1": "alpha"})
        async with running_vne(fleet, vne):
            await fleet.call(qsnap.snapshot, "lab", "one")
        await hide(fleet, "gamma", Path(QEMU_11).parent)
        with pytest.raises(qsnap.HostError, match=r"host gamma, vm\.vm1\.qemu: there is no .*/qemu-system-x86_64"):
            await fleet.call(qsnap.restore, "lab", "one", placement={"vm1": "gamma"})
        await fleet.kill("alpha")
        with pytest.raises(qsnap.ConnectionLostError, match="host alpha: nothing listens") as lost:
            await fleet.call(qsnap.restore, "lab", "one", placement={"vm1": "gamma"})
        assert "If alpha is gone for good, take it out of [hosts]" in lost.value.__notes__[0]
        await fleet.start("alpha")
        await fleet.kill("gamma")
        await fleet.call(qsnap.restore, "lab", "one")  # where it was
        await check_restored(fleet, vne, "one")
        await fleet.call(qsnap.down, "lab")


async def received_bytes(host: NamespaceHost) -> int:
    """What a host has received since it is there."""

    def read() -> int:
        with entered(host.netns):
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        return int(next(line for line in lines if "eth0:" in line).split(":")[1].split()[0])

    return await trio.to_thread.run_sync(read)


@pytest.mark.parametrize("fault", ["killed", "unplugged"])
async def test_a_move_goes_on_where_it_was_interrupted(fault: str) -> None:
    async with running_fleet(("alpha", "gamma")) as fleet:
        guest = {"dirty_mb": 64}
        vne = placed(
            fleet,
            make_vne("lab", vms=1, memory=192 << 20, backing=qsnap.Backing.ANONYMOUS, guest=guest),
            {"vm1": "alpha"},
        )
        async with running_vne(fleet, vne):
            await fleet.call(qsnap.snapshot, "lab", "one")
        source, target = fleet.hosts["alpha"], fleet.hosts["gamma"]
        assert isinstance(source, NamespaceHost)
        assert isinstance(target, NamespaceHost)
        way = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def watch(stage: str, vm: str, done: int, total: int) -> None:
            if stage == "fetch" and done > total / 2:
                token.run_sync_soon(way.set)

        async def restore() -> None:
            with pytest.raises(qsnap.ConnectionLostError):
                await fleet.call(qsnap.restore, "lab", "one", placement={"vm1": "gamma"}, progress=watch)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(restore)
            with trio.fail_after(60):
                await way.wait()
            await (fleet.kill("gamma") if fault == "killed" else source.unplug())
        first = await received_bytes(target)
        await (fleet.start("gamma") if fault == "killed" else source.plug())
        await fleet.call(qsnap.restore, "lab", "one", placement={"vm1": "gamma"})
        again = await received_bytes(target) - first
        stored = fleet.place("alpha").store / "lab/snapshots/one/vm1"
        whole = sum(path.stat().st_blocks * 512 for path in stored.iterdir())
        print(f"{first} bytes came before it was interrupted and {again} after that, of {whole}")
        assert 0.3 * whole < first
        assert again < 0.8 * whole, "all of it came again"
        await check_restored(fleet, evolve(vne, vms=(evolve(vne.vms[0], host="gamma"),)), "one")
        await fleet.call(qsnap.down, "lab")
