"""Putting the parts of a VNE and of its snapshots together."""

from __future__ import annotations

import pytest
from attrs import evolve

from qsnap.errors import ConnectionLostError, IntegrityError, NotUpError
from qsnap.model import VM, VNE, Accelerator, Colour, Host, Snapshot, VMStatus, VNEStatus
from qsnap.rules.parts import (
    NOT_UP,
    UNREACHABLE,
    hosts_in_use,
    in_order,
    where_known,
    whole_snapshot,
    whole_snapshots,
    whole_status,
    whole_vms,
    with_missing,
)
from tests.samples import snapshot

HOSTS = tuple(Host(name, "10.0.0.1", 7907, f"10.0.0.{number}") for number, name in enumerate(("a", "b", "c"), start=1))
SAVED = snapshot()
NAMES = [vm.vm.name for vm in SAVED.vms]


def parts(saved: Snapshot = SAVED, operation: str = "1") -> list[Snapshot]:
    """The snapshot as if its first VM had been on host b, and the others on c."""
    vms = tuple(evolve(vm, vm=evolve(vm.vm, host="c" if index else "b")) for index, vm in enumerate(saved.vms))
    vne = evolve(saved.vne, vms=tuple(vm.vm for vm in vms), hosts=HOSTS)
    whole = evolve(saved, vne=vne, vms=vms, operation=operation)
    return [evolve(whole, vne=vne.part(host), vms=tuple(vm for vm in vms if vm.vm.host == host)) for host in ("b", "c")]


def test_hosts_without_vms_have_no_part() -> None:
    vne = VNE("lab", (VM("x", 1, host="c"), VM("y", 1, host="b")), hosts=HOSTS)
    assert [host.name for host in hosts_in_use(vne)] == ["b", "c"]


def test_parts_are_the_whole() -> None:
    whole = whole_snapshot(parts())
    assert [vm.vm.name for vm in whole.vms] == NAMES
    assert [vm.name for vm in whole.vne.vms] == NAMES
    assert whole.vne.here == ""


def test_a_snapshot_of_one_host_is_what_it_is() -> None:
    assert whole_snapshot([SAVED]) is SAVED


def test_a_vm_that_two_hosts_have_is_there_once() -> None:
    b, c = parts()
    copy = evolve(b.vms[0], vm=evolve(b.vms[0].vm, host="c"))
    moved = evolve(c, vms=(*c.vms, copy), vne=evolve(c.vne, vms=(*c.vne.vms, copy.vm)))
    whole = whole_snapshot([b, moved])
    assert sorted(vm.vm.name for vm in whole.vms) == sorted(NAMES)
    assert [vm.vm for vm in whole.vms] == list(whole.vne.vms)
    assert whole.vms[0] == b.vms[0]


def kept_parts() -> list[Snapshot]:
    """The same with the state of all VMs on host a, which has stored it otherwise since (`convert`)."""
    b, c = (evolve(part, vms=tuple(evolve(vm, kept_on="a") for vm in part.vms)) for part in parts())
    vms = tuple(evolve(vm, ram=vm.ram * 2, disks=()) for vm in (*b.vms, *c.vms))
    return [evolve(b, vms=vms, vne=evolve(b.vne, here="a", vms=tuple(vm.vm for vm in vms))), b, c]


def test_the_halves_of_a_vm_are_joined() -> None:
    a, b, c = kept_parts()
    for order in ([a, b, c], [c, b, a]):
        whole = whole_snapshot(order)
        assert {vm.vm.name: (vm.ram, vm.disks) for vm in whole.vms} == {
            vm.vm.name: (vm.ram * 2, vm.disks) for vm in SAVED.vms
        }
    assert whole_vms([a, b, c]) == set(NAMES)
    assert whole_vms([a, c]) == set(NAMES[1:])
    assert whole_vms([b, c]) == set()


def test_who_has_all_of_a_vm_is_believed_first() -> None:
    a, b, c = kept_parts()
    fetched = evolve(b, vms=(evolve(b.vms[0], kept_on=""),))
    assert whole_snapshot([a, fetched, c]).vms[0] == fetched.vms[0]
    assert whole_vms([fetched]) == {NAMES[0]}


