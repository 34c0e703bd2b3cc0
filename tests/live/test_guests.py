"""The kinds of guests that users bring: each is saved by every engine, killed, restored, and lives on from the cut."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

import qsnap
from qsnap import Backing, Engine
from tests.live.lab import QEMU_7, check_continues, judge, make_vne, open_consoles, wait_ready

MIB = 1 << 20
NODES = {"memory": 192 * MIB, "numa": (96 * MIB, 96 * MIB)}
TWO_DIMMS = {
    "dimms": (128 * MIB, 128 * MIB),
    "guest": {"dirty_mb": 160},
    "boot": "memhp_default_state=online",
}

KINDS: dict[str, dict[str, Any]] = {
    "memfd-7.2": {"qemu": QEMU_7, "backing": Backing.MEMFD},
    "tmpfs": {"backing": Backing.TMPFS},
    "tmpfs-7.2": {"qemu": QEMU_7, "backing": Backing.TMPFS},
    "numa-hugetlb-7.2": {"qemu": QEMU_7, **NODES, "backing": Backing.HUGETLB, "guest": {"dirty_mb": 80}},
    "dimms-7.2": {"qemu": QEMU_7, **TWO_DIMMS},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_saved_by_each_engine_and_restored(kind: dict[str, Any], place: qsnap.Place) -> None:
    vne = make_vne("kind", vms=2, **kind)
    engines = [Engine.BACKGROUND] if vne.vms[0].qemu == QEMU_7 else [Engine.BACKGROUND, Engine.PRECOPY]
    await qsnap.up(vne, place=place)
    async with open_consoles("kind", place, 2) as consoles:
        await wait_ready(consoles)
    for engine in engines:
        saved = await qsnap.snapshot("kind", engine.value, engine=engine, place=place)
        verdict = judge(saved, place)
        assert verdict.wrong_stamps == 0
        for vm in saved.vms:
            assert sum(block.used_length for block in vm.ram) == vm.vm.ram_bytes
        for status in (await qsnap.status("kind", place=place)).vms:
            os.kill(status.pid, signal.SIGKILL)
        await qsnap.restore("kind", engine.value, place=place)
        async with open_consoles("kind", place, 2) as consoles:
            await check_continues(consoles, verdict.states)
