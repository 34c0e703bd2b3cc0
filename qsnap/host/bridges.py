"""Applies link plans (`rules.colouring`) to the kernel of a network namespace, through netlink."""

from __future__ import annotations

import errno
import fcntl
import os
import queue
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from struct import Struct
from typing import TypeVar

import trio
from attrs import define, field, frozen
from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTM_SETLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from qsnap.errors import HostError
from qsnap.host.netns import OWN, Opener, run_with_opener
from qsnap.host.netns_helper import NETLINK, TUN
from qsnap.host.tunnels import make_tunnel
from qsnap.rules.colouring import AddBridge, AddLink, AddTap, AddTunnel, LinkStep, Move, Remove, SetPort

T = TypeVar("T")

_ANSWER = Struct("=I12xi")  # nlmsghdr.nlmsg_len, then nlmsgerr.error: 0 or a negative errno (linux/netlink.h)
_ANSWER_BYTES = 1 << 16
USUAL_PORT = {  # a port that was taken off a bridge comes back as new, so what differs from this would be lost
    **dict.fromkeys(("LEARNING", "UNICAST_FLOOD", "MCAST_FLOOD", "BCAST_FLOOD"), 1),
    **dict.fromkeys(("MODE", "GUARD", "PROTECT", "FAST_LEAVE", "ISOLATED", "LOCKED", "NEIGH_SUPPRESS"), 0),
}
_EVERYBODY = "00:00:00:00:00:00"  # a VXLAN's own table: where frames for many go, or for an address it does not know
_INTERFACE = Struct("16sH22x")  # ifreq: ifr_name, ifr_flags (linux/if.h)
_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000


def check_networking() -> None:
    """Raise HostError if this process can make no taps."""
    if not os.path.exists(TUN):
        raise HostError("it is missing, and VMs need taps", where=TUN, advice="Load the kernel module tun.")
    if not os.access(TUN, os.R_OK | os.W_OK):
        advice = f"Root can open it to all, as Debian has it: chmod 666 {TUN}. Or run qsnap as root."
        raise HostError("it cannot be opened, and VMs need taps", where=TUN, advice=advice)


@define
class Kernel:
    """An open netlink socket, what opens more in its namespace, and the interface indices asked for so far.

    `underlay` is the namespace that tunnels pass through.
    """

    ip: IPRoute
    open: Opener
    underlay: str
    indices: dict[str, int] = field(factory=dict)

    def index(self, name: str) -> int:
        if name not in self.indices:
            found = self.ip.link_lookup(ifname=name)
            if not found:
                raise OSError(errno.ENODEV, f"there is no interface {name}")
            self.indices[name] = int(found[0])
        return self.indices[name]

    def set(self, name: str, **attributes: object) -> None:
        self.ip.link("set", index=self.index(name), **attributes)


@frozen
class TapPort:
    """A tap as a port of somebody else's bridge. `obstacle` is why it cannot be moved and put back, if so."""

    bridge: str
    mtu: int
    obstacle: str


Job = Callable[[Kernel], None]


@define
class PreparedMoves:
    """Moves of interfaces to other bridges, encoded: one system call makes all of them."""

    socket: socket.socket  # of the namespace it was opened in, whatever thread uses it
    request: bytes
    count: int
    netns: str

    def apply(self) -> None:
        """Make the moves; they are made when this returns, about 0.1 ms later. Raises HostError if one is refused."""
        if not self.count:
            return
        self.socket.send(self.request)
        acknowledged = 0
        while acknowledged < self.count:  # the kernel answers before `send` returns
            answer = memoryview(self.socket.recv(_ANSWER_BYTES))
            while answer:
                length, error = _ANSWER.unpack_from(answer)
                if error:
                    reason = os.strerror(-error)
                    raise HostError(
                        f"the kernel refused to move a tap: {reason}", where=f"network namespace {self.netns}"
                    )
                acknowledged += 1
                answer = answer[length:]


