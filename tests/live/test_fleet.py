"""A VNE on several hosts: agents as processes of their own, real guests, and tunnels between the hosts."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from attrs import evolve

import qsnap
from qsnap import Cut, Engine
from qsnap.host.qemu import find_processes
from qsnap.host.takedown import take_down
from testbed.fleet import INITIATOR, CommandError, Fleet, open_fleet
from testbed.guests import GuestConsole
from testbed.hosts import hosts_in_namespaces
from testbed.state import GuestState, check_stamps, find_orphans, read_state
from tests.live.lab import check_continues, make_vne, wait_ready
from tests.live.late_agent import LATE_S

HOSTS = ("alpha", "beta", "gamma")


@asynccontextmanager
async def running_fleet(hosts: Sequence[str] = HOSTS, *programs: str) -> AsyncIterator[Fleet]:
    """Agents on all of these hosts. Nothing is left of them, nor of their VMs."""
    with tempfile.TemporaryDirectory(prefix="qsnap-", dir="/dev/shm") as root:
        try:
            async with (
                hosts_in_namespaces([*hosts, INITIATOR]) as namespaces,
                open_fleet(Path(root), namespaces, program=programs or ("-m", "qsnap.cli")) as fleet,
            ):
                yield fleet
        finally:
            left = find_processes([root])
            with trio.CancelScope(shield=True):
                for runtime in (qsnap.Place(run=path).runtime() for path in Path(root).glob("*/run")):
                    for name in runtime.names():
                        await take_down(name, runtime)
        assert not left, "a process was left behind"


@asynccontextmanager
async def open_consoles(fleet: Fleet, vne: qsnap.VNE) -> AsyncIterator[list[GuestConsole]]:
    """The consoles of all guests, in the order of the description."""
    paths = [qsnap.console_path(vne.name, vm.name, place=fleet.place(vm.host)) for vm in vne.vms]
    consoles = [GuestConsole(path) for path in paths]
    try:
        yield consoles
    finally:
        for console in consoles:
            await console.aclose()


@asynccontextmanager
async def running_vne(fleet: Fleet, vne: qsnap.VNE) -> AsyncIterator[list[GuestConsole]]:
    """The VNE up, with traffic between all guests."""
    await fleet.call(qsnap.up, vne)
    try:
        async with open_consoles(fleet, vne) as consoles:
            await wait_ready(consoles)
            yield consoles
    finally:
        with trio.CancelScope(shield=True):
            await fleet.call(qsnap.down, vne.name)


def saved_states(fleet: Fleet, saved: qsnap.Snapshot) -> list[GuestState]:
    """What the stored RAM of every guest says, by guest; its own memory is checked."""
    states = []
    for vm in saved.vms:
        image = tuple(fleet.place(vm.vm.host).store / saved.vne.name / block.file.path for block in vm.ram)
        state = read_state(image)
        assert check_stamps(image, state).ok, f"the memory of {vm.vm.name} is damaged"
        states.append(state)
    return sorted(states, key=lambda state: state.id)


async def answer_of(vne: str, vm: str, *, place: qsnap.Place) -> bytes:
    """What a guest answers on its console, which is on another host."""
    async with qsnap.open_console(vne, vm, place=place) as console:
        await console.send_all(b"\nstatus #far\n")
        said = b""
        with trio.fail_after(60):
            while b'"far"' not in said:
                said += await console.receive_some()
    return said


@pytest.mark.parametrize("cut", list(Cut))
async def test_three_hosts_are_saved_and_restored_as_one(cut: Cut) -> None:
    async with running_fleet() as fleet:
        vne = fleet.spread(make_vne("lab", vms=4))
        async with running_vne(fleet, vne):
            for engine in (Engine.BACKGROUND, Engine.PRECOPY, Engine.AUTO):
                saved = await fleet.call(qsnap.snapshot, "lab", engine.value, engine=engine, cut=cut)
                assert [vm.vm.host for vm in saved.vms] == ["alpha", "alpha", "beta", "gamma"]
                states = saved_states(fleet, saved)
                assert not find_orphans(states)
                assert min(min(other for j, other in enumerate(each.received) if j + 1 != each.id) for each in states)
            status = await fleet.run("ps", "lab")
            assert {vm["state"] for vm in status["vms"]} == {"running"}
        listed = await fleet.call(qsnap.snapshots, "lab")
        assert [each.name for each in listed] == ["background", "precopy", "auto"]
        assert await fleet.call(qsnap.verify, "lab", "precopy") == listed[1]

        restored = await fleet.call(qsnap.restore, "lab", "background")
        assert set(restored.running_ms) == {"vm1", "vm2", "vm3", "vm4"}
        cut_states = saved_states(fleet, listed[0])
        async with open_consoles(fleet, vne) as consoles:
            await check_continues(consoles, cut_states)
        assert b'"status"' in await fleet.call(answer_of, "lab", "vm4")
        again = await fleet.call(qsnap.snapshot, "lab", "again", cut=cut)
        assert not find_orphans(saved_states(fleet, again))
        await fleet.call(qsnap.down, "lab")
        await fleet.run("rm", "lab", "background", "precopy", "auto", "again")
        assert await fleet.call(qsnap.snapshots, "lab") == ()
        for host in HOSTS:
            left = [path for path in (fleet.place(host).store / "lab").rglob("*") if path.is_file()]
            assert left == [], f"files are left on {host}"


@pytest.mark.parametrize("colours", ["coloured", "plain"])
async def test_a_late_vm_on_another_host(colours: str) -> None:
    """Colours make it consistent; without them the oracle finds orphans, or it would prove nothing."""
    late = ("-m", "tests.live.late_agent", "vm2", colours)
    vne = make_vne("lab", vms=3)
    async with running_fleet(("alpha", "beta"), *late) as fleet, running_vne(fleet, fleet.spread(vne)):
        saved = await fleet.call(qsnap.snapshot, "lab", "late", engine=Engine.BACKGROUND)
        assert saved.discrepancy_ms > LATE_S * 1e3 / 2
        orphans = find_orphans(saved_states(fleet, saved))
        assert bool(orphans) == (colours == "plain")


async def test_the_description_tells_another_machine_of_the_hosts(tmp_path: Path) -> None:
    async with running_fleet(("alpha", "beta")) as fleet:
        vne = make_vne("lab", vms=2)
        vms = "".join(
            f'[vm.{vm.name}]\nhost = "{host}"\nmemory = "96M"\nqemu = "{vm.qemu}"\nkernel = "{vm.kernel}"\n'
            f'initrd = "{vm.initrd}"\nappend = "{vm.append}"\nnetwork = "lan"\naccelerator = "tcg"\n'
            for vm, host in zip(vne.vms, ("alpha", "beta"), strict=True)
        )
        hosts = "".join(f'{host.name} = "{host.address}"\n' for host in fleet.table)
        lab = tmp_path / "lab.toml"
        lab.write_text(f'name = "lab"\n[hosts]\n{hosts}[network.lan]\n{vms}')
        await fleet.run("up", str(lab))
        (fleet.place().store / "lab/spread.json").unlink()  # another machine knows nothing of it
        with pytest.raises(CommandError, match="VNE lab is not up"):
            await fleet.run("ps", "lab")
        assert len((await fleet.run("ps", str(lab)))["vms"]) == 2
        saved = await fleet.run("snapshot", "lab", "one")  # it is known from now on
        assert len(saved["vms"]) == 2
        found = await fleet.run("hosts", "lab")
        assert [(each["host"]["name"], each["fault"]) for each in found] == [("alpha", ""), ("beta", "")]
        await fleet.kill("beta")
        alpha, beta = await fleet.run("hosts", "lab")
        assert alpha["fault"] == ""
        assert "nothing listens at" in beta["fault"]
        assert "qsnap agent" in beta["remedy"]
        with pytest.raises(CommandError, match="nothing listens at"):
            await fleet.run("snapshot", "lab", "two")
        await fleet.start("beta")
        await fleet.run("snapshot", "lab", "two")
        await fleet.run("down", "lab")


async def test_a_file_that_is_not_on_its_host() -> None:
    async with running_fleet(("alpha", "beta")) as fleet:
        vne = fleet.spread(make_vne("lab", vms=2))
        alice, bob = vne.vms
        with pytest.raises(qsnap.HostError, match=r"host beta, vm\.vm2\.initrd: there is no /nowhere"):
            await fleet.call(qsnap.up, evolve(vne, vms=(alice, evolve(bob, initrd="/nowhere"))))
        with pytest.raises(qsnap.StateError, match="is not up"):
            await fleet.call(qsnap.status, "lab")
        assert not find_processes([str(fleet.root / "alpha/run/lab")])
