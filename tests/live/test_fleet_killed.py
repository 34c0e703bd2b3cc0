"""A fleet whose agents, or whose coordinator, are killed before each step of an operation: one outcome on all hosts.

The guests are boot sectors, as small as they can be. What is killed is started again; nobody else does anything.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from signal import SIGKILL

import pytest
import trio

import qsnap
from testbed.fleet import INITIATOR, CommandError, Fleet, open_fleet
from testbed.hosts import hosts_in_namespaces
from tests.live.fleet_killing import arm, disarm
from tests.live.fleet_state import check_logs, check_snapshots, check_up, take_down, wait_settled
from tests.live.lab import QEMU_11
from tests.live.tiny import make_boot_disk, make_tiny_vne

DECIDER, OTHER = "alpha", "beta"
VICTIMS = [DECIDER, OTHER, INITIATOR]
MOST_STEPS = 80
COMMAND_S = 60.0


def killing(root: Path, what: str) -> tuple[str, ...]:
    """What Python runs in place of qsnap."""
    return ("-m", "tests.live.fleet_killing", str(root / "steps"), what)


@asynccontextmanager
async def fleet_with(victim: str, root: Path, steps: str = "messages") -> AsyncIterator[tuple[Fleet, qsnap.VNE]]:
    """Two hosts and an initiator, of which one can be killed at such a step; and a VNE of a VM on each host."""
    async with hosts_in_namespaces([DECIDER, OTHER, INITIATOR]) as hosts, open_fleet(root, hosts) as fleet:
        if victim != INITIATOR:
            fleet.program = killing(root, steps)
            await fleet.kill(victim)
            await fleet.start(victim)
        vne = fleet.spread(make_tiny_vne("lab", make_boot_disk(root / "disk.img"), vms=2))
        try:
            yield fleet, vne
        finally:
            with trio.CancelScope(shield=True):
                await take_down(fleet, "lab")
        check_logs(fleet)


async def kill_at_each_step(fleet: Fleet, victim: str, check: Callable[[], Awaitable[bool]], *words: str) -> None:
    """Kill the victim before the first step of a command, the second ... until it has no more.

    `check` looks at what there is after each, when all has come to rest, and says whether it was committed.
    """
    outcomes = []
    for fatal in range(1, MOST_STEPS):
        began = time.monotonic()
        arm(fleet.root / "steps", fatal)
        with trio.fail_after(COMMAND_S):
            failed = await run(fleet, victim, *words)
        steps = disarm(fleet.root / "steps")
        took = time.monotonic() - began
        await wait_settled(fleet)
        outcomes.append(await check())
        what = f"before {steps[fatal - 1]}" if len(steps) >= fatal else "not killed"
        said = "committed" if outcomes[-1] else "undone"
        print(f"{fatal:3} {what:60} {took:5.1f} {time.monotonic() - began:5.1f} s {said} {failed}", flush=True)
        if len(steps) < fatal:
            assert fatal > 7, f"these are no steps: {steps}"
            assert set(outcomes) == {True, False}
            return
    pytest.fail(f"more than {MOST_STEPS} steps")


async def run(fleet: Fleet, victim: str, *words: str) -> str:
    """Run a command while the victim may be killed, which then is started again; what it failed with."""
    failed = ""
    async with trio.open_nursery() as nursery:
        if victim != INITIATOR:
            nursery.start_soon(revive, fleet, victim)
        try:
            if victim == INITIATOR:
                await fleet.run(*words, program=killing(fleet.root, "messages"))
            else:
                await fleet.run(*words)
        except CommandError as error:
            failed = str(error)
            assert "defect" not in failed
            assert "Traceback" not in failed
        nursery.cancel_scope.cancel()
    if victim != INITIATOR and fleet.agents[victim].poll() is not None:
        await revive(fleet, victim)
    return failed


async def revive(fleet: Fleet, victim: str) -> None:
    """Start an agent again as soon as it has died."""
    while fleet.agents[victim].poll() is None:
        await trio.sleep(0.02)
    with trio.CancelScope(shield=True):
        assert fleet.agents[victim].returncode == -SIGKILL
        await fleet.kill(victim)
        await fleet.start(victim)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("cut", ["colour", "barrier"])
async def test_snapshot(victim: str, cut: str, memory_path: Path) -> None:
    async with fleet_with(victim, memory_path, "all" if cut == "colour" else "messages") as (fleet, vne):

        async def check() -> bool:
            assert await check_up(fleet, "lab")
            names = await check_snapshots(fleet, "lab")
            if names:
                await fleet.call(qsnap.remove, "lab", "new")
            await check_further(fleet)
            return bool(names)

        await fleet.call(qsnap.up, vne)
        await kill_at_each_step(fleet, victim, check, "snapshot", "lab", "new", "--cut", cut)


async def check_further(fleet: Fleet) -> None:
    """The next snapshot is as if nothing had been."""
    await fleet.call(qsnap.snapshot, "lab", "further")
    await fleet.call(qsnap.verify, "lab", "further")
    await fleet.call(qsnap.remove, "lab", "further")


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("operation", ["up", "restore"])
async def test_start(victim: str, operation: str, memory_path: Path) -> None:
    async with fleet_with(victim, memory_path) as (fleet, vne):

        async def check() -> bool:
            up = await check_up(fleet, "lab")
            if up:
                await check_further(fleet)
                await fleet.call(qsnap.down, "lab")
            assert await check_snapshots(fleet, "lab") == saved
            return up

        await fleet.call(qsnap.up, vne)
        await fleet.call(qsnap.snapshot, "lab", "saved")
        await fleet.call(qsnap.down, "lab")
        saved = {"saved"}
        words = [write_description(fleet)] if operation == "up" else ["lab", "saved"]
        await kill_at_each_step(fleet, victim, check, operation, *words)


def write_description(fleet: Fleet) -> str:
    """The file that describes the VNE of these tests."""
    vms = "".join(f'[vm.vm{number}]\nhost = "{host}"\n' for number, host in enumerate(fleet.hosts, start=1))
    hosts = "".join(f'{host.name} = "{host.address}"\n' for host in fleet.hosts.values())
    file = fleet.root / "lab.toml"
    file.write_text(
        f"""name = "lab"
        [network.lan]
        [hosts]
        {hosts}
        [defaults]
        memory = "16M"
        qemu = "{QEMU_11}"
        disks = [{{ file = "{fleet.root}/disk.img", format = "raw" }}]
        network = "lan"
        accelerator = "tcg"
        {vms}
        """
    )
    return str(file)


@pytest.mark.parametrize("operation", ["snapshot", "up"])
async def test_the_host_that_decides_comes_back_late(
    operation: str, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has committed, and nobody has heard of it: the others wait until it is back, and do nothing before."""
    monkeypatch.setattr("qsnap.fleet.remote.INQUIRY_S", 2.0)
    async with fleet_with(DECIDER, memory_path) as (fleet, vne):
        if operation == "snapshot":
            await fleet.call(qsnap.up, vne)
        arm(fleet.root / "steps", "send Committed")
        call = partial(qsnap.snapshot, "lab", "new") if operation == "snapshot" else partial(qsnap.up, vne)
        with pytest.raises(qsnap.InDoubtError, match="host alpha: the connection was lost while it committed"):
            await fleet.call(call)
        disarm(fleet.root / "steps")
        with pytest.raises(qsnap.QsnapError):
            await fleet.call(qsnap.snapshot, "lab", "another")
        with trio.fail_after(COMMAND_S):
            while "nothing listens" not in fleet.log(OTHER):
                await trio.sleep(0.05)
        await revive(fleet, DECIDER)
        await wait_settled(fleet)
        assert await check_up(fleet, "lab")
        assert await check_snapshots(fleet, "lab") == ({"new"} if operation == "snapshot" else set())
        await check_further(fleet)
