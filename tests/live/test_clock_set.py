"""The host's clock is set again and again, forward and back, while VMs are started, saved and restored."""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path
from struct import pack

import pytest
import trio

import qsnap
from qsnap import Cut, Engine
from tests.live.lab import ROOT, check_continues, judge, make_vne, open_consoles, wait_ready

SOURCE = Path(__file__).with_name("set_clock.c")
EACH_S = 0.03
DAY_S = 86400
OFFSETS_S = (0, DAY_S, -DAY_S, 3 * 3600, -30)
LONG_S = 200.0
SAVED = {"first": (Engine.BACKGROUND, Cut.COLOUR), "second": (Engine.BACKGROUND, Cut.BARRIER)}


async def save_and_restore(place: qsnap.Place) -> None:
    """All that is done while the clock is set; printed is by how many days it was, at most."""
    offsets = []

    async def watch() -> None:
        while True:
            offsets.append(time.time() - time.monotonic())
            await trio.sleep(EACH_S / 3)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await qsnap.up(make_vne("lab", vms=2), place=place)
        async with open_consoles("lab", place, 2) as consoles:
            await wait_ready(consoles)
        for name, (engine, cut) in SAVED.items():
            await qsnap.snapshot("lab", name, engine=engine, cut=cut, place=place)
        await qsnap.down("lab", place=place)
        await qsnap.restore("lab", "second", place=place)
        nursery.cancel_scope.cancel()
    print((max(offsets) - min(offsets)) / DAY_S)


@asynccontextmanager
async def clock_that_is_set(directory: Path) -> AsyncIterator[dict[str, str]]:
    """The environment of processes that have such a clock: QEMU inherits it, as all would have the host's."""
    library = directory / "set_clock.so"
    await trio.run_process(["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE)])
    file = directory / "offset"
    file.write_bytes(pack("q", 0))

    async def keep_setting() -> None:
        for offset_s in cycle(OFFSETS_S):
            memory[:] = pack("q", offset_s)
            await trio.sleep(EACH_S)

    with file.open("r+b") as opened:
        memory = mmap.mmap(opened.fileno(), 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_setting)
        yield {"LD_PRELOAD": str(library), "SET_CLOCK": str(file)}
        nursery.cancel_scope.cancel()


async def test_clock_is_set(place: qsnap.Place, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.live.test_clock_set", str(place.run), str(place.store)]
    async with clock_that_is_set(tmp_path) as clock:
        with trio.fail_after(LONG_S):
            done = await trio.run_process(
                command, cwd=ROOT, env={**os.environ, **clock}, capture_stdout=True, capture_stderr=True, check=False
            )
        assert done.returncode == 0, done.stderr.decode()
        assert float(done.stdout) > 1.9, "the clock was not set"
        assert [vm.state for vm in (await qsnap.status("lab", place=place)).vms] == ["running"] * 2
        for saved in await qsnap.snapshots("lab", place=place):
            await qsnap.verify("lab", saved.name, place=place)
            for measured in (vm.measurements for vm in saved.vms):
                assert 0 < measured.downtime_ms <= measured.total_ms < LONG_S * 1e3
                assert measured.downtime_ms == pytest.approx(
                    (measured.resume_instant_s - measured.stop_instant_s) * 1e3, abs=1
                )
            assert 0 <= saved.discrepancy_ms < LONG_S * 1e3
        verdict = judge(await qsnap.show("lab", "second", place=place), place)  # the clock tells no order of them
        assert (verdict.orphans, verdict.wrong_stamps) == (0, 0)
        async with open_consoles("lab", place, 2) as consoles:
            await check_continues(consoles, verdict.states)
    await qsnap.down("lab", place=place)


if __name__ == "__main__":
    trio.run(save_and_restore, qsnap.Place(*sys.argv[1:]))
