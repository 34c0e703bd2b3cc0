"""Which engine is taken, for which reason, and what a refusal tells."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from attrs import evolve

from qsnap.errors import EngineRefusedError
from qsnap.model import Accelerator, Engine
from qsnap.rules.engine import Decision, Facts, Version, can_hold, choose_engine, is_crowded, must_read_to_end

PLAIN = Facts(
    vm="web",
    qemu_version=(11, 1, 3),
    accelerator=Accelerator.TCG,
    hugetlb=False,
    running=True,
    background_refusal="",
    precopy_refusal="",
)
MEMORY = "Background-snapshot is not compatible with guest memory configuration"


@pytest.mark.parametrize(
    ("changes", "engine"),
    [
        ({}, Engine.PRECOPY),
        ({"hugetlb": True}, Engine.BACKGROUND),
        ({"holds": True}, Engine.PRECOPY),
        ({"hugetlb": True, "holds": True}, Engine.BACKGROUND),
        ({"hugetlb": True, "holds": True, "several": True}, Engine.PRECOPY),
        ({"hugetlb": True, "several": True}, Engine.BACKGROUND),
        ({"hugetlb": True, "holds": True, "several": True, "crowded": True}, Engine.BACKGROUND),
        ({"holds": True, "several": True, "crowded": True}, Engine.PRECOPY),
        ({"hugetlb": True, "holds": True, "several": True, "precopy_refusal": "VFIO"}, Engine.BACKGROUND),
        ({"hugetlb": True, "holds": True, "several": True, "ram_blocks": 2}, Engine.BACKGROUND),
        ({"waits": True, "holds": True}, Engine.PRECOPY),
        ({"waits": True}, Engine.BACKGROUND),
        ({"waits": True, "background_refusal": MEMORY}, Engine.PRECOPY),
        ({"hugetlb": True, "background_refusal": MEMORY}, Engine.PRECOPY),
        ({"qemu_version": (7, 2, 22)}, Engine.BACKGROUND),
        ({"qemu_version": (7, 2, 22), "accelerator": Accelerator.KVM}, Engine.PRECOPY),
        ({"ram_blocks": 2}, Engine.BACKGROUND),
        ({"ram_blocks": 2, "running": False, "background_refusal": MEMORY}, Engine.PRECOPY),
        ({"ram_blocks": 2, "accelerator": Accelerator.KVM}, Engine.PRECOPY),
        ({"precopy_refusal": "VFIO"}, Engine.BACKGROUND),
        ({"running": False}, Engine.BACKGROUND),
        ({"running": False, "qemu_version": (7, 2, 22)}, Engine.PRECOPY),
        ({"running": False, "background_refusal": MEMORY}, Engine.PRECOPY),
    ],
)
def test_auto(changes: dict[str, Any], engine: Engine) -> None:
    decision = choose_engine(Engine.AUTO, evolve(PLAIN, **changes))
    assert decision.engine is engine
    assert decision.reason


@pytest.mark.parametrize(("vms", "processors", "crowded"), [(1, 1, False), (2, 1, False), (3, 1, True), (8, 2, True)])
def test_how_many_vms_are_a_crowd(vms: int, processors: int, crowded: bool) -> None:
    assert is_crowded(vms, processors) is crowded


@pytest.mark.parametrize(
    ("version", "machine", "told", "holds"),
    [
        ((7, 2, 22), "pc-i440fx-7.2", True, False),
        ((8, 0, 5), "pc-i440fx-8.0", False, False),
        ((8, 1, 5), "pc-i440fx-8.1", False, False),
        ((8, 2, 0), "pc-i440fx-8.2", False, True),
        ((10, 0, 2), "microvm", False, True),
        ((11, 1, 3), "pc-q35-11.1", False, False),
        ((11, 1, 3), "pc-q35-11.1", True, True),
        ((11, 1, 3), "pc-i440fx-9.2", False, True),
        ((11, 1, 3), "microvm", False, False),
        ((12, 0, 0), "virt-11.0", False, True),
    ],
)
def test_which_qemu_can_be_held(version: Version, machine: str, told: bool, holds: bool) -> None:
    assert can_hold(version, machine, told=told) is holds


def decide(wish: Engine, facts: Facts) -> Decision | EngineRefusedError:
    try:
        return choose_engine(wish, facts)
    except EngineRefusedError as refusal:
        return refusal


def test_every_combination_is_decided_or_refused_with_a_way_out() -> None:
    combinations = itertools.product(
        Engine, [(7, 2, 22), (11, 1, 3)], Accelerator, [True, False], [True, False], ["", MEMORY], ["", "VFIO"]
    )
    for wish, version, accelerator, hugetlb, running, background, precopy in combinations:
        facts = Facts("web", version, accelerator, hugetlb, running, background, precopy)
        decision = decide(wish, facts)
        if isinstance(decision, EngineRefusedError):
            assert decision.advice
            assert "web" in decision.where
            others = {Engine.BACKGROUND, Engine.PRECOPY} - {wish}
            named = {engine for engine in others if f"Or take {engine.value}." in decision.advice}
            assert named == {engine for engine in others if isinstance(decide(engine, facts), Decision)}
            continue
        assert decision.engine is wish or wish is Engine.AUTO
        assert decision.engine in (Engine.BACKGROUND, Engine.PRECOPY) or wish is Engine.RECORD
        refused = background if decision.engine is Engine.BACKGROUND else precopy
        assert not refused, "an engine was taken that QEMU refuses"


@pytest.mark.parametrize("engine", [Engine.PRECOPY, Engine.RECORD])
def test_precopy_under_old_tcg_is_refused_by_name(engine: Engine) -> None:
    with pytest.raises(EngineRefusedError, match=r"TCG loses writes before QEMU 9\.0, and this is 8\.2\.1"):
        choose_engine(engine, evolve(PLAIN, qemu_version=(8, 2, 1)))


def test_precopy_of_memory_in_pieces_is_refused_under_tcg() -> None:
    with pytest.raises(EngineRefusedError, match="loses writes to memory in several pieces, and this VM's is in 3"):
        choose_engine(Engine.PRECOPY, evolve(PLAIN, ram_blocks=3))


def test_a_refusal_is_qemus_own_reason() -> None:
    with pytest.raises(EngineRefusedError, match=MEMORY) as caught:
        choose_engine(Engine.BACKGROUND, evolve(PLAIN, background_refusal=MEMORY))
    assert "restore with --ram eager" in caught.value.advice


def test_streams_that_must_be_read_to_their_end() -> None:
    assert must_read_to_end((8, 0, 5))
    assert not must_read_to_end((8, 1, 0))


def test_before_qemu_10_a_copy_of_a_disk_needs_background() -> None:
    copying = evolve(PLAIN, accelerator=Accelerator.KVM, qemu_version=(9, 2, 0), copies_disks=True)
    assert choose_engine(Engine.AUTO, copying).engine is Engine.BACKGROUND
    with pytest.raises(EngineRefusedError, match=r"copies of disks before QEMU 10\.0"):
        choose_engine(Engine.PRECOPY, copying)
    assert choose_engine(Engine.PRECOPY, evolve(copying, qemu_version=(10, 0, 0))).engine is Engine.PRECOPY
