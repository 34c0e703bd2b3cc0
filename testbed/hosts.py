"""Hosts to test with: network namespaces on a switch, which is a bridge in a namespace of its own.

Some may be behind a router that translates addresses: they reach the others, and cannot be reached. Nothing of this is
seen in the machine's own namespace.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from struct import Struct
from typing import Any

import trio
from attrs import frozen
from pyroute2 import IPRoute, netns

from qsnap.host.netns import enter_command, entered, netns_path
from qsnap.host.netns_helper import NETLINK, open_here, turn_off_ipv6
from testbed import bad_link

MASQUERADE = """\
table ip nat {
  chain out { type nat hook postrouting priority srcnat; oifname "wan" masquerade; }
  chain in { type filter hook forward priority filter; iifname "wan" ct state != { established, related } drop; }
}
"""
_NODAD = 2  # IFA_F_NODAD: an address is used at once
SWITCH = "lan"  #: the name of a bridge that hosts are on
_INTERFACE, _ETHTOOL_VALUE = Struct("16sP16x"), Struct("II")  # ifreq, ethtool_value (linux/if.h, linux/ethtool.h)
_SIOCETHTOOL, _ETHTOOL_STXCSUM = 0x8946, 0x17
_runs = itertools.count()


@frozen
class NamespaceHost:
    """A host, for as long as its test bed lasts.

    `address` is its own, of IPv4: behind a router, one that the others cannot reach. `tunnel` is where tunnels end: the
    same. `address6` is of IPv6, and empty behind a router.
    """

    name: str
    netns: str
    address: str
    address6: str
    tunnel: str
    switch: str
    port: str

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line that runs a command on this host."""
        return [*enter_command(self.netns), *words]

    async def unplug(self) -> None:
        """Pull the cable. Nothing tells the host or its peers, but for the carrier that is gone."""
        await trio.to_thread.run_sync(_set_link, self.switch, self.port, "down")

    async def plug(self) -> None:
        """Put the cable back."""
        await trio.to_thread.run_sync(_set_link, self.switch, self.port, "up")

    @asynccontextmanager
    async def bad_link(self, *, delay_s: float = 0.2, loss: float = 0.3, seed: int = 1) -> AsyncIterator[None]:
        """Meanwhile each frame to and from this host is lost with the probability `loss`, or is `delay_s` late."""
        with ExitStack() as stack:
            try:
                await trio.to_thread.run_sync(stack.enter_context, _bad_link(self, delay_s, loss, seed))
                yield
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(stack.close)


@asynccontextmanager
async def hosts_in_namespaces(
    names: Sequence[str], *, behind: Mapping[str, str] | None = None, mtu: int = 1500
) -> AsyncIterator[dict[str, NamespaceHost]]:
    """Hosts by name, on one network of this MTU. `behind` has, for some, the name of the router they are behind."""
    run = f"qsnap-{os.getpid()}-{next(_runs)}"
    with ExitStack() as stack:
        try:
            bed = _Bed(run, stack)
            yield await trio.to_thread.run_sync(_build, bed, names, behind or {}, mtu)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(stack.close)


@frozen
class _Bed:
    run: str
    stack: ExitStack

    def namespace(self, name: str) -> str:
        whole = f"{self.run}-{name}"
        netns.create(whole)
        self.stack.callback(netns.remove, whole)
        with open_netlink(whole) as ip:
            ip.link("set", index=1, state="up")
        return whole


def open_netlink(name: str) -> IPRoute:
    """Netlink of a namespace. It must be closed by the thread that called this."""
    with entered(name):
        fd = open_here(NETLINK)
    return IPRoute(fileno=fd)


def add_cable(here: str, port: str, there: str, end: str, **attributes: Any) -> None:
    """A veth pair between two namespaces, both ends up. `attributes` are those of the port here."""
    target = os.open(netns_path(there), os.O_RDONLY | os.O_CLOEXEC)
    try:
        with open_netlink(here) as ip:
            ip.link("add", ifname=port, kind="veth", peer={"ifname": end, "net_ns_fd": target})
            if "master" in attributes:
                attributes["master"] = ip.link_lookup(ifname=attributes["master"])[0]
            ip.link("set", index=ip.link_lookup(ifname=port)[0], state="up", **attributes)
        with open_netlink(there) as ip:
            mtu = {"mtu": attributes["mtu"]} if "mtu" in attributes else {}
            ip.link("set", index=ip.link_lookup(ifname=end)[0], state="up", **mtu)
    finally:
        os.close(target)


