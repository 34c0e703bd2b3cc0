"""Restores on other hosts: what goes where, from whom, and what of it is there."""

from __future__ import annotations

import pytest
from attrs import evolve

from qsnap.errors import ProtocolError, StateError
from qsnap.model import VNE, DiskImage, Host, Network, Snapshot, VMSnapshot
from qsnap.rules.moving import base_path, check_paths, known_layers, plan_move, with_layers, with_vms
from tests.samples import snapshot, stored

TABLE = tuple(Host(name, f"{name}.example", 7907, name) for name in ("alpha", "beta", "gamma"))


def vm_on(name: str, host: str) -> VMSnapshot:
    saved = snapshot().vms[0]
    return evolve(saved, vm=evolve(saved.vm, name=name, host=host))


def part(host: str, *vms: VMSnapshot) -> Snapshot:
    """What a host has of a snapshot of these VMs."""
    vne = VNE("lab", tuple(vm.vm for vm in vms), (Network("lan", vni=8),), TABLE, host)
    return evolve(snapshot(), vne=vne, vms=vms, operation="1f")


A, B, C = vm_on("a", "alpha"), vm_on("b", "alpha"), vm_on("c", "beta")
PARTS = {"alpha": part("alpha", A, B), "beta": part("beta", C)}
WHOLE = VNE("lab", (A.vm, B.vm, C.vm), (Network("lan", mtu=9000, vni=4000),), TABLE)


def homes(vne: VNE) -> dict[str, str]:
    return {vm.name: vm.host for vm in vne.vms}


def test_without_a_placement_all_stay() -> None:
    move = plan_move(WHOLE, PARTS, {})
    assert (homes(move.vne), move.sources) == ({"a": "alpha", "b": "alpha", "c": "beta"}, {})


def test_a_host_fetches_what_it_lacks_from_who_has_it() -> None:
    move = plan_move(WHOLE, PARTS, {"a": "gamma", "c": "gamma", "b": "beta"})
    assert homes(move.vne) == {"a": "gamma", "b": "beta", "c": "gamma"}
    assert move.sources == {"gamma": {"a": ("alpha",), "c": ("beta",)}, "beta": {"b": ("alpha",)}}


def test_what_was_fetched_before_is_not_fetched_again() -> None:
    parts = {**PARTS, "gamma": part("gamma", vm_on("a", "gamma"))}
    assert plan_move(WHOLE, parts, {"a": "gamma", "b": "gamma"}).sources == {"gamma": {"b": ("alpha",)}}


def kept(vm: VMSnapshot) -> VMSnapshot:
    return evolve(vm, kept_on="gamma")


KEPT = {"alpha": part("alpha", kept(A), kept(B)), "beta": part("beta", C), "gamma": part("gamma", kept(A), kept(B))}


@pytest.mark.parametrize(
    ("home", "sources"), [("alpha", ("gamma",)), ("gamma", ("alpha",)), ("beta", ("gamma", "alpha"))]
)
def test_state_and_disks_come_from_who_has_them(home: str, sources: tuple[str, ...]) -> None:
    assert plan_move(WHOLE, KEPT, {"a": home}).sources[home]["a"] == sources


def test_what_is_whole_somewhere_comes_from_there() -> None:
    parts = {**KEPT, "alpha": part("alpha", A, kept(B))}
    move = plan_move(WHOLE, parts, {"a": "beta"})
    assert move.sources == {"beta": {"a": ("alpha",)}, "alpha": {"b": ("gamma",)}}


def test_a_state_that_no_host_has() -> None:
    with pytest.raises(StateError, match=r"no host has the RAM of VM a\n  .* kept on gamma"):
        plan_move(WHOLE, {name: KEPT[name] for name in ("alpha", "beta")}, {})


def test_the_description_says_where_a_vm_is_saved_from_now_on() -> None:
    whole = evolve(WHOLE, vms=tuple(evolve(vm, saved_on="beta") for vm in WHOLE.vms))
    assert [vm.keeper for vm in plan_move(whole, PARTS, {}).vne.vms] == ["beta", "beta", ""]


