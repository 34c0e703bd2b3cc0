"""Applies link plans (`rules.colouring`) to the kernel of a network namespace, through netlink."""

from __future__ import annotations

import errno
import os
import queue
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from attrs import define, field
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from qsnap.errors import HostError
from qsnap.host.netns import run_in_netns
from qsnap.rules.colouring import AddBridge, AddLink, AddTap, LinkStep, Move, SetPort

TUN_DEVICE = "/dev/net/tun"
NEEDED_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  #: bits, from linux/capability.h


def check_networking() -> None:
    """Raise HostError if this process may not make networks, or this host can make no taps."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("\nCapEff:")[2].split()[0], 16)
    lacking = [name for name, bit in NEEDED_CAPABILITIES.items() if not effective >> bit & 1]
    if lacking:
        raise HostError(f"making networks takes {' and '.join(lacking)}", advice="Run qsnap as root.")
    if not os.access(TUN_DEVICE, os.R_OK | os.W_OK):
        reason = "cannot be opened" if os.path.exists(TUN_DEVICE) else "is missing"
        raise HostError(f"it {reason}, and VMs need taps", where=TUN_DEVICE, advice="Load the kernel module tun.")


@define
class Kernel:
    """An open netlink socket, and the interface indices it was asked for so far."""

    ip: IPRoute
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


Job = Callable[[Kernel], None]


@define
class Links:
    """An open netlink socket in a namespace, in a thread of its own: moving a tap costs 0.4 ms,
    opening the socket 1.4 ms more.

    Made by `open_links`; several tasks may apply plans at once.
    """

    netns: str
    _jobs: queue.SimpleQueue[Job | None] = field(factory=queue.SimpleQueue)

    async def warm_up(self, steps: Iterable[Move]) -> None:
        """Look up the interfaces of steps that are to come, so that their time is the kernel's alone."""
        names = [name for step in steps for name in (step.name, step.bridge)]
        await self._run(lambda kernel: [kernel.index(name) for name in names])

    async def apply(self, steps: Iterable[LinkStep]) -> None:
        """Apply the steps in order, as one piece. Raises HostError at the first that the kernel refuses."""

        def apply_all(kernel: Kernel) -> None:
            for step in steps:
                _apply(kernel, step, self.netns)

        await self._run(apply_all)

    async def _run(self, call: Callable[[Kernel], object]) -> None:
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        failures: list[Exception] = []

        def job(kernel: Kernel) -> None:
            try:
                call(kernel)
            except Exception as error:  # raised again below, in the task that asked
                failures.append(error)
            finally:
                token.run_sync_soon(done.set)

        self._jobs.put(job)
        with trio.CancelScope(shield=True):  # the kernel answers at once, and half a move must not be left behind
            await done.wait()
        if failures:
            raise failures[0]

    def _serve(self) -> None:
        with IPRoute() as ip:
            kernel = Kernel(ip)
            while (job := self._jobs.get()) is not None:
                job(kernel)


@asynccontextmanager
async def open_links(netns: str) -> AsyncIterator[Links]:
    """Links of the namespace, ready for steps whose time counts."""
    links = Links(netns)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_in_netns, netns, links._serve)
        try:
            yield links
        finally:
            links._jobs.put(None)


def _apply(kernel: Kernel, step: LinkStep, netns: str) -> None:
    try:
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
    except (NetlinkError, OSError) as error:
        reason = error.args[1] if len(error.args) > 1 else error
        raise HostError(f"the kernel refused {step}: {reason}", where=f"network namespace {netns}") from error


def _add_bridge(kernel: Kernel, step: AddBridge) -> None:
    options = {"br_stp_state": 0, "br_forward_delay": 0, "br_mcast_snooping": 0}
    kernel.ip.link("add", ifname=step.name, kind="bridge", **options)
    kernel.set(step.name, mtu=step.mtu, ifalias=step.alias, state="up")


def _add_tap(kernel: Kernel, step: AddTap) -> None:
    kernel.ip.link("add", ifname=step.name, kind="tuntap", mode="tap")
    kernel.set(step.name, mtu=step.mtu, ifalias=step.alias, master=kernel.index(step.bridge), state="up")


def _add_link(kernel: Kernel, step: AddLink) -> None:
    kernel.ip.link("add", ifname=step.red_end, kind="veth", peer={"ifname": step.blue_end})
    for end, bridge in ((step.red_end, step.red_bridge), (step.blue_end, step.blue_bridge)):
        kernel.set(end, mtu=step.mtu, master=kernel.index(bridge), state="up")


def _set_port(kernel: Kernel, step: SetPort) -> None:
    flood = int(step.flood)
    kernel.ip.brport(
        "set",
        index=kernel.index(step.name),
        unicast_flood=flood,
        mcast_flood=flood,
        bcast_flood=flood,
        learning=int(step.learning),
    )
