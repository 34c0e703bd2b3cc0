"""How a network is built from two bridges, and which links change in a coloured cut.

A network has a red and a blue bridge. At rest every tap is on the active colour. At its cut a VM's taps move to
the other colour, so that bridge carries the frames of post-snapshot VMs only. A veth pair joins the bridges one
way: its end on the post-snapshot bridge neither floods nor learns, so that bridge never sends anything into it.
Hence no frame sent after its sender's cut reaches a receiver before the receiver's cut (category 3), while frames
from before the cut still pass (category 2). Colouring of packets: Lai and Yang, "On distributed snapshots" (1987);
VNsnap, section 3.3.

Between hosts there is a tunnel for each colour, a port of the bridge of that colour. A frame from before the cut then
has two ways to the post-snapshot bridge of another host: over the tunnel and the link there, or over the link here and
the other tunnel. The second is cut off, else whatever is for everybody would come twice: on the post-snapshot bridge
both the link's end and the tunnel are `isolated`, which keeps frames from passing between these two ports.

Attached VMs are on a bridge of somebody else's, which is the red one. The blue one is put beside it, and their taps are
on it only while a snapshot is being taken. Without a bridge that colours can be kept on, nothing is moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from attrs import frozen

from qsnap.model import VNE, Colour
from qsnap.rules.tunnels import TUNNEL_PORT, peers, this_host, vni

STEM_LIMIT = 10  #: of the 15 characters of an interface's name, five say which one of a network's it is


@frozen
class AddBridge:
    """A bridge without spanning tree, forward delay or multicast snooping."""

    name: str
    mtu: int
    alias: str


@frozen
class AddTap:
    """A persistent tap, up, on `bridge`."""

    name: str
    bridge: str
    mtu: int
    alias: str


@frozen
class AddLink:
    """A veth pair whose ends are ports of the red and the blue bridge."""

    red_end: str
    blue_end: str
    red_bridge: str
    blue_bridge: str
    mtu: int


@frozen
class AddTunnel:
    """A VXLAN interface as a port of `bridge`, joined to those with the same `vni` on other hosts.

    `local` and `remotes` are IP addresses. What is for everybody, or for an address not learnt yet, is sent to each
    of `remotes`, to the UDP port `port`.
    """

    name: str
    bridge: str
    vni: int
    mtu: int
    local: str
    remotes: tuple[str, ...]
    port: int


@frozen
class SetPort:
    """Whether the bridge sends flooded frames into this port, and learns addresses from it.

    No frame passes from one `isolated` port to another.
    """

    name: str
    flood: bool
    learning: bool
    isolated: bool = False


@frozen
class Move:
    """Make `name` a port of `bridge`, whatever bridge it is on now."""

    name: str
    bridge: str


@frozen
class Remove:
    """Remove an interface, and its peer if it is one of a pair."""

    name: str


LinkStep = AddBridge | AddTap | AddLink | AddTunnel | SetPort | Move | Remove


def bridge_name(vne: VNE, network: int, colour: Colour) -> str:
    """The interface name of a network's bridge; networks are counted in the order of the description."""
    given = vne.networks[network].bridge
    return given if given and colour is Colour.RED else f"{_stem(vne, network)}-{colour.value}"


def link_end_name(vne: VNE, network: int, colour: Colour) -> str:
    """The interface name of the end of the one-way link that is a port of the bridge of `colour`."""
    return f"{_stem(vne, network)}-to-{'b' if colour is Colour.RED else 'r'}"


def tunnel_name(vne: VNE, network: int, colour: Colour) -> str:
    """The interface name of the tunnel that is a port of the bridge of `colour`."""
    return f"{_stem(vne, network)}-vx-{colour.value[0]}"


def _stem(vne: VNE, network: int) -> str:
    """What the names of a network's interfaces begin with: unique in the namespace, and of at most ten characters."""
    given = vne.networks[network].bridge
    if len(given) > STEM_LIMIT:
        return f"{given[:4]}{hashlib.sha256(given.encode()).hexdigest()[:6]}"
    return given or f"net{network}"


def tap_name(vm: int, nic: int) -> str:
    """The interface name of a tap; VMs and NICs are counted in the order of the description."""
    return f"tap{vm}-{nic}"


def plan_networks(vne: VNE, active: Colour) -> list[LinkStep]:
    """All bridges, one-way links, tunnels and taps of a VNE at rest on the colour `active`, but for those given.

    Links are closed before there are tunnels: two hosts with links open both ways would be a loop.
    """
    steps: list[LinkStep] = []
    for index in _coloured(vne):
        network = vne.networks[index]
        for colour in Colour:
            if not (network.bridge and colour is Colour.RED):
                alias = f"{vne.name}/{network.name} {colour.value}"
                steps.append(AddBridge(bridge_name(vne, index, colour), network.mtu, alias))
        ends = [link_end_name(vne, index, colour) for colour in Colour]
        bridges = [bridge_name(vne, index, colour) for colour in Colour]
        steps.append(AddLink(ends[0], ends[1], bridges[0], bridges[1], network.mtu))
    steps += _closed(vne, active)
    for index, colour in _tunnels(vne):
        name, bridge = tunnel_name(vne, index, colour), bridge_name(vne, index, colour)
        local, remotes = this_host(vne).tunnel, tuple(host.tunnel for host in peers(vne))
        number, mtu = vni(vne, index, colour), vne.networks[index].mtu
        steps.append(AddTunnel(name, bridge, number, mtu, local, remotes, TUNNEL_PORT))
    steps += _opened(vne, active)
    if not vne.attached:
        for tap, network_index, alias in _taps(vne):
            bridge = bridge_name(vne, network_index, active)
            steps.append(AddTap(tap, bridge, vne.networks[network_index].mtu, alias))
    return steps