def test_a_vm_that_is_only_kept_is_not_moved() -> None:
    grown = with_vms(KEPT["gamma"], (kept(A), C), plan_move(WHOLE, KEPT, {"c": "gamma"}).vne.part("gamma"))
    assert homes(grown.vne) == {"a": "alpha", "c": "gamma"}


def test_the_description_may_have_moved_vms_and_numbers_but_nothing_else() -> None:
    moved = evolve(WHOLE, vms=tuple(evolve(vm, host="gamma", vcpus=8) for vm in WHOLE.vms))
    vne = plan_move(moved, PARTS, {"c": "beta"}).vne
    assert homes(vne) == {"a": "gamma", "b": "gamma", "c": "beta"}
    assert {vm.vcpus for vm in vne.vms} == {1}
    assert vne.networks == (Network("lan", vni=4000),)
    assert (vne.hosts, vne.here) == (TABLE, "")


def test_a_vm_that_the_description_lacks_stays() -> None:
    assert homes(plan_move(evolve(WHOLE, vms=(C.vm,)), PARTS, {}).vne) == homes(WHOLE)


@pytest.mark.parametrize(
    ("whole", "placement", "reason"),
    [
        (WHOLE, {"d": "beta"}, "no VM d on any host\n  It has: a, b, c"),
        (evolve(WHOLE, vms=(*WHOLE.vms, vm_on("d", "beta").vm)), {}, "no VM d on any host"),
        (WHOLE, {"a": "delta"}, "there is no host delta for VM a"),
        (evolve(WHOLE, vms=(C.vm,), hosts=TABLE[1:]), {}, "there is no host alpha for VM a"),
    ],
)
def test_what_does_not_exist(whole: VNE, placement: dict[str, str], reason: str) -> None:
    with pytest.raises(StateError, match=reason):
        plan_move(whole, PARTS, placement)


def test_a_part_gains_vms() -> None:
    grown = with_vms(PARTS["beta"], (C, A), plan_move(WHOLE, PARTS, {"a": "beta"}).vne.part("beta"))
    assert homes(grown.vne) == {"c": "beta", "a": "beta"}
    assert [vm.vm for vm in grown.vms] == list(grown.vne.vms)
    assert (grown.vne.here, grown.operation, grown.created_s) == ("beta", "1f", PARTS["beta"].created_s)


@pytest.mark.parametrize(
    "path", ["snapshots/s1/bob/pc.ram.ram", "snapshots/s1/manifest.json", "disks/x", "/etc/passwd"]
)
def test_state_is_put_nowhere_else(path: str) -> None:
    vm = snapshot().vms[0]
    check_paths("s1", vm)
    with pytest.raises(ProtocolError, match=r"is not in snapshots/s1/alice"):
        check_paths("s1", evolve(vm, device_stream=stored(path)))


@pytest.mark.parametrize("path", ["snapshots/s1/alice/x", "disks/../x", "disks/a/b", "x"])
def test_layers_are_put_nowhere_else(path: str) -> None:
    with pytest.raises(ProtocolError, match="is not in disks"):
        check_paths("s1", with_layers(snapshot().vms[0], {"disks/alice-0.qcow2": stored(path)}))


def test_a_layer_that_is_here_brings_what_it_lies_on() -> None:
    (disk,) = snapshot().vms[0].disks
    top, old, base = stored("disks/t", b"t"), stored("disks/o", b"o"), stored(base_path("ab" * 32, "raw"))
    assert base.path == "disks/base-abababababab.raw"
    chain: DiskImage = evolve(disk, layers=(top, old, base), format="raw", base=None)
    known = known_layers([chain])
    assert {path: image.layers for path, image in known.items()} == {
        "disks/t": (top, old, base),
        "disks/o": (old, base),
        base.path: (base,),
    }
    assert {(image.format, image.base) for image in known.values()} == {("raw", None)}
