"""QEMU before 8.1 leaves a guest's memory write-protected when its background snapshot breaks off, and the guest stands
still. `release_memory` lets it go on."""

from __future__ import annotations

import os

import pytest
import trio

import qsnap
from qsnap.host.migration import BACKGROUND_CAPABILITIES, FD_NAME, set_capabilities
from qsnap.host.qemu import Process
from qsnap.host.qmp import open_loop, open_qmp
from qsnap.host.rescue import keep_releasing, release_memory
from testbed.guests import GuestConsole
from tests.live.lab import QEMU_7, judge, make_vne, open_consoles, wait_ready

STANDSTILL_S = 3.0
DEADLINE_S = 60.0
NOBODY = 65534


async def break_off(place: qsnap.Place) -> None:
    """Start a background snapshot and take away its reader, as if qsnap and its receiver had been killed."""
    async with open_loop(), open_qmp(place.runtime().qmp_path("frozen", "vm1"), vm="vm1") as qmp:
        await set_capabilities(qmp, BACKGROUND_CAPABILITIES)
        stream_in, stream_out = os.pipe()
        await qmp.send_fd(FD_NAME, stream_out)
        os.close(stream_out)
        await qmp.execute("migrate", {"uri": f"fd:{FD_NAME}"})
        while len(os.read(stream_in, 1 << 16)) < 1 << 16:  # the first pages: the guest runs by now
            pass
        os.close(stream_in)


async def stands_still(console: GuestConsole) -> bool:
    with trio.move_on_after(STANDSTILL_S):
        await console.status()
        return False
    return True


async def wait_standstill(console: GuestConsole) -> None:
    with trio.fail_after(DEADLINE_S):
        while not await stands_still(console):
            pass


async def wait_progress(console: GuestConsole) -> None:
    with trio.fail_after(DEADLINE_S):
        before = after = await console.status()
        while not (after.ticks > before.ticks and after.touched > before.touched):
            after = await console.status()


async def check_forbidden(process: Process) -> None:
    os.seteuid(NOBODY)
    try:
        with pytest.raises(qsnap.HostError, match="cannot lift the write protection"):
            await release_memory(process)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("backing", [qsnap.Backing.ANONYMOUS, qsnap.Backing.HUGETLB])
async def test_frozen_guest_is_set_free(backing: qsnap.Backing, place: qsnap.Place) -> None:
    await qsnap.up(make_vne("frozen", vms=1, qemu=QEMU_7, backing=backing), place=place)
    process = place.runtime().load("frozen").vms[0].process
    async with open_consoles("frozen", place, 1) as (console,):
        await wait_ready([console])
        assert await release_memory(process) == 0, "a healthy VM has nothing to release"
        for _ in range(2):  # the userfaultfd of the first stays open in QEMU
            await break_off(place)
            await wait_standstill(console)
            await check_forbidden(process)
            assert await stands_still(console)
            assert await release_memory(process) > 0
            await wait_progress(console)
            assert await release_memory(process) == 0
    saved = await qsnap.snapshot("frozen", "after", engine=qsnap.Engine.BACKGROUND, place=place)
    assert judge(saved, place).wrong_stamps == 0


async def test_guest_that_is_about_to_freeze(place: qsnap.Place) -> None:
    """Whoever puts things right may come before QEMU has protected anything."""
    await qsnap.up(make_vne("frozen", vms=1, qemu=QEMU_7), place=place)
    process = place.runtime().load("frozen").vms[0].process
    async with open_consoles("frozen", place, 1) as (console,), trio.open_nursery() as nursery:
        await wait_ready([console])
        nursery.start_soon(keep_releasing, process)
        await break_off(place)
        await wait_progress(console)
        await trio.sleep(STANDSTILL_S)
        await wait_progress(console)
        nursery.cancel_scope.cancel()
