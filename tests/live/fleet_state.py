"""What must hold on the hosts of a fleet after any fault: one outcome, VMs that run, and nothing left."""

from __future__ import annotations

from collections.abc import Iterable

import trio
from pyroute2 import netns

import qsnap
from qsnap.host.qemu import find_processes
from testbed.fleet import Fleet
from tests.live.test_killed import check_store, check_wired
from tests.live.tiny import check_echo

SETTLED_S = 60.0


async def wait_settled(fleet: Fleet) -> None:
    """Return when nothing is under way, and nobody in doubt, on any host."""
    with trio.fail_after(SETTLED_S):
        while any(fleet.place(host).runtime().interrupted() for host in fleet.hosts):
            await trio.sleep(0.02)


async def take_down(fleet: Fleet, vne: str) -> None:
    """End a VNE as far as it is up."""
    await wait_settled(fleet)
    if any(vne in fleet.place(host).runtime().names() for host in fleet.hosts):
        await fleet.call(qsnap.down, vne)


async def check_snapshots(fleet: Fleet, vne: str) -> set[str]:
    """All hosts have the same snapshots, whole, and nothing else in their stores. Returns the names."""
    names = [frozenset(await check_store(fleet.place(host), vne)) for host in fleet.hosts]
    assert len(set(names)) == 1, f"split: {dict(zip(fleet.hosts, names, strict=True))}"
    return set(names[0])


async def check_up(fleet: Fleet, vne: str) -> bool:
    """The VNE is up on all hosts, and every VM runs and answers; or nothing of it is left. Returns whether it is up."""
    up = {host for host in fleet.hosts if vne in fleet.place(host).runtime().names()}
    assert up in (set(), set(fleet.hosts)), f"split: it is up on {up} only"
    for host in fleet.hosts:
        place = fleet.place(host)
        if up:
            vms = [vm.vm.name for vm in place.runtime().load(vne).vms]
            await check_wired(place, vne, len(vms))
            await check_echo(vne, vms, place)
        else:
            assert place.runtime().netns(vne) not in netns.listnetns()
            assert not [path for path in place.run.iterdir() if path.suffix != ".lock"]
        await check_processes(fleet, host, vne)
    return bool(up)


async def check_processes(fleet: Fleet, host: str, vne: str) -> None:
    """Only the agent and VMs are left: no receiver, and soon nobody who puts things right."""
    place = fleet.place(host)
    runtime = place.runtime()
    expected = {vm.process.pid for vm in runtime.load(vne).vms} if vne in runtime.names() else set()
    expected.add(fleet.agents[host].pid)
    with trio.fail_after(SETTLED_S):
        while pids(place) != expected:
            await trio.sleep(0.05)


def pids(place: qsnap.Place) -> set[int]:
    return {process.pid for process in find_processes([str(place.run), str(place.store)])}


def check_logs(fleet: Fleet, hosts: Iterable[str] = ()) -> None:
    """No agent has failed in a way that nobody foresaw."""
    for host in hosts or fleet.hosts:
        assert "Traceback" not in fleet.log(host), fleet.log(host)
