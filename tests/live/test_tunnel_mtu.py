"""Packets as large as a network allows, where the way between hosts has room for them, and where it has not."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from attrs import evolve

from qsnap.errors import HostError
from qsnap.host.netns import make_netns, remove_netns
from qsnap.host.tunnels import check_tunnels
from testbed.hosts import NamespaceHost, add_address, add_cable, hosts_in_namespaces
from tests.live.fabric import open_fabric, spread_vne
from tests.live.test_hosts import PORT, is_answered, open_socket, stream

IP_MTU_DISCOVER, DONT, DO = 10, 0, 2  # linux/in.h
HEADERS_BYTES = 28  # of IP and UDP
ROOM = {"IPv4": 1450, "IPv6": 1430}  #: in 1500 bytes, by what tunnels are made of
Hosts = dict[str, NamespaceHost]


@pytest.fixture
async def hosts() -> AsyncIterator[Hosts]:
    async with hosts_in_namespaces(["alpha", "beta"]) as hosts:
        yield hosts


@asynccontextmanager
async def open_guests(hosts: Hosts, mtu: int, version: str) -> AsyncIterator[list[NamespaceHost]]:
    """A guest on each host, played by a namespace, on a network with this MTU."""
    vne = spread_vne("lab", hosts, 1, ipv6=version == "IPv6")
    vne = evolve(vne, networks=(evolve(vne.networks[0], mtu=mtu),))
    async with open_fabric(vne, hosts) as fabric, AsyncExitStack() as stack:
        guests = []
        for number, (host, links) in enumerate(fabric.links.items(), start=1):
            name, address = f"qsnap-test-{os.getpid()}-{host}", f"10.1.0.{number}"
            await stack.enter_async_context(make_netns(name))
            stack.push_async_callback(remove_netns, name)

            def connect(name: str = name, address: str = address, switch: str = links.netns) -> None:
                add_cable(switch, "guest", name, "eth0", master="net0-red", mtu=mtu)
                add_address(name, "eth0", address)

            await trio.to_thread.run_sync(connect)
            guests.append(NamespaceHost(host, name, address, "", address, links.netns, "guest"))
        with trio.fail_after(20):
            while not is_answered(guests[0], guests[1], patience_s=0.2):
                await trio.sleep(0.01)
        yield guests


def arrives(sender: NamespaceHost, receiver: NamespaceHost, size: int, fragments: int) -> bool:
    """Whether an IP packet of so many bytes arrives. A sender that is told to send smaller ones has not sent it."""
    with open_socket(receiver) as there, open_socket(sender) as here:
        there.bind((receiver.address, PORT))
        there.settimeout(0.5)
        here.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, fragments)
        try:
            here.sendto(bytes(size - HEADERS_BYTES), (receiver.address, PORT))
            return len(there.recv(1 << 16)) == size - HEADERS_BYTES
        except OSError:
            return False


@pytest.mark.parametrize("version", ROOM)
async def test_what_fits_passes_whole(hosts: Hosts, version: str) -> None:
    async with open_guests(hosts, ROOM[version], version) as (sender, receiver):
        assert arrives(sender, receiver, ROOM[version], DO)
        arrived, _ = await trio.to_thread.run_sync(stream, sender, receiver, bytes(1 << 20))
        assert arrived


@pytest.mark.parametrize(("version", "cut_up"), [("IPv4", True), ("IPv6", False)])
@pytest.mark.parametrize("mtu", [1500, 9000])
async def test_what_does_not_fit_is_cut_up_or_the_guest_is_told(
    hosts: Hosts, version: str, cut_up: bool, mtu: int
) -> None:
    """What may not be cut up is refused by ICMP with the right size, from which TCP learns, too."""
    async with open_guests(hosts, mtu, version) as (sender, receiver):
        assert arrives(sender, receiver, mtu, DONT) is cut_up
        assert not arrives(sender, receiver, mtu, DO)
        assert not arrives(sender, receiver, ROOM[version] + 1, DO)
        assert arrives(sender, receiver, ROOM[version], DO)
        assert arrives(sender, receiver, mtu, DONT)  # the guest has learnt, and cuts it up itself
        arrived, _ = await trio.to_thread.run_sync(stream, receiver, sender, bytes(1 << 20))
        assert arrived


@pytest.mark.parametrize("version", ROOM)
async def test_the_warning_names_what_fits(hosts: Hosts, version: str) -> None:
    vne = spread_vne("lab", hosts, 1, ipv6=version == "IPv6").part("alpha")
    warning = await check_tunnels(vne, underlay=hosts["alpha"].netns)
    assert f"`mtu = {ROOM[version]}`" in warning
    assert ("cut up" in warning) is (version == "IPv4")
    vne = evolve(vne, networks=(evolve(vne.networks[0], mtu=ROOM[version]),))
    assert await check_tunnels(vne, underlay=hosts["alpha"].netns) == ""


@pytest.mark.parametrize(
    ("host", "message"),
    [("alpha", "host alpha: it does not have the address of its tunnels"), ("beta", "there is no way to 172.31.0.1")],
)
async def test_a_wrong_address_is_noticed(hosts: Hosts, host: str, message: str) -> None:
    vne = spread_vne("lab", hosts, 1).part("alpha")
    wrong = tuple(evolve(each, tunnel="172.31.0.1") if each.name == host else each for each in vne.hosts)
    with pytest.raises(HostError, match=message):
        await check_tunnels(evolve(vne, hosts=wrong), underlay=hosts["alpha"].netns)