def add_bridge(where: str, name: str) -> None:
    """A bridge that forwards at once."""
    with open_netlink(where) as ip:
        ip.link("add", ifname=name, kind="bridge", br_forward_delay=0, br_mcast_snooping=0)
        ip.link("set", index=ip.link_lookup(ifname=name)[0], state="up")


def add_address(where: str, name: str, address: str, prefix: int = 24) -> None:
    """An IP address of an interface, of either version."""
    with open_netlink(where) as ip:
        index = ip.link_lookup(ifname=name)[0]
        ip.addr("add", index=index, address=address, prefixlen=prefix, flags=_NODAD if ":" in address else 0)


def _set_link(where: str, name: str, state: str) -> None:
    with open_netlink(where) as ip:
        ip.link("set", index=ip.link_lookup(ifname=name)[0], state=state)


@contextmanager
def _bad_link(host: NamespaceHost, delay_s: float, loss: float, seed: int) -> Iterator[None]:
    """A program in the place of the host's port, which is joined to another port of the switch."""
    inner, outer = f"{host.port}-in", f"{host.port}-out"
    add_cable(host.switch, outer, host.switch, inner, master=SWITCH)
    _set_master(host, "")
    _send_whole_packets(host.netns, "eth0", on=False)
    _send_whole_packets(host.switch, outer, on=False)
    words = [sys.executable, "-S", str(bad_link.__file__), host.port, inner, str(delay_s), str(loss), str(seed)]
    command = [*enter_command(host.switch), *words]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stdout.readline(), "the program that carries frames did not start"
            yield
    finally:
        _send_whole_packets(host.netns, "eth0", on=True)
        _remove_link(host.switch, outer)
        _set_master(host, SWITCH)


def _set_master(host: NamespaceHost, bridge: str) -> None:
    with open_netlink(host.switch) as ip:
        master = ip.link_lookup(ifname=bridge)[0] if bridge else 0
        ip.link("set", index=ip.link_lookup(ifname=host.port)[0], master=master)


def _remove_link(where: str, name: str) -> None:
    with open_netlink(where) as ip:
        ip.link("del", index=ip.link_lookup(ifname=name)[0])


def _send_whole_packets(where: str, name: str, *, on: bool) -> None:
    """Whether what leaves an interface may lack its checksums, and be larger than a packet: the next one adds these."""
    value = ctypes.create_string_buffer(_ETHTOOL_VALUE.pack(_ETHTOOL_STXCSUM, on))
    request = _INTERFACE.pack(name.encode(), ctypes.addressof(value))
    with entered(where), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCETHTOOL, request)


def _build(bed: _Bed, names: Sequence[str], behind: Mapping[str, str], mtu: int) -> dict[str, NamespaceHost]:
    switch = bed.namespace("switch")
    with entered(switch):
        turn_off_ipv6()
    add_bridge(switch, SWITCH)
    routers = {
        router: _add_router(bed, router, switch, number, mtu)
        for number, router in enumerate(dict.fromkeys(behind.values()), start=1)
    }
    hosts = {}
    for number, name in enumerate(names, start=1):
        where, subnet = (routers[behind[name]]) if name in behind else (switch, "10.77.0")
        inside = bed.namespace(name)
        address = f"{subnet}.{number + 100}"
        host = NamespaceHost(
            name,
            inside,
            address=address,
            address6="" if name in behind else f"fd77::{number + 100}",
            tunnel=address,
            switch=where,
            port=f"port{number}",
        )
        add_cable(where, host.port, inside, "eth0", master=SWITCH, mtu=mtu)
        add_address(inside, "eth0", host.address)
        if host.address6:
            add_address(inside, "eth0", host.address6, 64)
        else:
            _add_gateway(inside, f"{subnet}.1")
        hosts[name] = host
    return hosts


def _add_router(bed: _Bed, name: str, switch: str, number: int, mtu: int) -> tuple[str, str]:
    """A router, as its namespace and the subnet behind it."""
    router, subnet = bed.namespace(name), f"192.168.{number}"
    add_cable(switch, f"router{number}", router, "wan", master=SWITCH, mtu=mtu)
    add_address(router, "wan", f"10.77.0.{number}")
    add_bridge(router, SWITCH)
    add_address(router, SWITCH, f"{subnet}.1")
    with entered(router):
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        subprocess.run(["nft", "-f", "-"], input=MASQUERADE.encode(), check=True)
    return router, subnet


def _add_gateway(where: str, address: str) -> None:
    with open_netlink(where) as ip:
        ip.route("add", dst="default", gateway=address)