@define
class Links:
    """An open netlink socket in a namespace, in a thread of its own: opening one takes 1.4 ms.

    Made by `open_links`; several tasks may apply plans at once.
    """

    netns: str
    underlay: str
    _jobs: queue.SimpleQueue[Job | None] = field(factory=queue.SimpleQueue)
    _prepared: list[PreparedMoves] = field(factory=list)

    async def prepare(self, moves: Sequence[Move]) -> PreparedMoves:
        """Have everything ready for moves that are to come, so that their time is the kernel's alone.

        Raises HostError for an interface that is not there.
        """
        prepared = await self._run(lambda kernel: _prepare(kernel, moves, self.netns))
        self._prepared.append(prepared)
        return prepared

    async def apply(self, steps: Iterable[LinkStep]) -> None:
        """Apply the steps in order, as one piece. Raises HostError at the first that the kernel refuses."""

        def apply_all(kernel: Kernel) -> None:
            for step in steps:
                _apply(kernel, step, self.netns)

        await self._run(apply_all)

    async def find_ports(self, taps: Sequence[str]) -> list[TapPort]:
        """What bridges these taps are on."""
        return [await self._run(partial(_find_port, tap=tap)) for tap in taps]

    async def exists(self, name: str) -> bool:
        """Whether there is an interface of this name."""
        return bool(await self._run(lambda kernel: kernel.ip.link_lookup(ifname=name)))

    async def _run(self, call: Callable[[Kernel], T]) -> T:
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        results: list[T] = []
        failures: list[Exception] = []

        def job(kernel: Kernel) -> None:
            try:
                results.append(call(kernel))
            except Exception as error:  # raised again below, in the task that asked
                failures.append(error)
            finally:
                token.run_sync_soon(done.set)

        self._jobs.put(job)
        with trio.CancelScope(shield=True):  # the kernel answers at once, and half a move must not be left behind
            await done.wait()
        if failures:
            raise failures[0]
        return results[0]

    def _serve(self, ready: trio.Event, opener: Opener) -> None:
        with IPRoute(fileno=opener(NETLINK)) as ip:
            kernel = Kernel(ip, opener, self.underlay)
            trio.from_thread.run_sync(ready.set)
            while (job := self._jobs.get()) is not None:
                job(kernel)


@asynccontextmanager
async def open_links(netns: str, *, underlay: str = OWN) -> AsyncIterator[Links]:
    """Links of the namespace, ready for steps whose time counts. Tunnels pass through the namespace `underlay`."""
    links = Links(netns, underlay)
    async with trio.open_nursery() as nursery:
        ready = trio.Event()
        nursery.start_soon(run_with_opener, netns, partial(links._serve, ready))
        try:
            await ready.wait()  # what fails to open cancels this; a job would wait for ever
            yield links
        finally:
            links._jobs.put(None)
            for moves in links._prepared:
                moves.socket.close()


def _prepare(kernel: Kernel, moves: Sequence[Move], netns: str) -> PreparedMoves:
    request = b""
    with _explained(f"{len(moves)} moves", netns):
        for move in moves:
            message = ifinfmsg()
            message["index"] = kernel.index(move.name)
            message["attrs"] = [("IFLA_MASTER", kernel.index(move.bridge))]
            message["header"]["type"] = RTM_SETLINK
            message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK
            message.encode()
            request += message.data
        netlink = socket.socket(fileno=kernel.open(NETLINK))
    return PreparedMoves(netlink, request, len(moves), netns)


def _apply(kernel: Kernel, step: LinkStep, netns: str) -> None:
    with _explained(str(step), netns):
        match step:
            case Move():
                kernel.set(step.name, master=kernel.index(step.bridge))
            case SetPort():
                _set_port(kernel, step)
            case AddBridge():
                _add_bridge(kernel, step)
            case AddTap():
                _add_tap(kernel, step)
            case AddLink():
                _add_link(kernel, step)
            case AddTunnel():
                _add_tunnel(kernel, step)
            case Remove():
                kernel.ip.link("del", index=kernel.index(step.name))


