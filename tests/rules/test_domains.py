"""A libvirt domain as a VM to attach to."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsnap.errors import AttachRefusedError
from qsnap.model import VM, Network, Nic
from qsnap.rules.domains import describe_domains

XML = (Path(__file__).resolve().parents[1] / "data/libvirt-9.0-domain.xml").read_text()


def test_a_running_domain() -> None:
    vne = describe_domains("lab", [XML])
    nics = (Nic("br0", "", tap="vnet0"), Nic("virbr0", "", tap="vnet1"))
    assert vne.vms == (VM("alice", 0, qemu="", nics=nics, qmp="/srv/alice.qmp"),)
    assert vne.networks == (Network("br0"), Network("virbr0"))


def test_a_domain_without_a_second_socket_is_told_how_to_get_one() -> None:
    with pytest.raises(AttachRefusedError) as caught:
        describe_domains("lab", [XML.replace("'-qmp'", "'-name'")])
    assert caught.value.where == "domain alice"
    assert "<qemu:arg value='unix:/run/alice.qmp,server=on,wait=off'/>" in caught.value.advice


def test_a_name_that_no_vm_can_have() -> None:
    with pytest.raises(AttachRefusedError, match="Alice"):
        describe_domains("lab", [XML.replace("alice<", "Alice<")])
