"""How a network is built from two bridges, and which links change in a coloured cut.

A network has a red and a blue bridge. At rest every tap is on the active colour. At its cut a VM's taps move to
the other colour, so that bridge carries the frames of post-snapshot VMs only. A veth pair joins the bridges one
way: its end on the post-snapshot bridge neither floods nor learns, so that bridge never sends anything into it.
Hence no frame sent after its sender's cut reaches a receiver before the receiver's cut (category 3), while frames
from before the cut still pass (category 2). Colouring of packets: Lai and Yang, "On distributed snapshots" (1987);
VNsnap, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from qsnap.model import VNE, Colour


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
class SetPort:
    """Whether the bridge sends flooded frames into this port, and learns addresses from it."""

    name: str
    flood: bool
    learning: bool


@frozen
class Move:
    """Make `name` a port of `bridge`, whatever bridge it is on now."""

    name: str
    bridge: str


LinkStep = AddBridge | AddTap | AddLink | SetPort | Move


def bridge_name(network: int, colour: Colour) -> str:
    """The interface name of a network's bridge; networks are counted in the order of the description."""
    return f"net{network}-{colour.value}"


def link_end_name(network: int, colour: Colour) -> str:
    """The interface name of the end of the one-way link that is a port of the bridge of `colour`."""
    return f"net{network}-to-{'b' if colour is Colour.RED else 'r'}"


def tap_name(vm: int, nic: int) -> str:
    """The interface name of a tap; VMs and NICs are counted in the order of the description."""
    return f"tap{vm}-{nic}"


def plan_networks(vne: VNE, active: Colour) -> list[LinkStep]:
    """All bridges, one-way links and taps of a VNE at rest on the colour `active`."""
    steps: list[LinkStep] = []
    for index, network in enumerate(vne.networks):
        for colour in Colour:
            alias = f"{vne.name}/{network.name} {colour.value}"
            steps.append(AddBridge(bridge_name(index, colour), network.mtu, alias))
        ends = [link_end_name(index, colour) for colour in Colour]
        bridges = [bridge_name(index, colour) for colour in Colour]
        steps.append(AddLink(ends[0], ends[1], bridges[0], bridges[1], network.mtu))
    steps += plan_direction(vne, active)
    for tap, network_index, alias in _taps(vne):
        bridge = bridge_name(network_index, active)
        steps.append(AddTap(tap, bridge, vne.networks[network_index].mtu, alias))
    return steps


def plan_direction(vne: VNE, pre_snapshot: Colour) -> list[LinkStep]:
    """Turn every one-way link so that frames pass from `pre_snapshot` to the other colour only.

    The closed end is closed before the open one is opened: at no moment do frames pass both ways.
    """
    closed: list[LinkStep] = []
    opened: list[LinkStep] = []
    for index in range(len(vne.networks)):
        closed.append(SetPort(link_end_name(index, pre_snapshot.other), flood=False, learning=False))
        opened.append(SetPort(link_end_name(index, pre_snapshot), flood=True, learning=False))
    return closed + opened


def plan_moves(vne: VNE, vm: str, to: Colour) -> list[Move]:
    """The taps of one VM, each onto its network's bridge of colour `to`."""
    return [Move(tap, bridge_name(network, to)) for tap, network, alias in _taps(vne) if alias.split("/")[1] == vm]


def _taps(vne: VNE) -> Iterator[tuple[str, int, str]]:
    networks = {network.name: index for index, network in enumerate(vne.networks)}
    for vm_index, vm in enumerate(vne.vms):
        for nic_index, nic in enumerate(vm.nics):
            alias = f"{vne.name}/{vm.name}/{nic_index} on {nic.network}"
            yield tap_name(vm_index, nic_index), networks[nic.network], alias
