"""The colouring plan against a model of two bridges: which frame may reach whom, at every moment of every cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qsnap.model import VM, VNE, Colour, Network, Nic
from qsnap.rules.colouring import (
    AddBridge,
    AddLink,
    AddTap,
    LinkStep,
    Move,
    Remove,
    SetPort,
    plan_direction,
    plan_moves,
    plan_networks,
    plan_removal,
    plan_return,
)

IFNAMSIZ = 16


class Kernel:
    """What the plans make of bridges: who is a port of which, and which end of a veth pair takes flooded frames."""

    def __init__(self) -> None:
        self.master: dict[str, str] = {}
        self.peer: dict[str, str] = {}
        self.floods: dict[str, bool] = {}
        self.learns: dict[str, bool] = {}

    def apply(self, steps: list[LinkStep]) -> None:
        for step in steps:
            match step:
                case AddBridge(name):
                    assert len(name) < IFNAMSIZ
                case AddTap(name, bridge):
                    assert len(name) < IFNAMSIZ
                    self.master[name] = bridge
                case AddLink(red_end, blue_end, red_bridge, blue_bridge):
                    assert max(len(red_end), len(blue_end)) < IFNAMSIZ
                    self.master |= {red_end: red_bridge, blue_end: blue_bridge}
                    self.peer |= {red_end: blue_end, blue_end: red_end}
                case SetPort(name, flood, learning):
                    self.floods[name], self.learns[name] = flood, learning
                case Move(name, bridge):
                    self.master[name] = bridge

    def reached_from(self, tap: str) -> set[str]:
        """The taps that a frame for everybody reaches; loops would show as a frame that comes back."""
        reached, bridges = set(), [self.master[tap]]
        for bridge in bridges:
            for port, master in self.master.items():
                if master != bridge or port == tap:
                    continue
                if port in self.peer:
                    if self.floods[port]:
                        bridges.append(self.master[self.peer[port]])
                        assert len(bridges) <= 2, "a frame goes round"
                else:
                    reached.add(port)
        return reached


@st.composite
def vnes(draw: st.DrawFn) -> VNE:
    networks = [f"n{index}" for index in range(draw(st.integers(1, 3)))]
    nics = st.lists(st.sampled_from(networks), max_size=3)
    vms = tuple(
        VM(f"vm{index}", 1 << 21, nics=tuple(Nic(network, "") for network in draw(nics)))
        for index in range(draw(st.integers(1, 4)))
    )
    return VNE("v", vms, tuple(Network(name) for name in networks))


def at_rest(vne: VNE, active: Colour) -> Kernel:
    kernel = Kernel()
    kernel.apply(plan_networks(vne, active))
    return kernel


def taps_by_network(vne: VNE) -> dict[str, dict[str, str]]:
    """For each network, the VM of each tap on it."""
    return {
        network.name: {
            f"tap{vm_index}-{nic_index}": vm.name
            for vm_index, vm in enumerate(vne.vms)
            for nic_index, nic in enumerate(vm.nics)
            if nic.network == network.name
        }
        for network in vne.networks
    }


@given(vnes(), st.sampled_from(Colour))
def test_at_rest_everybody_on_a_network_hears_everybody_and_nobody_else(vne: VNE, active: Colour) -> None:
    kernel = at_rest(vne, active)
    for taps in taps_by_network(vne).values():
        for tap in taps:
            assert kernel.reached_from(tap) == taps.keys() - {tap}


@given(vnes(), st.sampled_from(Colour), st.data())
def test_in_a_cut_frames_pass_from_before_to_after_and_never_back(
    vne: VNE, active: Colour, data: st.DataObject
) -> None:
    """Categories 1 and 2 are delivered, category 3 is not, in whatever order the VMs are cut."""
    kernel = at_rest(vne, active)
    kernel.apply(plan_direction(vne, active))
    order = data.draw(st.permutations([vm.name for vm in vne.vms]))
    post_snapshot: set[str] = set()
    for vm in order:
        kernel.apply(list(plan_moves(vne, vm, active.other)))
        post_snapshot.add(vm)
        for taps in taps_by_network(vne).values():
            for tap, sender in taps.items():
                heard = {other for other in taps if other != tap}
                if sender in post_snapshot:
                    heard = {other for other in heard if taps[other] in post_snapshot}
                assert kernel.reached_from(tap) == heard


@given(vnes())
def test_the_next_cut_goes_the_other_way(vne: VNE) -> None:
    kernel = at_rest(vne, Colour.RED)
    for vm in vne.vms:
        kernel.apply(list(plan_moves(vne, vm.name, Colour.BLUE)))
    kernel.apply(plan_direction(vne, Colour.BLUE))
    after = at_rest(vne, Colour.BLUE)
    assert (kernel.master, kernel.floods) == (after.master, after.floods)


def test_the_model_finds_a_wrong_direction() -> None:
    """Negative control: with the one-way link turned round, a post-snapshot frame reaches a pre-snapshot VM."""
    vms = tuple(VM(name, 1 << 21, nics=(Nic("n", ""),)) for name in ("a", "b"))
    vne = VNE("v", vms, (Network("n"),))
    kernel = at_rest(vne, Colour.RED)
    kernel.apply(plan_direction(vne, Colour.BLUE))
    kernel.apply(list(plan_moves(vne, "a", Colour.BLUE)))
    assert "tap1-0" in kernel.reached_from("tap0-0")


@given(vnes(), st.sampled_from(Colour))
def test_no_link_learns(vne: VNE, active: Colour) -> None:
    """An address learnt on a link would send a frame into it that is not flooded."""
    assert not any(at_rest(vne, active).learns.values())


def test_taps_of_attached_vms_come_back_to_the_bridge_that_was_given() -> None:
    vms = tuple(VM(f"vm{n}", 0, qmp="q", nics=(Nic("lan", "", tap=f"vnet{n}"),)) for n in (0, 1))
    given_bridge = "bridge-of-a-user"[:15]
    vne = VNE("lab", vms, (Network("lan", bridge=given_bridge), Network("dark")))
    kernel = Kernel()
    at_rest = {"vnet0": given_bridge, "vnet1": given_bridge}
    kernel.master |= at_rest
    kernel.apply(plan_networks(vne, Colour.RED))
    assert kernel.reached_from("vnet0") == {"vnet1"}
    kernel.apply([*plan_moves(vne, "vm0", Colour.BLUE)])
    assert (kernel.reached_from("vnet0"), kernel.reached_from("vnet1")) == (set(), {"vnet0"})
    kernel.apply([*plan_moves(vne, "vm1", Colour.BLUE), *plan_return(vne)])
    assert at_rest.items() <= kernel.master.items()
    added = set(kernel.peer) & set(kernel.master)
    assert {step.name for step in plan_removal(vne) if isinstance(step, Remove)} - added == {
        step.name for step in plan_networks(vne, Colour.RED) if isinstance(step, AddBridge)
    }


def test_without_bridges_nothing_moves() -> None:
    vne = VNE("lab", (VM("vm0", 0, qmp="q", nics=(Nic("lan", "", tap="vnet0"),)),), (Network("lan"),))
    assert plan_networks(vne, Colour.RED) == plan_return(vne) == plan_removal(vne) == []
