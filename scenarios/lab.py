"""The VNE of a scenario: up, saved, ended and restored, on this host or on hosts of a test bed; and its guests."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import trio
from attrs import evolve, frozen

import qsnap
from testbed.fleet import INITIATOR, Fleet, open_fleet
from testbed.guests import GuestConsole
from testbed.hosts import hosts_in_namespaces
from testbed.shell import GuestShell, port_arguments
from testbed.tasks import together

T = TypeVar("T")

DEAD_S = 30.0
CONSOLE_LINES = 40
PAGE_BYTES = 4096
HOSTS = ("alpha", "beta")
MTU = 1600  #: of the hosts' network: room for a tunnel around a guest's frame


class Guest(Protocol):
    """What speaks with a guest. A connection that a restore has ended is made again."""

    async def boot(self) -> str:
        """The number that the guest makes up once in its life; it may be still booting."""

    async def aclose(self) -> None:
        """Close the connection."""


@frozen
class Lab:
    """A VNE, and its guests by VM. `call` calls a function of qsnap, wherever that is to run; `places` are by host."""

    vne: qsnap.VNE
    guests: Mapping[str, Any]
    call: Callable[..., Awaitable[Any]]
    places: Mapping[str, qsnap.Place]

    async def up(self) -> None:
        """Start all guests, and wait until they have booted."""
        await self.call(qsnap.up, self.vne)
        await self.boots()

    async def snapshot(self, name: str, engine: qsnap.Engine, cut: qsnap.Cut) -> qsnap.Snapshot:
        """Save it while it runs."""
        saved: qsnap.Snapshot = await self.call(qsnap.snapshot, self.vne.name, name, engine=engine, cut=cut)
        return saved

    async def flatten(self, saved: qsnap.Snapshot) -> qsnap.Snapshot:
        """Make flat RAM of recorded streams, where a snapshot has any."""
        if all(vm.engine is not qsnap.Engine.RECORD for vm in saved.vms):
            return saved
        flat: qsnap.Snapshot = await self.call(qsnap.convert, self.vne.name, saved.name)
        return flat

    async def kill(self) -> None:
        """End all VMs as a power failure would, and return when they are dead."""
        pids = [vm.pid for vm in (await self.status()).vms]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with trio.fail_after(DEAD_S):
            while any(vm.state != "dead" for vm in (await self.status()).vms):
                await trio.sleep(0.05)
        for guest in self.guests.values():
            await guest.aclose()

    async def status(self) -> qsnap.VNEStatus:
        """What is up."""
        status: qsnap.VNEStatus = await self.call(qsnap.status, self.vne.name)
        return status

    async def restore(self, name: str) -> qsnap.RestoreReport:
        """Bring it back, whatever is left of it."""
        report: qsnap.RestoreReport = await self.call(qsnap.restore, self.vne.name, name)
        return report

    async def remove(self, name: str) -> None:
        """Remove a snapshot."""
        await self.call(qsnap.remove, self.vne.name, name)

    async def verify(self, name: str) -> None:
        """Read all of a snapshot. Raises IntegrityError where it is not what was stored."""
        await self.call(qsnap.verify, self.vne.name, name)

    async def mix(self, name: str, most: str, one: str, vm: str) -> None:
        """Make a snapshot out of two: all VMs of `most`, but for one, which is that of `one`."""
        for place in self.places.values():
            store = place.snapshots()
            if (self.vne.name, most) in await store.names(self.vne.name):
                whole, other = [await store.load(self.vne.name, each) for each in (most, one)]
                ones = {each.vm.name: each for each in other.vms}
                vms = tuple(ones[each.vm.name] if each.vm.name == vm else each for each in whole.vms)
                await store.commit(evolve(whole, name=name, vms=vms))

    def flip(self, saved: qsnap.Snapshot, vm: str) -> None:
        """Alter one bit in the middle of a VM's RAM in the store, or of its recorded stream."""
        (whole,) = (each.device_stream.path for each in saved.vms if each.vm.name == vm)
        (stored,) = (self.places[each.host].store / self.vne.name for each in self.vne.vms if each.name == vm)
        with (*self.images(saved)[vm], stored / whole)[0].open("r+b") as file:
            middle = file.seek(0, os.SEEK_END) // 2
            file.seek(middle)
            (byte,) = file.read(1)
            file.seek(middle)
            file.write(bytes([byte ^ 1]))

    def wrong_images(
        self, first: qsnap.Snapshot, last: qsnap.Snapshot, vm: str
    ) -> Iterator[tuple[str, dict[str, tuple[Path, ...]]]]:
        """Images that nobody must take for those of one moment: what is wrong, and the files."""
        old, new = self.images(first), self.images(last)
        yield "a snapshot has one VM of a later epoch than the others", {**old, vm: new[vm]}
        torn = old[vm][0].with_name("torn")
        whole, other = bytearray(old[vm][0].read_bytes()), new[vm][0].read_bytes()
        for page in range(0, len(whole), 2 * PAGE_BYTES):
            whole[page : page + PAGE_BYTES] = other[page : page + PAGE_BYTES]
        torn.write_bytes(whole)
        yield "every other page of a VM is of another epoch", {**old, vm: (torn, *old[vm][1:])}

    def images(self, saved: qsnap.Snapshot) -> dict[str, tuple[Path, ...]]:
        """The files of each VM's RAM."""
        return {
            vm.vm.name: tuple(self.places[vm.vm.host].store / self.vne.name / block.file.path for block in vm.ram)
            for vm in saved.vms
        }

    async def down(self) -> None:
        """End it, if it is up."""
        if any((place.run / self.vne.name).exists() for place in self.places.values()):
            await self.call(qsnap.down, self.vne.name)

    async def boots(self) -> dict[str, str]:
        """The number that each guest makes up once in its life; they may be still booting."""
        found = await together(guest.boot for guest in self.guests.values())
        return dict(zip(self.guests, found, strict=True))

    def consoles(self) -> dict[str, str]:
        """The last lines of each VM's console."""
        logs = {
            path.parent.name: path.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
            for place in self.places.values()
            for path in sorted(place.run.glob(f"{self.vne.name}/*/console.log"))
        }
        return {vm: "\n".join(lines) for vm, lines in logs.items()}