@contextmanager
def _explained(what: str, netns: str) -> Iterator[None]:
    try:
        yield
    except (NetlinkError, OSError) as error:
        reason = error.args[1] if len(error.args) > 1 else error
        raise HostError(f"the kernel refused {what}: {reason}", where=f"network namespace {netns}") from error


def _add_bridge(kernel: Kernel, step: AddBridge) -> None:
    options = {"br_stp_state": 0, "br_forward_delay": 0, "br_mcast_snooping": 0}
    kernel.ip.link("add", ifname=step.name, kind="bridge", **options)
    kernel.set(step.name, mtu=step.mtu, ifalias=step.alias, state="up")


def _add_tap(kernel: Kernel, step: AddTap) -> None:
    tun = kernel.open(TUN)
    try:
        fcntl.ioctl(tun, _TUNSETIFF, _INTERFACE.pack(step.name.encode(), _IFF_TAP | _IFF_NO_PI))
        fcntl.ioctl(tun, _TUNSETPERSIST, 1)
    finally:
        os.close(tun)
    kernel.set(step.name, mtu=step.mtu, ifalias=step.alias, master=kernel.index(step.bridge), state="up")


def _add_link(kernel: Kernel, step: AddLink) -> None:
    kernel.ip.link("add", ifname=step.red_end, kind="veth", peer={"ifname": step.blue_end})
    for end, bridge in ((step.red_end, step.red_bridge), (step.blue_end, step.blue_bridge)):
        kernel.set(end, mtu=step.mtu, master=kernel.index(bridge), state="up")


def _add_tunnel(kernel: Kernel, step: AddTunnel) -> None:
    make_tunnel(step, kernel.underlay)
    kernel.set(step.name, mtu=step.mtu, master=kernel.index(step.bridge), state="up")
    for remote in step.remotes:
        kernel.ip.fdb("append", ifindex=kernel.index(step.name), lladdr=_EVERYBODY, dst=remote)


def _set_port(kernel: Kernel, step: SetPort) -> None:
    flood = int(step.flood)
    kernel.ip.brport(
        "set",
        index=kernel.index(step.name),
        unicast_flood=flood,
        mcast_flood=flood,
        bcast_flood=flood,
        learning=int(step.learning),
        isolated=int(step.isolated),
    )


def _find_port(kernel: Kernel, tap: str) -> TapPort:
    """Moving a tap and putting it back must change nothing else, and its new port must forward at once."""
    found = kernel.ip.link_lookup(ifname=tap)
    if not found:
        return TapPort("", 0, f"there is no interface {tap} in the network namespace of its VM")
    (port,) = kernel.ip.link("get", index=found[0])
    if port.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_KIND") != "bridge":
        return TapPort("", 0, f"{tap} is not on a bridge of the kernel's")
    (bridge,) = kernel.ip.link("get", index=port.get_attr("IFLA_MASTER"))
    name = bridge.get_attr("IFLA_IFNAME")
    options = bridge.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    settings = port.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA")
    obstacles = [
        *([f"the bridge {name} has STP on, so a new port would wait"] if options.get_attr("IFLA_BR_STP_STATE") else []),
        *([f"the bridge {name} filters VLANs"] if options.get_attr("IFLA_BR_VLAN_FILTERING") else []),
        *(
            f"the port {tap} has the setting {key.lower()} = {settings.get_attr(f'IFLA_BRPORT_{key}')}"
            for key, usual in USUAL_PORT.items()
            if settings.get_attr(f"IFLA_BRPORT_{key}") not in (usual, None)
        ),
    ]
    return TapPort(name, bridge.get_attr("IFLA_MTU"), obstacles[0] if obstacles else "")
