"""The consistency oracle: what a guest has received in a snapshot, its sender has sent in that snapshot."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import trio

import qsnap
from qsnap import Cut, Engine
from qsnap.host import saving
from qsnap.host.capture import Background
from tests.live.lab import judge, open_consoles, statuses

SNAPSHOTS = 16
LATE_S = 2.0


@pytest.mark.parametrize("cut", [Cut.COLOUR, Cut.BARRIER])
async def test_no_orphan_in_many_snapshots_under_load(cut: Cut, eleven: qsnap.Place) -> None:
    await qsnap.restore("eleven", "booted", place=eleven)
    engines = itertools.cycle([Engine.BACKGROUND, Engine.PRECOPY])
    sent_before = 0
    for number, engine in zip(range(SNAPSHOTS), engines, strict=False):
        saved = await qsnap.snapshot("eleven", f"n{number}", engine=engine, cut=cut, place=eleven)
        verdict = judge(saved, eleven)
        assert (verdict.orphans, verdict.wrong_stamps) == (0, 0), f"snapshot {number}, {engine}"
        sent = sum(sum(state.sent) for state in verdict.states)
        assert sent > sent_before, "there was no load"
        sent_before = sent
        await qsnap.remove("eleven", f"n{number}", place=eleven)
    async with open_consoles("eleven", eleven) as consoles:
        for state in await statuses(consoles):
            assert sum(state.duplicates) == 0
            assert state.stream_errors == 0


def make_late(monkeypatch: pytest.MonkeyPatch, vm: str) -> None:
    """Let one VM reach its cut long after the others."""
    halt, stop = Background.halt, Background.stop

    async def not_yet(self: Background, nursery: trio.Nursery) -> None:
        if self.qmp.vm == vm:
            await trio.sleep_forever()
        await halt(self, nursery)

    async def late(self: Background, nursery: trio.Nursery) -> None:
        if self.qmp.vm == vm:
            await trio.sleep(LATE_S)
        await stop(self, nursery)

    monkeypatch.setattr(Background, "halt", not_yet)
    monkeypatch.setattr(Background, "stop", late)


async def save_with_late_vm(monkeypatch: pytest.MonkeyPatch, place: qsnap.Place) -> int:
    await qsnap.restore("eleven", "booted", place=place)
    make_late(monkeypatch, "vm2")
    saved = await qsnap.snapshot("eleven", "late", engine=Engine.BACKGROUND, cut=Cut.COLOUR, place=place)
    assert saved.discrepancy_ms > LATE_S * 1e3 / 2
    assert all(vm.measurements.downtime_ms < LATE_S * 1e3 / 2 for vm in saved.vms), "others had to wait for it"
    return judge(saved, place).orphans


async def test_colouring_makes_a_late_vm_consistent(monkeypatch: pytest.MonkeyPatch, eleven: qsnap.Place) -> None:
    assert await save_with_late_vm(monkeypatch, eleven) == 0


async def test_without_colouring_the_oracle_finds_orphans(monkeypatch: pytest.MonkeyPatch, eleven: qsnap.Place) -> None:
    """Negative control: the same late VM with all taps left on one bridge."""

    def no_moves(*arguments: Any) -> list[Any]:
        return []

    monkeypatch.setattr(saving, "plan_moves", no_moves)
    assert await save_with_late_vm(monkeypatch, eleven) > 0
