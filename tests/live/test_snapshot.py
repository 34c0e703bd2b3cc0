"""A live network is saved under traffic, killed, restored, and proven to be what it was at the cut."""

from __future__ import annotations

import math
import os
import signal
from functools import partial
from typing import Any

import pytest
import trio

import qsnap
from qsnap import Backing, Cut, Engine
from qsnap.host import capture, condition, daemon, saving
from qsnap.host.capture import Bounds, Capture, Precopy
from qsnap.host.clock import steady_s
from qsnap.host.qmp import open_qmp
from tests.live.lab import (
    QEMU_7,
    QEMU_10,
    QEMU_11,
    check_continues,
    judge,
    make_vne,
    open_consoles,
    statuses,
    wait_ready,
)

KINDS = {
    "7.2-background-colour-anonymous": (QEMU_7, "pc", Engine.BACKGROUND, Cut.COLOUR, Backing.ANONYMOUS),
    "7.2-background-barrier-hugetlb-q35": (QEMU_7, "q35", Engine.BACKGROUND, Cut.BARRIER, Backing.HUGETLB),
    "10.0-background-colour-hugetlb": (QEMU_10, "pc", Engine.BACKGROUND, Cut.COLOUR, Backing.HUGETLB),
    "10.0-precopy-barrier-anonymous-q35": (QEMU_10, "q35", Engine.PRECOPY, Cut.BARRIER, Backing.ANONYMOUS),
    "11.1-background-barrier-memfd": (QEMU_11, "pc", Engine.BACKGROUND, Cut.BARRIER, Backing.MEMFD),
    "11.1-precopy-colour-anonymous-q35": (QEMU_11, "q35", Engine.PRECOPY, Cut.COLOUR, Backing.ANONYMOUS),
    "11.1-precopy-barrier-hugetlb": (QEMU_11, "pc", Engine.PRECOPY, Cut.BARRIER, Backing.HUGETLB),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_first_light(
    kind: tuple[str, str, Engine, Cut, Backing], place: qsnap.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "HALT_S", math.inf)  # a busy machine may take longer
    qemu, machine, engine, cut, backing = kind
    vne = make_vne("light", qemu=qemu, machine=machine, backing=backing, extra=("-device", "VGA"))
    started = await qsnap.up(vne, place=place)
    async with open_consoles("light", place) as consoles:
        await wait_ready(consoles)
        saved = await qsnap.snapshot("light", "cut", engine=engine, cut=cut, place=place)
        await trio.sleep(1)
        for status in (await qsnap.status("light", place=place)).vms:
            assert status.state == "running"
    for vm in started.vms:
        os.kill(vm.pid, signal.SIGKILL)
    check_measurements(saved, engine)

    verdict = judge(saved, place)
    assert verdict.orphans == 0
    assert verdict.wrong_stamps == 0

    await qsnap.restore("light", "cut", place=place)
    async with open_consoles("light", place) as consoles:
        await check_continues(consoles, verdict.states)


def check_measurements(saved: qsnap.Snapshot, engine: Engine) -> None:
    for vm in saved.vms:
        taken = vm.measurements
        assert vm.engine is engine
        assert 0 < taken.downtime_ms < taken.total_ms
        assert taken.resume_instant_s - taken.stop_instant_s == pytest.approx(taken.downtime_ms / 1e3)
        assert taken.iterations >= 1
        assert 0 < taken.image_to_memory < 1.1 or engine is Engine.RECORD
    stops = [vm.measurements.stop_instant_s for vm in saved.vms]
    assert saved.discrepancy_ms == pytest.approx((max(stops) - min(stops)) * 1e3)
    if engine is Engine.BACKGROUND:  # all are halted before the state of any is taken
        assert max(stops) <= min(vm.measurements.start_instant_s for vm in saved.vms)


LONG_S = 5.0


async def test_a_vm_that_waits_for_others_is_followed(place: qsnap.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes until all are ready is saved by then, but for the last: it runs on, and its pause is short."""
    settle = saving.Saving._settle_disks

    async def dawdle(self: saving.Saving) -> None:
        await trio.sleep(LONG_S)
        await settle(self)

    monkeypatch.setattr(saving.Saving, "_settle_disks", dawdle)
    await qsnap.up(make_vne("slow", vms=1, memory=192 << 20, guest={"rate_mb": 20, "dirty_mb": 96}), place=place)
    async with open_consoles("slow", place, 1) as consoles:
        await wait_ready(consoles)
        saved = await qsnap.snapshot("slow", "cut", engine=Engine.PRECOPY, place=place)
        taken = saved.vms[0].measurements
        assert taken.stop_instant_s > taken.start_instant_s + LONG_S
        written = 20 * LONG_S * 2**20 / 4096
        assert taken.last_iteration_pages < written / 4
        assert judge(saved, place).wrong_stamps == 0


@pytest.mark.parametrize("engine", [Engine.BACKGROUND, Engine.PRECOPY])
async def test_a_vm_that_somebody_pauses_meanwhile(
    engine: Engine, place: qsnap.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is saved as it is then, and runs again as it did; nobody waits for it to stop."""
    cut = saving.Saving.cut

    async def pause_and_cut(self: saving.Saving, at_s: float) -> None:
        async with open_qmp(place.runtime().monitor_path("paused", "vm1"), vm="vm1") as qmp:
            await qmp.execute("stop")
        await trio.sleep(0.5)
        await cut(self, at_s)

    monkeypatch.setattr(saving.Saving, "cut", pause_and_cut)
    await qsnap.up(make_vne("paused", vms=2), place=place)
    async with open_consoles("paused", place, 2) as consoles:
        await wait_ready(consoles)
        saved = await qsnap.snapshot("paused", "cut", engine=engine, place=place)
        paused, other = (vm.measurements.downtime_ms for vm in saved.vms)
        assert paused > 500 > other
        verdict = judge(saved, place)
        assert (verdict.orphans, verdict.wrong_stamps) == (0, 0)
        await check_continues(consoles, verdict.states)


@pytest.mark.parametrize("kind", [Cut.COLOUR, Cut.BARRIER])
async def test_a_cut_waits_for_its_time(kind: Cut, place: qsnap.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "cut" if kind is Cut.COLOUR else "stop"
    cut, times = getattr(saving.Saving, name), []

    async def cut_later(self: saving.Saving, at_s: float) -> None:
        times.append(steady_s() + 0.5)
        await cut(self, times[-1])

    monkeypatch.setattr(saving.Saving, name, cut_later)
    await qsnap.up(make_vne("later", vms=1), place=place)
    async with open_consoles("later", place, 1) as consoles:
        await wait_ready(consoles)
        saved = await qsnap.snapshot("later", "cut", cut=kind, place=place)
    assert saved.vms[0].measurements.stop_instant_s > times[0] - 0.01


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes CAP_SYS_NICE")
async def test_priority_ends_when_all_are_stopped(place: qsnap.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where hosts share processors, QEMU processes that are still to stop would wait for the rest of others' cuts."""
    policies: dict[str, set[int]] = {"halt": set(), "stop": set()}

    def watch(owner: type, name: str, what: str) -> None:
        function = getattr(owner, name)

        async def watched(*arguments: Any) -> None:
            policies[what].add(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)
            await function(*arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(Capture, "halt", "halt")
    watch(saving.Saving, "_stop", "stop")
    await qsnap.up(make_vne("prompt", vms=2), place=place)
    async with open_consoles("prompt", place, 2) as consoles:
        await wait_ready(consoles)
        await qsnap.snapshot("prompt", "cut", place=place)
    assert policies == {"halt": {os.SCHED_RR}, "stop": {os.SCHED_OTHER}}


@pytest.mark.parametrize(
    ("wish", "engine", "reason"),
    [(Engine.AUTO, Engine.BACKGROUND, "did not converge"), (Engine.PRECOPY, Engine.PRECOPY, "and was ended")],
)
async def test_a_held_vm_that_is_said_to_diverge(
    wish: Engine, engine: Engine, reason: str, place: qsnap.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held until it is given up, or cut all the same."""
    settled = daemon.Daemon.wait_settled

    async def wait_settled(self: daemon.Daemon) -> bool:
        await settled(self)
        return False

    monkeypatch.setattr(daemon.Daemon, "wait_settled", wait_settled)
    await qsnap.up(make_vne("fast", vms=2, qemu=QEMU_11), place=place)
    async with open_consoles("fast", place, 2) as consoles:
        await wait_ready(consoles)
        saved = await qsnap.snapshot("fast", "cut", engine=wish, place=place)
        assert [vm.engine for vm in saved.vms] == [engine] * 2
        assert all(reason in vm.reason for vm in saved.vms)
        verdict = judge(saved, place)
        assert (verdict.orphans, verdict.wrong_stamps) == (0, 0)
        await check_continues(consoles, verdict.states)


@pytest.mark.parametrize("held", [True, False], ids=["held", "on its own"])
@pytest.mark.parametrize("engine", [Engine.AUTO, Engine.PRECOPY])
async def test_a_guest_that_outruns_precopy(
    engine: Engine, held: bool, place: qsnap.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is saved all the same: by background where auto may choose, by force where precopy was asked for."""
    if held:
        monkeypatch.setattr(daemon, "PATIENCE", 0.1)
    else:
        hasty = partial(Precopy, bounds=Bounds(passes_at_first_limit=0, last_limit_ms=0, passes=1))
        monkeypatch.setattr(saving, "Precopy", hasty)
        monkeypatch.setattr(condition, "can_hold", lambda *_, **__: False)
        monkeypatch.setattr(capture, "DOWNTIME_LIMIT_MS", 0)
    vne = make_vne(
        "fast", vms=1, memory=192 << 20, backing=qsnap.Backing.ANONYMOUS, guest={"rate_mb": 1000, "dirty_mb": 48}
    )
    await qsnap.up(vne, place=place)
    async with open_consoles("fast", place, 1) as consoles:
        await wait_ready(consoles)
        saved = await qsnap.snapshot("fast", "cut", engine=engine, place=place)
        assert saved.vms[0].engine is (Engine.BACKGROUND if engine is Engine.AUTO else Engine.PRECOPY)
        assert "converge" in saved.vms[0].reason
        assert judge(saved, place).wrong_stamps == 0
        (after,) = await statuses(consoles)
        assert after.stamp_errors == 0
        assert after.ticks > judge(saved, place).states[0].ticks
