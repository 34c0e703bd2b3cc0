"""Tunnels between hosts: making one, and looking at the ways that they take."""

from __future__ import annotations

import errno
import ipaddress
import time

import trio
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from qsnap.errors import HostError
from qsnap.host.netns import OWN, entered, is_privileged
from qsnap.host.netns_helper import NETLINK, open_here
from qsnap.model import VNE, Host
from qsnap.rules.colouring import AddTunnel
from qsnap.rules.tunnels import mtu_warning, peers, this_host

FREE_S = 5.0  #: a namespace that was removed keeps its tunnels until the kernel comes to take it apart


def make_tunnel(step: AddTunnel, underlay: str) -> None:
    """Make the interface in the namespace that this thread is in; what is sent through it passes through `underlay`.

    A VXLAN keeps the namespace of the socket that it was asked for on. So nothing of it is seen in `underlay`.
    """
    _check_privileges(step.name)
    local = {"vxlan_local6" if ":" in step.local else "vxlan_local": step.local}
    options = {"vxlan_id": step.vni, "vxlan_port": step.port, "vxlan_learning": 1, **local}
    deadline_s = time.monotonic() + FREE_S
    with entered(underlay) as target, IPRoute(fileno=open_here(NETLINK)) as ip:
        while True:
            try:
                ip.link("add", ifname=step.name, kind="vxlan", net_ns_fd=target, **options)
                return
            except NetlinkError as error:
                if error.code != errno.EEXIST or time.monotonic() > deadline_s:
                    raise _refusal(step, error) from error
            time.sleep(0.01)


def _check_privileges(where: str) -> None:
    if not is_privileged():
        advice = "Run qsnap as root, or put all VMs on one host."
        raise HostError("only root can make tunnels between hosts", where=where, advice=advice)


def _refusal(step: AddTunnel, error: NetlinkError) -> Exception:
    match error.code:
        case errno.EEXIST:
            message = f"this host has a tunnel of the number {step.vni} already, of another VNE or of another program"
            advice = "Give the network another number in the description: `vni` in its table, an even one."
            return HostError(message, where=step.name, advice=advice)
        case errno.EADDRINUSE:
            message = f"another program has UDP port {step.port}, which tunnels take"
            return HostError(message, where=step.name, advice=f"See which: ss -ulpn sport = :{step.port}")
        case errno.EOPNOTSUPP:
            return HostError("the kernel has no VXLAN", where=step.name, advice="Load the kernel module vxlan.")
        case _:
            return OSError(*error.args)


async def check_tunnels(vne: VNE, *, underlay: str = OWN) -> str:
    """What the user of a part of a VNE should know about the ways to the other hosts; empty if there is nothing.

    Raises HostError if this host does not have its tunnel address, or has no way to another host.
    """
    if not peers(vne):
        return ""
    _check_privileges(f"host {vne.here}")

    def look() -> dict[str, int]:
        with entered(underlay), IPRoute(fileno=open_here(NETLINK)) as ip:
            _check_address(ip, this_host(vne))
            return {host.name: _path_mtu(ip, host) for host in peers(vne)}

    return mtu_warning(vne, await trio.to_thread.run_sync(look))


def _check_address(ip: IPRoute, host: Host) -> None:
    found = {str(address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS")) for address in ip.get_addr()}
    if str(ipaddress.ip_address(host.tunnel)) not in found:
        raise HostError(
            f"it does not have the address of its tunnels, {host.tunnel}",
            where=f"host {host.name}",
            advice=f"It has {', '.join(sorted(found))}. Set `tunnel` in the description's table [hosts].",
        )


def _path_mtu(ip: IPRoute, host: Host) -> int:
    """What the kernel believes to fit into one packet to a host."""
    try:
        (route,) = ip.route("get", dst=host.tunnel)
    except NetlinkError as error:
        advice = "Give this host a route there, or set `tunnel` in the description's table [hosts]."
        raise HostError(f"there is no way to {host.tunnel}: {error.args[1]}", where=host.name, advice=advice) from error
    (link,) = ip.link("get", index=route.get_attr("RTA_OIF"))
    return route.get_nested("RTA_METRICS", "RTAX_MTU") or int(link.get_attr("IFLA_MTU"))
