"""Colours over several hosts, against a model of bridges, links and tunnels: who gets a frame, and how often."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from attrs import define, evolve, field
from hypothesis import given
from hypothesis import strategies as st

from qsnap.model import VM, VNE, VNI_LIMIT, Colour, Host, Network, Nic
from qsnap.rules.colouring import (
    AddBridge,
    AddLink,
    AddTap,
    AddTunnel,
    LinkStep,
    Move,
    Remove,
    SetPort,
    bridge_name,
    plan_direction,
    plan_moves,
    plan_networks,
    plan_removal,
    plan_return,
    tap_name,
)
from qsnap.rules.tunnels import TUNNEL_PORT, mtu_warning, vni

IFNAMSIZ = 16
COPIES = 100  #: of one frame; more is a loop


@define
class Port:
    """A port of a bridge, which starts as the kernel makes it."""

    bridge: str
    flood: bool = True
    learning: bool = True
    isolated: bool = False
    peer: str = ""
    tunnel: AddTunnel | None = None


@define
class Kernels:
    """What the plans make of the hosts' bridges. `cables` are the user's own, between given bridges of this name."""

    ports: dict[str, dict[str, Port]] = field(factory=dict)
    addresses: dict[str, str] = field(factory=dict)
    cables: str = ""

    def apply(self, host: str, step: LinkStep) -> None:
        ports = self.ports.setdefault(host, {})
        match step:
            case AddTap(name, bridge):
                ports[name] = Port(bridge)
            case AddLink(red_end, blue_end, red_bridge, blue_bridge):
                ports[red_end], ports[blue_end] = Port(red_bridge, peer=blue_end), Port(blue_bridge, peer=red_end)
            case AddTunnel(name, bridge):
                assert len(name) < IFNAMSIZ
                others = [port.tunnel for port in ports.values() if port.tunnel]
                assert all(other.vni != step.vni for other in others)
                ports[name] = Port(bridge, tunnel=step)
                self.addresses[step.local] = host
            case SetPort(name, flood, learning, isolated):
                port = ports[name]
                port.flood, port.learning, port.isolated = flood, learning, isolated
            case Move(name, bridge):
                ports[name] = Port(bridge)
            case Remove(name):
                gone = ports.pop(name, None)
                if gone and gone.peer:
                    del ports[gone.peer]

    def heard_from(self, host: str, tap: str) -> Counter[tuple[str, str]]:
        """How often each (host, tap) gets a frame for everybody."""
        heard: Counter[tuple[str, str]] = Counter()
        frames = deque([(host, tap)])
        for _ in range(COPIES):
            if not frames:
                return heard
            where, ingress = frames.popleft()
            came = self.ports[where][ingress]
            for name, port in self.ports[where].items():
                if name == ingress or port.bridge != came.bridge or not port.flood or (port.isolated and came.isolated):
                    continue
                if port.peer:
                    frames.append((where, port.peer))
                elif port.tunnel:
                    frames += self._far_ends(port.tunnel)
                elif name == "cable":
                    frames += [(other, name) for other in self.ports if other != where and name in self.ports[other]]
                else:
                    heard[where, name] += 1
        raise AssertionError("a frame goes round")

    def _far_ends(self, tunnel: AddTunnel) -> list[tuple[str, str]]:
        hosts = [self.addresses[remote] for remote in tunnel.remotes if remote in self.addresses]
        return [
            (host, name)
            for host in hosts
            for name, port in self.ports[host].items()
            if port.tunnel and (port.tunnel.vni, port.tunnel.port) == (tunnel.vni, tunnel.port)
        ]


def host(index: int) -> Host:
    return Host(f"h{index}", f"10.0.0.{index}", 7907, f"10.0.1.{index}")


@st.composite
def spread(draw: st.DrawFn) -> VNE:
    """VNEs over two to four hosts."""
    hosts = tuple(host(index) for index in range(draw(st.integers(2, 4))))
    networks = [f"n{index}" for index in range(draw(st.integers(1, 2)))]
    nics = st.lists(st.sampled_from(networks), max_size=2)
    vms = tuple(
        VM(
            f"vm{index}",
            1 << 21,
            nics=tuple(Nic(network, "") for network in draw(nics)),
            host=draw(st.sampled_from(hosts)).name,
        )
        for index in range(draw(st.integers(1, 5)))
    )
    return VNE("v", vms, tuple(Network(name) for name in networks), hosts)


@define
class Lab:
    """A VNE on its hosts."""

    vne: VNE
    kernels: Kernels = field(factory=Kernels)

    def up(self, active: Colour) -> Lab:
        for each in self.vne.hosts:
            self.apply(each.name, plan_networks(self.vne.part(each.name), active))
        return self

    def apply(self, host: str, steps: list[LinkStep]) -> None:
        for step in steps:
            self.kernels.apply(host, step)

    def turn(self, pre_snapshot: Colour) -> None:
        for each in self.vne.hosts:
            self.apply(each.name, plan_direction(self.vne.part(each.name), pre_snapshot))

    def move(self, vm: str, to: Colour) -> None:
        host = next(each.host for each in self.vne.vms if each.name == vm)
        self.apply(host, [*plan_moves(self.vne.part(host), vm, to)])

    def taps(self) -> dict[tuple[str, str], tuple[str, str]]:
        """The (VM, network) of each (host, tap)."""
        return {
            (each.name, nic.tap or tap_name(index, nic_index)): (vm.name, nic.network)
            for each in self.vne.hosts
            for index, vm in enumerate(self.vne.part(each.name).vms)
            for nic_index, nic in enumerate(vm.nics)
        }

    def check(self, post_snapshot: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """Everybody on a network hears everybody once, but no pre-snapshot VM hears a post-snapshot one."""
        taps = self.taps()
        for tap, (sender, network) in taps.items():
            audience = {
                other: 1
                for other, (vm, where) in taps.items()
                if where == network and other != tap and (sender not in post_snapshot or vm in post_snapshot)
            }
            assert self.kernels.heard_from(*tap) == Counter(audience)


@given(spread(), st.sampled_from(Colour), st.data())
def test_in_every_cut_each_frame_comes_once_and_none_passes_back(vne: VNE, active: Colour, data: st.DataObject) -> None:
    lab = Lab(vne).up(active)
    lab.check()
    for pre_snapshot in (active, active.other):
        lab.turn(pre_snapshot)
        post_snapshot: set[str] = set()
        for vm in data.draw(st.permutations([vm.name for vm in vne.vms])):
            lab.move(vm, pre_snapshot.other)
            post_snapshot.add(vm)
            lab.check(post_snapshot)


@given(spread(), st.data())
def test_while_hosts_turn_each_at_its_own_pace_nothing_changes_for_anybody(vne: VNE, data: st.DataObject) -> None:
    """All VMs are blue after a cut. Any single step of any host may come next."""
    lab = Lab(vne).up(Colour.RED)
    for vm in vne.vms:
        lab.move(vm.name, Colour.BLUE)
    left = {each.name: plan_direction(vne.part(each.name), Colour.BLUE) for each in vne.hosts}
    while waiting := [name for name, steps in left.items() if steps]:
        host = data.draw(st.sampled_from(waiting))
        lab.kernels.apply(host, left[host].pop(0))
        lab.check()
    assert lab.kernels.ports == Lab(vne).up(Colour.BLUE).kernels.ports


@given(spread(), st.data())
def test_while_hosts_come_up_nothing_goes_round(vne: VNE, data: st.DataObject) -> None:
    lab = Lab(vne)
    left = {each.name: plan_networks(vne.part(each.name), Colour.RED) for each in vne.hosts}
    while waiting := [name for name, steps in left.items() if steps]:
        host = data.draw(st.sampled_from(waiting))
        lab.kernels.apply(host, left[host].pop(0))
        for tap in lab.taps():
            if tap[1] in lab.kernels.ports.get(tap[0], {}):
                assert set(lab.kernels.heard_from(*tap).values()) <= {1}


@given(spread(), st.data())
def test_an_undone_cut_leaves_everything_as_it_was(vne: VNE, data: st.DataObject) -> None:
    lab = Lab(vne).up(Colour.RED)
    for name in data.draw(st.sets(st.sampled_from([vm.name for vm in vne.vms]))):
        lab.move(name, Colour.BLUE)
    lab.turn(Colour.RED)
    for vm in vne.vms:
        lab.move(vm.name, Colour.RED)
    assert lab.kernels.ports == Lab(vne).up(Colour.RED).kernels.ports


def two_hosts(*, isolated: bool = True) -> Lab:
    hosts = (host(0), host(1))
    vms = tuple(VM(f"vm{index}", 1 << 21, nics=(Nic("n", ""),), host=f"h{index}") for index in (0, 1))
    lab = Lab(VNE("v", vms, (Network("n"),), hosts))
    for each in hosts:
        for step in plan_networks(lab.vne.part(each.name), Colour.RED):
            if isinstance(step, SetPort) and not isolated:
                step = evolve(step, isolated=False)
            lab.kernels.apply(each.name, step)
    return lab


def test_the_model_finds_a_frame_that_comes_twice() -> None:
    """Negative control: without isolation it also comes over the link here and the tunnel of the other colour."""
    lab = two_hosts(isolated=False)
    lab.move("vm1", Colour.BLUE)
    assert lab.kernels.heard_from("h0", "tap0-0") == {("h1", "tap0-0"): 2}


def test_the_model_finds_a_loop() -> None:
    """Negative control: links open both ways on two hosts."""
    lab = two_hosts(isolated=False)
    for name in ("h0", "h1"):
        for port in lab.kernels.ports[name].values():
            port.flood = True
    with pytest.raises(AssertionError, match="goes round"):
        lab.kernels.heard_from("h0", "tap0-0")


def test_a_tunnel_for_each_colour() -> None:
    vne = two_hosts().vne.part("h0")
    tunnels = [step for step in plan_networks(vne, Colour.RED) if isinstance(step, AddTunnel)]
    base = vni(vne, 0, Colour.RED)
    assert tunnels == [
        AddTunnel("net0-vx-r", "net0-red", base, 1500, "10.0.1.0", ("10.0.1.1",), TUNNEL_PORT),
        AddTunnel("net0-vx-b", "net0-blue", base + 1, 1500, "10.0.1.0", ("10.0.1.1",), TUNNEL_PORT),
    ]


def test_one_host_needs_no_tunnel() -> None:
    vne = VNE("v", (), (Network("n"),), (host(0),)).part("h0")
    alone = VNE("v", (), (Network("n"),))
    assert plan_networks(vne, Colour.RED) == plan_networks(alone, Colour.RED)


@given(st.text(max_size=20), st.text(max_size=20), st.sampled_from([0, 2, 4000, VNI_LIMIT - 2]))
def test_numbers_of_tunnels_are_pairs_of_24_bits(vne_name: str, network: str, given_vni: int) -> None:
    vne = VNE(vne_name, (), (Network(network, vni=given_vni),))
    red, blue = (vni(vne, 0, colour) for colour in Colour)
    assert red % 2 == 0
    assert 0 < red < blue == red + 1 < VNI_LIMIT
    assert red == given_vni or not given_vni


@pytest.mark.parametrize("user_has_joined_them", [True, False])
def test_attached_vms_have_tunnels_of_the_second_colour_only(user_has_joined_them: bool) -> None:
    """What joins the given bridges is their owner's. After the cut the hosts return at different times."""
    hosts = tuple(host(index) for index in range(2))
    vms = tuple(
        VM(f"vm{n}{m}", 0, qmp="q", nics=(Nic("lan", "", tap=f"vnet{m}"),), host=f"h{n}")
        for n in (0, 1)
        for m in (0, 1)
    )
    lab = Lab(VNE("lab", vms, (Network("lan", bridge="br0"),), hosts))
    for each in hosts:
        given_ports = {"vnet0": Port("br0"), "vnet1": Port("br0")}
        lab.kernels.ports[each.name] = given_ports | ({"cable": Port("br0")} if user_has_joined_them else {})
    before = {name: {**ports} for name, ports in lab.kernels.ports.items()}
    lab.up(Colour.RED)
    if user_has_joined_them:
        lab.check()
        post_snapshot: set[str] = set()
        for vm in lab.vne.vms:
            lab.move(vm.name, Colour.BLUE)
            post_snapshot.add(vm.name)
            lab.check(post_snapshot)
        for each in hosts:
            for step in plan_return(lab.vne.part(each.name)):
                lab.kernels.apply(each.name, step)
                for tap in lab.taps():
                    assert set(lab.kernels.heard_from(*tap).values()) <= {1}
        lab.check()
    for each in hosts:
        lab.apply(each.name, plan_removal(lab.vne.part(each.name)))
    assert lab.kernels.ports == before


