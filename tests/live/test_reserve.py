"""A store in memory: what a snapshot will need of that is taken before its cut."""

from __future__ import annotations

from typing import Any

import pytest

import qsnap
from qsnap import Backing, Engine
from qsnap.host import daemon, keeping
from tests.live.lab import check_continues, judge, make_vne, open_consoles, wait_ready
from tests.live.test_host_faults import tmpfs

MEMORY_BYTES = 96 << 20


@pytest.fixture
def reserves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each receiver is told to take in advance."""
    told: list[int] = []
    open_daemon = daemon.open_daemon

    def note(*arguments: Any, reserve_bytes: int, **options: Any) -> Any:
        told.append(reserve_bytes)
        return open_daemon(*arguments, reserve_bytes=reserve_bytes, **options)

    monkeypatch.setattr(keeping, "open_daemon", note)
    return told


@pytest.mark.parametrize(
    ("backing", "engine"), [(Backing.HUGETLB, Engine.BACKGROUND), (Backing.ANONYMOUS, Engine.PRECOPY)]
)
async def test_a_store_in_memory(backing: Backing, engine: Engine, place: qsnap.Place, reserves: list[int]) -> None:
    with tmpfs(place.store):
        await qsnap.up(make_vne("lab", vms=1, memory=MEMORY_BYTES, backing=backing), place=place)
        async with open_consoles("lab", place, 1) as consoles:
            await wait_ready(consoles)
            first = await qsnap.snapshot("lab", "first", engine=engine, place=place)
            saved = await qsnap.snapshot("lab", "second", engine=engine, place=place)
        guessed, known = reserves
        assert 10 << 20 < guessed <= MEMORY_BYTES
        image_bytes = first.vms[0].measurements.image_bytes
        assert image_bytes / 2 < known < min(2 * image_bytes, MEMORY_BYTES)
        verdict = judge(saved, place)
        assert verdict.wrong_stamps == 0
        await qsnap.down("lab", place=place)
        await qsnap.restore("lab", "second", place=place)
        async with open_consoles("lab", place, 1) as consoles:
            await check_continues(consoles, verdict.states)
        await qsnap.down("lab", place=place)


async def test_a_store_on_a_disk_needs_none(place: qsnap.Place, reserves: list[int]) -> None:
    await qsnap.up(make_vne("lab", vms=1, memory=MEMORY_BYTES), place=place)
    async with open_consoles("lab", place, 1) as consoles:
        await wait_ready(consoles)
        await qsnap.snapshot("lab", "cut", place=place)
    assert reserves == [0]


async def test_a_recorded_stream_needs_none(place: qsnap.Place, reserves: list[int]) -> None:
    with tmpfs(place.store):
        await qsnap.up(make_vne("lab", vms=1, memory=MEMORY_BYTES), place=place)
        async with open_consoles("lab", place, 1) as consoles:
            await wait_ready(consoles)
            await qsnap.snapshot("lab", "cut", engine=Engine.RECORD, place=place)
        await qsnap.down("lab", place=place)
    assert reserves == [0]
