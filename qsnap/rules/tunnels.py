"""The tunnels of a VNE that is spread over hosts: who they lead to, how they are told apart, what fits into them.

They are VXLAN (RFC 7348): Ethernet frames in UDP, told apart by a number of 24 bits, the VNI.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping

from qsnap.model import VNE, VNI_LIMIT, Colour, Host

TUNNEL_PORT = 4789  #: of UDP, as RFC 7348 has it


def this_host(vne: VNE) -> Host:
    """The host that `vne` is the part of."""
    (host,) = (host for host in vne.hosts if host.name == vne.here)
    return host


def peers(vne: VNE) -> tuple[Host, ...]:
    """The other hosts, if `vne` is the part of one."""
    return tuple(host for host in vne.hosts if vne.here and host.name != vne.here)


def vni(vne: VNE, network: int, colour: Colour) -> int:
    """The number of a network's tunnels: an even one for red, and the next one for blue.

    It is the network's `vni`, or follows from its name and the VNE's.
    """
    given = vne.networks[network]
    digest = hashlib.sha256(f"{vne.name}/{given.name}".encode()).digest()
    base = given.vni or 2 + 2 * (int.from_bytes(digest[:8], "big") % (VNI_LIMIT // 2 - 1))
    return base + (colour is Colour.BLUE)


def overhead_bytes(address: str) -> int:
    """What a tunnel adds to the packets in it: IP, UDP, VXLAN and Ethernet headers."""
    return {4: 20, 6: 40}[ipaddress.ip_address(address).version] + 8 + 8 + 14


def mtu_warning(vne: VNE, path_mtus: Mapping[str, int]) -> str:
    """What to tell the user where packets may be too large for the way to a host, whose MTU is given; else empty.

    Linux cuts up what it sends through a tunnel of IPv4. Through one of IPv6 it does not: what guests themselves allow
    to be cut up (IPv4 without DF) is lost there, and so is what is not IP. All else is refused by ICMP.
    """
    room = {host: path_mtus[host.name] - overhead_bytes(host.tunnel) for host in peers(vne)}
    large = [network for network in vne.networks if network.mtu > min(room.values(), default=network.mtu)]
    if not large:
        return ""
    host = min(room, key=lambda host: room[host])
    fate = "lost, unless guests heed ICMP," if ":" in host.tunnel else "cut up"
    names = ", ".join(f"{network.name} (MTU {network.mtu})" for network in large)
    needed = max(network.mtu for network in large) + overhead_bytes(host.tunnel)
    return (
        f"the largest packets of {names} are {fate} between {vne.here} and {host.name}, where {path_mtus[host.name]} "
        f"bytes fit. `mtu = {room[host]}` in the description avoids it, or an MTU of {needed} between the hosts."
    )