@asynccontextmanager
async def open_lab(vne: qsnap.VNE, root: Path, *, hosts: str = "", shells: bool = True) -> AsyncIterator[Lab]:
    """A lab in `root`, a directory of its own with a short path. `hosts` is "netns" for two hosts, each a namespace.

    Its guests have shells, or are test guests with a console. Nothing is up yet; at the end nothing is any more.
    """
    async with AsyncExitStack() as stack:
        sockets = {vm.name: str(root / f"{vm.name}.sock") for vm in vne.vms}
        if shells:
            vms = tuple(evolve(vm, extra=(*vm.extra, *port_arguments(sockets[vm.name]))) for vm in vne.vms)
            vne = evolve(vne, vms=vms)
        places = {"": qsnap.Place(root / "run", root / "store")}
        call = _caller(places[""])
        if hosts:
            fleet = await stack.enter_async_context(_open_fleet(root))
            vne = fleet.spread(vne)
            call, places = fleet.call, {"": fleet.place(), **{host: fleet.place(host) for host in HOSTS}}
        guests: dict[str, Guest] = {
            vm.name: GuestShell(vm.name, sockets[vm.name])
            if shells
            else GuestConsole(str(places[vm.host].runtime().console_path(vne.name, vm.name)))
            for vm in vne.vms
        }
        lab = Lab(vne, guests, call, places)
        try:
            yield lab
        finally:
            with trio.CancelScope(shield=True):
                await lab.down()
                for guest in guests.values():
                    await guest.aclose()


@asynccontextmanager
async def _open_fleet(root: Path) -> AsyncIterator[Fleet]:
    async with hosts_in_namespaces((*HOSTS, INITIATOR), mtu=MTU) as hosts, open_fleet(root, hosts) as fleet:
        yield fleet


def _caller(place: qsnap.Place) -> Callable[..., Awaitable[Any]]:
    async def call(function: Callable[..., Awaitable[T]], *words: Any, **options: Any) -> T:
        return await function(*words, place=place, **options)

    return call