def test_hosts_that_only_keep_take_part() -> None:
    vne = VNE("lab", (VM("x", 1, host="c", saved_on="a"), VM("y", 1, host="b", saved_on="b")), hosts=HOSTS)
    assert [host.name for host in hosts_in_use(vne)] == ["a", "b", "c"]


def test_parts_of_different_snapshots_are_none() -> None:
    b, c = parts()
    with pytest.raises(IntegrityError, match="different snapshots"):
        whole_snapshot([b, evolve(c, operation="2")])


def test_snapshots_by_time() -> None:
    old, new = parts(), parts(evolve(SAVED, name="later", created_s=SAVED.created_s + 1), "2")
    found = whole_snapshots([new[1], old[0], new[0], old[1]])
    assert [(each.name, len(each.vms)) for each in found] == [(SAVED.name, len(NAMES)), ("later", len(NAMES))]


def status(host: str, *vms: str, note: str = "") -> VNEStatus:
    found = tuple(VMStatus(vm, "running", 1, Accelerator.TCG, (9, 0, 0), "pc", 1, False, host) for vm in vms)
    return VNEStatus("lab", f"qsnap-lab-{host}", Colour.RED, "/store", found, (note,) if note else ())


def test_a_state_of_several_hosts() -> None:
    whole = whole_status([status("b", "x", note="slow"), status("c", "y", note="slow")])
    assert [(vm.name, vm.host) for vm in whole.vms] == [("x", "b"), ("y", "c")]
    assert (whole.netns, whole.store, whole.notes) == ("", "", ("slow",))


def test_vms_are_in_the_order_of_the_description() -> None:
    vne = VNE("lab", (VM("x", 1, host="b"), VM("y", 1, host="c"), VM("z", 1, host="b")), hosts=HOSTS)
    found = in_order(vne, whole_status([status("b", "x", "z"), status("c", "y")]))
    assert [vm.name for vm in found.vms] == ["x", "y", "z"]


def test_vms_of_a_host_that_does_not_answer() -> None:
    vne = VNE("lab", (VM("x", 1, host="b"), VM("y", 1, host="c")), hosts=HOSTS)
    found = with_missing(vne, {"b": status("b", "x")}, {"c": ConnectionLostError("nothing listens", where="host c")})
    assert {vm.name: (vm.state, vm.host) for vm in found.vms} == {"x": ("running", "b"), "y": (UNREACHABLE, "c")}
    assert found.notes == ("host c: nothing listens",)


def test_vms_of_a_host_that_has_none() -> None:
    """They are not up there; or they are elsewhere than was thought."""
    vne = VNE("lab", (VM("x", 1, host="b"), VM("y", 1, host="c")), hosts=HOSTS)
    missing = {"c": NotUpError("VNE lab is not up", where="host c")}
    found = with_missing(vne, {"b": status("b", "x")}, missing)
    assert {vm.name: (vm.state, vm.host) for vm in found.vms} == {"x": ("running", "b"), "y": (NOT_UP, "c")}
    assert found.notes == ()
    found = with_missing(vne, {"a": status("a", "y"), "b": status("b", "x")}, missing)
    assert {vm.name: (vm.state, vm.host) for vm in found.vms} == {"x": ("running", "b"), "y": ("running", "a")}


def test_vms_are_where_they_are_known_to_be() -> None:
    described = VNE("lab", tuple(VM(name, 1, host="b") for name in ("x", "y", "z", "new")), hosts=HOSTS)
    known = (VM("x", 1, host="c", saved_on="a"), VM("y", 1, host="gone"), VM("z", 1, host="a"))
    at_home = where_known(described, evolve(described, vms=known))
    assert [(vm.name, vm.host, vm.saved_on) for vm in at_home.vms] == [
        ("x", "c", "a"),
        ("y", "b", ""),  # that host is described no more
        ("z", "a", ""),
        ("new", "b", ""),
    ]
