"""VMs on two hosts that qsnap did not start, on a network that their owner has made: attached to through agents."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio
from attrs import evolve

import qsnap
from qsnap import Cut
from testbed.fleet import Fleet, FleetHost
from testbed.guests import GuestConsole, kernel_append
from testbed.state import find_orphans
from tests.live.lab import GUEST, QEMU_11, check_continues, statuses
from tests.live.test_fleet import open_consoles, running_fleet, saved_states

HOSTS = ("alpha", "beta")
MEMORY = 128 << 20


def run(host: FleetHost, command: str) -> str:
    """Run a command on a host."""
    return subprocess.run(host.command(command.split()), check=True, capture_output=True, text=True).stdout


def join_bridges(fleet: Fleet) -> None:
    """The owner's network: a bridge on each host, and a tunnel of the owner's own between them."""
    alpha, beta = (fleet.hosts[name] for name in HOSTS)
    for here, there in ((alpha, beta), (beta, alpha)):
        run(here, "ip link add handbr type bridge forward_delay 0 mcast_snooping 0")
        ends = f"local {here.address} remote {there.address}"
        run(here, f"ip link add own type vxlan id 7 {ends} dstport 4790")
        run(here, "ip link set own master handbr up")
        run(here, "ip link set handbr up")


@contextmanager
def started(fleet: Fleet, host: str, number: int) -> Iterator[qsnap.VM]:
    """A guest of the owner's, as a description has it."""
    at, directory = fleet.hosts[host], fleet.root / host
    run(at, f"ip tuntap add hand{number} mode tap")
    run(at, f"ip link set hand{number} master handbr up")
    qmp, console = directory / "owner.qmp", directory / "owner.console"
    append = kernel_append(number, len(HOSTS), dirty_mb=8, rate_mb=20, udp=100, tcp=1)
    words = [QEMU_11, "-accel", "tcg", "-display", "none", "-m", str(MEMORY >> 20), "-nodefaults"]
    words += ["-kernel", str(GUEST / "vmlinuz"), "-initrd", str(GUEST / "initrd"), "-append", append]
    words += ["-qmp", f"unix:{qmp},server=on,wait=off", "-serial", f"unix:{console},server=on,wait=off"]
    words += ["-netdev", f"tap,id=n0,ifname=hand{number},script=no,downscript=no"]
    words += ["-device", f"virtio-net-pci,netdev=n0,mac=52:54:00:00:00:0{number}"]
    with subprocess.Popen(at.command(words), stdin=subprocess.DEVNULL) as process:
        try:
            nic = qsnap.Nic("lan", "", tap=f"hand{number}")
            yield qsnap.VM(f"vm{number}", 0, nics=(nic,), qemu=QEMU_11, qmp=str(qmp), host=host)
        finally:
            process.kill()


async def wait_for(paths: Sequence[Path]) -> None:
    """Until all of these are there."""
    with trio.fail_after(30):
        while not all(os.path.exists(path) for path in paths):
            await trio.sleep(0.05)


@pytest.mark.parametrize("cut", list(Cut))
async def test_attached_vms_of_two_hosts(cut: Cut) -> None:
    async with running_fleet(HOSTS) as fleet:
        join_bridges(fleet)
        consoles = [fleet.root / host / "owner.console" for host in HOSTS]
        with ExitStack() as stack:
            vms = tuple(stack.enter_context(started(fleet, host, i)) for i, host in enumerate(HOSTS, start=1))
            await wait_for([*consoles, *(Path(vm.qmp) for vm in vms)])
            vne = qsnap.VNE("hand", vms, (qsnap.Network("lan"),), fleet.table)
            guests = [GuestConsole(str(path)) for path in consoles]
            for guest in guests:
                await guest.wait_ready(trio.current_time() + 120)
            report = await fleet.call(qsnap.attach, vne)
            assert report.barrier_only == ""
            saved = await fleet.call(qsnap.snapshot, "hand", "one", cut=cut)
            assert not find_orphans(saved_states(fleet, saved))
            before = [sum(state.received) for state in await statuses(guests)]
            await trio.sleep(1)
            after = [sum(state.received) for state in await statuses(guests)]
            assert all(then < now for then, now in zip(before, after, strict=True)), "they do not hear each other"
            await fleet.call(qsnap.detach, "hand")
            for host in fleet.hosts.values():
                assert "handbr" in run(host, "ip -o link show type vxlan")  # the owner's own, and nothing of qsnap's
                assert "-blue" not in run(host, "ip -o link")
            for guest in guests:
                await guest.aclose()
        await fleet.call(qsnap.restore, "hand", "one")
        own = evolve(vne, vms=tuple(evolve(vm, qmp="") for vm in vne.vms))
        async with open_consoles(fleet, own) as restored:
            await check_continues(restored, saved_states(fleet, saved))
        await fleet.call(qsnap.down, "hand")


async def test_if_one_host_refuses_none_is_attached_to() -> None:
    async with running_fleet(HOSTS) as fleet:
        join_bridges(fleet)
        with started(fleet, "alpha", 1) as vm:
            await wait_for([Path(vm.qmp)])
            missing = evolve(vm, name="vm2", host="beta", qmp="/nowhere.qmp")
            vne = qsnap.VNE("hand", (vm, missing), (qsnap.Network("lan"),), fleet.table)
            with pytest.raises(qsnap.StateError, match=r"host beta, VM vm2: No such file or directory: /nowhere\.qmp"):
                await fleet.call(qsnap.attach, vne)
            assert not list(fleet.place("alpha").run.glob("*/vne.json"))
            assert "-blue" not in run(fleet.hosts["alpha"], "ip -o link")
