"""The VNE of a scenario: up, saved, ended and restored, on this host or on hosts of a test bed; and its shells."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio
from attrs import evolve, frozen

import qsnap
from testbed.fleet import INITIATOR, Fleet, open_fleet
from testbed.hosts import hosts_in_namespaces
from testbed.shell import GuestShell, port_arguments, run_everywhere

T = TypeVar("T")

BOOT_S = 120.0
DEAD_S = 30.0
CONSOLE_LINES = 40
HOSTS = ("alpha", "beta")
MTU = 1600  #: of the hosts' network: room for a tunnel around a guest's frame


@frozen
class Lab:
    """A VNE and the shells of its guests, by VM. `call` calls a function of qsnap, wherever that is to run."""

    vne: qsnap.VNE
    shells: Mapping[str, GuestShell]
    call: Callable[..., Awaitable[Any]]
    run_directories: tuple[Path, ...]

    async def up(self) -> None:
        """Start all guests, and wait until they have booted."""
        await self.call(qsnap.up, self.vne)
        async with trio.open_nursery() as nursery:
            for shell in self.shells.values():
                nursery.start_soon(shell.wait_ready, BOOT_S)

    async def snapshot(self, name: str, engine: qsnap.Engine, cut: qsnap.Cut) -> qsnap.Snapshot:
        """Save it while it runs."""
        saved: qsnap.Snapshot = await self.call(qsnap.snapshot, self.vne.name, name, engine=engine, cut=cut)
        return saved

    async def kill(self) -> None:
        """End all VMs as a power failure would, and return when they are dead."""
        pids = [vm.pid for vm in (await self.status()).vms]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with trio.fail_after(DEAD_S):
            while any(vm.state != "dead" for vm in (await self.status()).vms):
                await trio.sleep(0.05)

    async def status(self) -> qsnap.VNEStatus:
        """What is up."""
        status: qsnap.VNEStatus = await self.call(qsnap.status, self.vne.name)
        return status

    async def restore(self, name: str) -> qsnap.RestoreReport:
        """Bring it back, whatever is left of it."""
        report: qsnap.RestoreReport = await self.call(qsnap.restore, self.vne.name, name)
        return report

    async def down(self) -> None:
        """End it, if it is up."""
        with trio.CancelScope(shield=True):
            if any((directory / self.vne.name).exists() for directory in self.run_directories):
                await self.call(qsnap.down, self.vne.name)

    async def boots(self) -> dict[str, str]:
        """The number that each guest's kernel makes up once: when it is first asked for it."""
        found = await run_everywhere(self.shells.values(), "cat /proc/sys/kernel/random/boot_id")
        return dict(zip(self.shells, found, strict=True))

    def consoles(self) -> dict[str, str]:
        """The last lines of each VM's console."""
        logs = {
            path.parent.name: path.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
            for directory in self.run_directories
            for path in sorted(directory.glob(f"{self.vne.name}/*/console.log"))
        }
        return {vm: "\n".join(lines) for vm, lines in logs.items()}


@asynccontextmanager
async def open_lab(vne: qsnap.VNE, root: Path, *, hosts: str = "") -> AsyncIterator[Lab]:
    """A lab in `root`, a directory of its own with a short path. `hosts` is "netns" for two hosts, each a namespace.

    Nothing is up yet; at the end nothing is any more.
    """
    async with AsyncExitStack() as stack:
        sockets = {vm.name: str(root / f"{vm.name}.sock") for vm in vne.vms}
        vms = tuple(evolve(vm, extra=(*vm.extra, *port_arguments(sockets[vm.name]))) for vm in vne.vms)
        vne = evolve(vne, vms=vms)
        shells = {name: await stack.enter_async_context(GuestShell(name, path)) for name, path in sockets.items()}
        if hosts:
            fleet = await stack.enter_async_context(_open_fleet(root))
            directories = tuple(fleet.place(host).run for host in (INITIATOR, *HOSTS))
            lab = Lab(fleet.spread(vne), shells, fleet.call, directories)
        else:
            place = qsnap.Place(root / "run", root / "store")
            lab = Lab(vne, shells, _caller(place), (place.run,))
        try:
            yield lab
        finally:
            await lab.down()


@asynccontextmanager
async def _open_fleet(root: Path) -> AsyncIterator[Fleet]:
    async with hosts_in_namespaces((*HOSTS, INITIATOR), mtu=MTU) as hosts, open_fleet(root, hosts) as fleet:
        yield fleet


def _caller(place: qsnap.Place) -> Callable[..., Awaitable[Any]]:
    async def call(function: Callable[..., Awaitable[T]], *words: Any, **options: Any) -> T:
        return await function(*words, place=place, **options)

    return call
