"""Coloured tunnels between hosts: who hears whom, in every combination of colours."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator

import pytest
import trio
from attrs import evolve

from qsnap.errors import HostError
from qsnap.host.tasks import one_error
from qsnap.model import Colour
from qsnap.rules.colouring import LinkStep, SetPort
from testbed.hosts import NamespaceHost, hosts_in_namespaces, open_netlink
from tests.live.fabric import FIRST, cut_in_every_way, open_fabric, spread_vne
from tests.live.lab import ROOT
from tests.live.ordinary import ordinary_user

Hosts = dict[str, NamespaceHost]

USER = 2_500_000 + os.getpid()  #: without an account
MAKE_TUNNELS = """
import os
from pathlib import Path
import trio
from qsnap.errors import HostError
from qsnap.host.bridges import open_links
from qsnap.host.netns import make_netns, remove_netns
from qsnap.host.tasks import one_error
from qsnap.model import VNE, Colour, Host, Network
from qsnap.rules.colouring import plan_networks

async def main():
    hosts = tuple(Host(f"h{n}", f"127.0.0.{n}", 1, f"127.0.0.{n}") for n in (1, 2))
    part = VNE("lab", (), (Network("lan"),), hosts).part("h1")
    async with make_netns(f"qsnap-test-{os.getpid()}") as netns:
        async with open_links(netns) as links:
            await links.apply(plan_networks(part, Colour.RED))
        print("listens" if ":12B5 " in Path("/proc/net/udp").read_text() else "does not listen")  # UDP port 4789
        await remove_netns(netns)

try:
    with one_error():
        trio.run(main)
except HostError as error:
    print(error)
"""


@pytest.fixture
async def two() -> AsyncIterator[Hosts]:
    async with hosts_in_namespaces(["alpha", "beta"]) as hosts:
        yield hosts


@pytest.mark.parametrize("names", [["alpha", "beta"], ["alpha", "beta", "gamma"]], ids=len)
@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
async def test_frames_pass_once_and_never_back(names: list[str], ipv6: bool) -> None:
    """Two snapshots one after the other. Hosts turn one by one, and nobody misses anything meanwhile."""
    async with (
        hosts_in_namespaces(names) as hosts,
        open_fabric(spread_vne("lab", hosts, 2, ipv6=ipv6), hosts) as fabric,
    ):
        for active in (Colour.RED, Colour.BLUE):
            await fabric.exchange()
            async for _ in fabric.turn(active):
                await fabric.exchange()
            await cut_in_every_way(fabric, active)
        await fabric.quiet()
        assert not fabric.surplus()
        assert fabric.received.total() > 500


def without_isolation(steps: list[LinkStep]) -> list[LinkStep]:
    return [evolve(step, isolated=False) if isinstance(step, SetPort) else step for step in steps]


async def test_without_isolation_a_broadcast_comes_twice(two: Hosts) -> None:
    """Negative control."""
    async with open_fabric(spread_vne("lab", two, 1), two, steps=without_isolation) as fabric:
        beta = fabric.stations[1]
        await beta.move(Colour.BLUE)
        await fabric.exchange({beta.vm.name}, complete=False)
        await fabric.quiet()
        assert set(fabric.surplus().items()) == {((beta.vm.name, FIRST), 1)}


async def test_links_turned_the_wrong_way_let_frames_pass_back(two: Hosts) -> None:
    """Negative control: a frame of category 3 comes through, and one of category 2 does not."""
    async with open_fabric(spread_vne("lab", two, 1), two) as fabric:
        async for _ in fabric.turn(Colour.BLUE):
            pass
        await fabric.stations[1].move(Colour.BLUE)
        await fabric.exchange({"beta0"}, complete=False)
        await fabric.quiet()
        assert {name for name, _ in fabric.surplus()} == {"alpha0"}
        assert {name for name, _ in fabric.missing()} == {"beta0"}


async def test_two_vnes_on_the_same_hosts_do_not_hear_each_other(two: Hosts) -> None:
    async with (
        open_fabric(spread_vne("one", two, 1), two) as one,
        open_fabric(spread_vne("two", two, 1), two) as other,
    ):
        await one.exchange()
        await one.quiet()
        assert not one.surplus()
        assert not [number for station in other.stations for number in station.receive()]


async def test_a_number_in_use_is_refused_with_advice(two: Hosts) -> None:
    async with open_fabric(spread_vne("one", two, 1, vni=4000), two):
        with pytest.raises(HostError, match=r"tunnel of the number 4000 already[\s\S]*`vni`"), one_error():
            async with open_fabric(spread_vne("two", two, 1, vni=4000), two):
                pass
        async with open_fabric(spread_vne("two", two, 1, vni=4002), two) as fabric:
            await fabric.exchange()


async def test_a_vne_comes_up_again_at_once(two: Hosts) -> None:
    """The kernel has not yet removed the tunnels of the namespaces that went."""
    vne = spread_vne("lab", two, 1)
    for _ in range(5):
        async with open_fabric(vne, two) as fabric:
            await fabric.exchange()


def test_an_ordinary_user_is_told_that_tunnels_are_roots() -> None:
    with ordinary_user(USER) as user:
        assert "only root can make tunnels" in user.run(sys.executable, "-c", MAKE_TUNNELS)


async def test_tunnels_end_where_the_process_was_started(two: Hosts) -> None:
    command = two["alpha"].command([sys.executable, "-c", MAKE_TUNNELS])
    done = await trio.run_process(command, capture_stdout=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == b"listens\n"


async def test_nothing_of_it_is_seen_on_the_host_itself(two: Hosts) -> None:
    async with open_fabric(spread_vne("lab", two, 1), two):
        for host in two.values():
            assert await trio.to_thread.run_sync(interfaces, host) == {"lo", "eth0"}


def interfaces(host: NamespaceHost) -> set[str]:
    with open_netlink(host.netns) as ip:
        return {link.get_attr("IFLA_IFNAME") for link in ip.get_links()}