def plan_direction(vne: VNE, pre_snapshot: Colour) -> list[LinkStep]:
    """Turn every one-way link so that frames pass from `pre_snapshot` to the other colour only.

    The closed end is closed before the open one is opened: at no moment do frames pass both ways. Isolation changes
    while both ends are closed, when no frame can pass between a link and a tunnel whatever it says. So a host is in
    one of three states: turned as it was, with its bridges apart, or turned as it shall be.

    Hosts turn at different times, and need not agree meanwhile. It is done at rest, all VMs being on `pre_snapshot`
    everywhere: a frame is on that bridge of each host once, by its tunnel, and whatever enters the other bridge over
    a link of a host that has turned finds no tunnel to leave by. No VM is cut before every host has turned.
    Turning to where everything is turned already changes nothing at any moment, also in the middle of a cut.
    """
    return [*_closed(vne, pre_snapshot), *_opened(vne, pre_snapshot)]


def _closed(vne: VNE, pre_snapshot: Colour) -> list[SetPort]:
    """Nothing leaves the post-snapshot bridges over links."""
    far, apart = pre_snapshot.other, bool(_tunnels(vne))
    return [SetPort(link_end_name(vne, index, far), False, learning=False, isolated=apart) for index in _coloured(vne)]


def _opened(vne: VNE, pre_snapshot: Colour) -> list[SetPort]:
    """What leaves the pre-snapshot bridges over links goes no further than to this host's VMs."""
    tunnels = [
        SetPort(tunnel_name(vne, index, colour), flood=True, learning=True, isolated=colour is not pre_snapshot)
        for index, colour in _tunnels(vne)
    ]
    ends = [SetPort(link_end_name(vne, index, pre_snapshot), flood=True, learning=False) for index in _coloured(vne)]
    return tunnels + ends


def plan_moves(vne: VNE, vm: str, to: Colour) -> list[Move]:
    """The taps of one VM, each onto its network's bridge of colour `to`."""
    return [Move(tap, bridge_name(vne, network, to)) for tap, network, alias in _taps(vne) if alias.split("/")[1] == vm]


def plan_return(vne: VNE) -> list[LinkStep]:
    """All taps back onto the given bridges, once every VM is post-snapshot, on all hosts.

    Meanwhile the link is open both ways: there is no category 3 any more, and no frame need be lost. Not so where
    there are tunnels: frames would come twice, over the tunnel and over what joins the given bridges.
    """
    blue_ends = [link_end_name(vne, index, Colour.BLUE) for index in _coloured(vne)]
    opened = [] if _tunnels(vne) else [SetPort(name, flood=True, learning=False) for name in blue_ends]
    moves = [move for vm in vne.vms for move in plan_moves(vne, vm.name, Colour.RED)]
    return [*opened, *moves, *plan_direction(vne, Colour.RED)]


def plan_removal(vne: VNE) -> list[LinkStep]:
    """Leave given bridges as they were: all taps on them, and nothing beside them."""
    moves = [move for vm in vne.vms for move in plan_moves(vne, vm.name, Colour.RED)]
    names = [
        *(tunnel_name(vne, index, colour) for index, colour in _tunnels(vne)),
        *(
            name
            for index in _coloured(vne)
            for name in (link_end_name(vne, index, Colour.RED), bridge_name(vne, index, Colour.BLUE))
        ),
    ]
    return [*moves, *(Remove(name) for name in names)]


def _coloured(vne: VNE) -> list[int]:
    """The networks that have two bridges: all but those of attached VMs without a bridge to put a second one beside."""
    return [index for index, network in enumerate(vne.networks) if network.bridge or not vne.attached]


def _tunnels(vne: VNE) -> list[tuple[int, Colour]]:
    """The networks and colours with tunnels to other hosts. What joins given bridges between hosts is their owner's."""
    return [
        (index, colour)
        for index in _coloured(vne)
        for colour in Colour
        if peers(vne) and not (vne.networks[index].bridge and colour is Colour.RED)
    ]


def _taps(vne: VNE) -> Iterator[tuple[str, int, str]]:
    networks = {vne.networks[index].name: index for index in _coloured(vne)}
    for vm_index, vm in enumerate(vne.vms):
        for nic_index, nic in enumerate(vm.nics):
            if nic.network in networks:
                alias = f"{vne.name}/{vm.name}/{nic_index} on {nic.network}"
                yield nic.tap or tap_name(vm_index, nic_index), networks[nic.network], alias
