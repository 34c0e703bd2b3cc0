"""Hosts behind different routers, joined by a relay: the tunnels between them, and who is let in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qsnap.fleet.pki import init_ca, issue
from qsnap.host.tasks import one_error
from qsnap.host.tunnels import check_tunnels
from qsnap.model import Colour
from testbed.hosts import NamespaceHost, hosts_in_namespaces
from testbed.relay import RelayError, open_relay
from tests.live.fabric import cut_in_every_way, open_fabric, spread_vne
from tests.live.test_hosts import is_answered

Hosts = dict[str, NamespaceHost]


@pytest.fixture
async def hosts() -> AsyncIterator[Hosts]:
    behind = {"left": "router1", "right": "router2"}
    async with hosts_in_namespaces(["relay", "left", "right"], behind=behind) as hosts:
        yield hosts


def make_identities(directory: Path, names: list[str]) -> dict[str, Path]:
    init_ca(directory)
    return {name: issue(directory, name).path for name in names}


async def test_colours_hold_through_a_relay(hosts: Hosts, tmp_path: Path) -> None:
    left, right = hosts["left"], hosts["right"]
    assert not is_answered(left, right, patience_s=0.2)
    identities = make_identities(tmp_path / "ca", list(hosts))
    async with open_relay(hosts["relay"], [left, right], identities, tmp_path) as joined:
        assert is_answered(joined["left"], joined["right"])
        assert is_answered(joined["relay"], joined["left"])
        members = {name: joined[name] for name in ("left", "right")}
        vne = spread_vne("lab", members, 2)
        assert "`mtu = 1450`" in await check_tunnels(vne.part("left"), underlay=left.netns)
        async with open_fabric(vne, members) as fabric:
            for active in Colour:
                async for _ in fabric.turn(active):
                    await fabric.exchange()
                await cut_in_every_way(fabric, active)
            await fabric.quiet()
            assert not fabric.surplus()
            assert fabric.received.total() > 500


async def test_who_has_no_identity_of_the_authority_is_not_let_in(hosts: Hosts, tmp_path: Path) -> None:
    identities = make_identities(tmp_path / "ca", ["relay", "right"])
    identities |= make_identities(tmp_path / "other", ["left"])
    with pytest.raises(RelayError, match="left: OpenVPN has not joined"), one_error():
        async with open_relay(hosts["relay"], [hosts["left"]], identities, tmp_path, start_s=5):
            pass