def test_what_a_removal_removes() -> None:
    vms = (VM("vm0", 0, qmp="q", nics=(Nic("lan", "", tap="vnet0"),), host="h0"),)
    vne = VNE("lab", vms, (Network("lan", bridge="br0"),), (host(0), host(1))).part("h0")
    made = plan_networks(vne, Colour.RED)
    names = {step.name for step in made if isinstance(step, AddBridge | AddTunnel)}
    removed = {step.name for step in plan_removal(vne) if isinstance(step, Remove)}
    assert names < removed
    assert bridge_name(vne, 0, Colour.RED) not in removed


@pytest.mark.parametrize(
    ("tunnel", "path_mtu", "fits"), [("10.0.1.1", 1500, 1450), ("fd00::1", 1500, 1430), ("10.0.1.1", 1550, 1500)]
)
def test_a_warning_of_packets_that_do_not_fit(tunnel: str, path_mtu: int, fits: int) -> None:
    hosts = (host(0), evolve(host(1), tunnel=tunnel))
    vne = VNE("v", (), (Network("n", mtu=fits), Network("wide", mtu=fits + 1)), hosts).part("h0")
    warning = mtu_warning(vne, {"h1": path_mtu})
    assert f"`mtu = {fits}`" in warning
    assert "wide" in warning
    assert f"MTU of {path_mtu + 1} " in warning
    assert not mtu_warning(evolve(vne, networks=vne.networks[:1]), {"h1": path_mtu})
