"""What a VNE made by a program is told: each fault by its name."""

from __future__ import annotations

import pytest
from attrs import evolve

from qsnap.errors import ConfigError, StateError
from qsnap.model import VM, VNE, Network, Nic
from qsnap.rules.checks import check_vne

LAN = Network("lan")


def vm(name: str, *nics: Nic) -> VM:
    return VM(name=name, memory_bytes=1 << 27, nics=nics)


GOOD = VNE(
    "lab",
    (vm("a", Nic("lan", "52:54:00:00:00:01", "e1000")), vm("b", Nic("lan", "52:54:00:00:00:02", "e1000"))),
    (LAN,),
)


def test_a_good_one() -> None:
    check_vne(GOOD)


def test_attached_cards_have_no_address_yet() -> None:
    check_vne(evolve(GOOD, vms=tuple(vm(name, Nic("lan", "", "")) for name in "ab")))


FAULTS = {
    "vm: a VNE needs at least one VM": evolve(GOOD, vms=()),
    "VM a is there 2 times": evolve(GOOD, vms=(GOOD.vms[0], vm("a"))),
    "network lan is there 2 times": evolve(GOOD, networks=(LAN, LAN)),
    "vm.a.nics[0]: unknown network 'lan'": evolve(GOOD, networks=()),
    "MAC 52:54:00:00:00:0a is there 2 times": evolve(
        GOOD, vms=(vm("a", Nic("lan", "52:54:00:00:00:0A", "")), vm("b", Nic("lan", "52:54:00:00:00:0a", "")))
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault(fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_vne(FAULTS[fault])
    assert caught.value.message == fault
    assert caught.value.where == "VNE lab"


def test_names_that_lead_elsewhere() -> None:
    for bad in (evolve(GOOD, name="../lab"), evolve(GOOD, vms=(vm("a/b"),)), evolve(GOOD, networks=(Network("A"),))):
        with pytest.raises(StateError, match="is not a name"):
            check_vne(bad)
