"""The networks of a VNE over several hosts, with frames written to taps and read from them in place of VMs."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from struct import Struct

import trio
from attrs import define, field, frozen

from qsnap.host.bridges import Links, open_links
from qsnap.host.netns import entered, make_netns, remove_netns
from qsnap.host.netns_helper import TUN, open_here
from qsnap.model import VM, VNE, Colour, Host, Network, Nic
from qsnap.rules.colouring import LinkStep, plan_direction, plan_moves, plan_networks, tap_name
from testbed.hosts import NamespaceHost

BROADCAST = b"\xff" * 6
FRAME_BYTES = 2048
ARRIVAL_S = 20.0
QUIET_S = 0.3
FIRST = 1000  #: the number of the first frame that counts
_HEADER = Struct("!6s6sHI")  # destination, source, an EtherType for experiments, a number
_TYPE = 0x88B5
_INTERFACE = Struct("16sH22x")  # as in qsnap.host.bridges
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_runs = itertools.count()

Steps = Callable[[list[LinkStep]], list[LinkStep]]


def spread_vne(name: str, hosts: Mapping[str, NamespaceHost], vms: int, *, ipv6: bool = False, vni: int = 0) -> VNE:
    """A VNE with so many VMs on each host, all on one network."""
    return VNE(
        name,
        tuple(
            VM(f"{host}{number}", 1 << 21, nics=(Nic("lan", f"52:54:00:00:{index:02x}:{number:02x}"),), host=host)
            for index, host in enumerate(hosts)
            for number in range(vms)
        ),
        (Network("lan", vni=vni),),
        tuple(Host(host.name, host.address, 1, host.address6 if ipv6 else host.tunnel) for host in hosts.values()),
    )


@frozen
class Station:
    """Takes a VM's place at its tap."""

    vm: VM
    part: VNE
    links: Links
    fd: int

    @property
    def mac(self) -> bytes:
        return bytes.fromhex(self.vm.nics[0].mac.replace(":", ""))

    def send(self, to: bytes, number: int) -> None:
        os.write(self.fd, _HEADER.pack(to, self.mac, _TYPE, number).ljust(60, b"\0"))

    def receive(self) -> list[int]:
        """The numbers of the frames that have come for it."""
        numbers = []
        while frame := self._read():
            to, _, kind, number = _HEADER.unpack_from(frame)
            if kind == _TYPE and to in (BROADCAST, self.mac):
                numbers.append(number)
        return numbers

    def _read(self) -> bytes:
        try:
            return os.read(self.fd, FRAME_BYTES)
        except BlockingIOError:
            return b""

    async def move(self, colour: Colour) -> None:
        await self.links.apply(plan_moves(self.part, self.vm.name, colour))


@define
class Fabric:
    """All networks of a VNE, on all hosts."""

    vne: VNE
    links: dict[str, Links]
    stations: list[Station] = field(factory=list)
    expected: Counter[tuple[str, int]] = field(factory=Counter)
    received: Counter[tuple[str, int]] = field(factory=Counter)
    _numbers: itertools.count[int] = field(factory=lambda: itertools.count(FIRST))

    async def turn(self, pre_snapshot: Colour) -> AsyncIterator[str]:
        """Turn the links of one host after the other. Yields each that has turned."""
        for host, links in self.links.items():
            await links.apply(plan_direction(self.vne.part(host), pre_snapshot))
            yield host

    async def exchange(self, post_snapshot: Iterable[str] = (), *, complete: bool = True) -> None:
        """Everybody sends to everybody, to each and to all; returns when all that should arrive has.

        Frames of `post_snapshot` VMs should reach such VMs only. What arrives beside that is counted in `received`.
        """
        post = set(post_snapshot)
        for sender in self.stations:
            others = self._others(sender)
            for to, audience in [(BROADCAST, others), *((other.mac, [other]) for other in others)]:
                number = next(self._numbers)
                for other in audience:
                    self.expected[other.vm.name, number] += sender.vm.name not in post or other.vm.name in post
                sender.send(to, number)
            self._collect()
        with trio.move_on_after(ARRIVAL_S if complete else 0):
            while self.missing():
                await trio.sleep(0.001)
                self._collect()
        assert not (complete and self.missing()), self.missing()

    async def wait_forwarding(self) -> None:
        """The kernel takes up to a second to notice that a tap was opened, and to let frames through."""
        waiting = {(other.vm.name, n) for n, sender in enumerate(self.stations) for other in self._others(sender)}
        with trio.fail_after(ARRIVAL_S):
            while waiting := {pair for pair in waiting if not self.received[pair]}:
                for number, sender in enumerate(self.stations):
                    sender.send(BROADCAST, number)
                await trio.sleep(0.01)
                self._collect()

    async def quiet(self) -> None:
        """Wait for what should not arrive."""
        await trio.sleep(QUIET_S)
        self._collect()

    def missing(self) -> Counter[tuple[str, int]]:
        return +(self.expected - self.received)

    def surplus(self) -> Counter[tuple[str, int]]:
        """What came twice, or should not have come at all."""
        probes = {key: count for key, count in self.received.items() if key[1] < FIRST}
        return +(self.received - self.expected - Counter(probes))

    def _others(self, sender: Station) -> list[Station]:
        return [station for station in self.stations if station is not sender]

    def _collect(self) -> None:
        for station in self.stations:
            self.received.update((station.vm.name, number) for number in station.receive())


@asynccontextmanager
async def open_fabric(vne: VNE, hosts: Mapping[str, NamespaceHost], *, steps: Steps = list) -> AsyncIterator[Fabric]:
    """The networks of a VNE, at rest on red. `steps` may change the plans."""
    run = f"{os.getpid()}-{next(_runs)}"
    async with AsyncExitStack() as stack:
        fabric = Fabric(vne, {})
        for name, host in hosts.items():
            namespace = await stack.enter_async_context(make_netns(f"qsnap-test-{run}-{name}"))
            stack.push_async_callback(remove_netns, namespace)
            links = await stack.enter_async_context(open_links(namespace, underlay=host.netns))
            part = vne.part(name)
            await links.apply(steps(plan_networks(part, Colour.RED)))
            fabric.links[name] = links
            for index, vm in enumerate(part.vms):
                fd = open_tap(namespace, tap_name(index, 0))
                stack.callback(os.close, fd)
                fabric.stations.append(Station(vm, part, links, fd))
        await fabric.wait_forwarding()
        yield fabric


async def cut_in_every_way(fabric: Fabric, active: Colour) -> None:
    """Every combination of VMs that are post-snapshot; the last one is all of them."""
    for post in subsets([station.vm.name for station in fabric.stations]):
        for station in fabric.stations:
            await station.move(active.other if station.vm.name in post else active)
        await fabric.exchange(post)


def open_tap(namespace: str, name: str) -> int:
    """A tap's other side, where a VM would be. Reading from it does not wait."""
    with entered(namespace):
        fd = open_here(TUN)
        fcntl.ioctl(fd, _TUNSETIFF, _INTERFACE.pack(name.encode(), _IFF_TAP | _IFF_NO_PI))
    os.set_blocking(fd, False)
    return fd


def subsets(vms: Sequence[str]) -> Iterator[set[str]]:
    """Every combination of VMs that are post-snapshot, all of them last."""
    for flags in itertools.product((False, True), repeat=len(vms)):
        yield set(itertools.compress(vms, flags))
