"""The demonstration: three VMs saved while they talk, killed, and brought back; see scripts/demo."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import trio
from attrs import define, field

import qsnap
from qsnap.model import VMSnapshot, version_text
from testbed.guests import GuestConsole, GuestConsoleError
from testbed.proofs import (
    Cut,
    DisprovedError,
    Proof,
    prove_all,
    read_cut,
    require,
)
from testbed.screen import Screen
from testbed.state import GuestState
from testbed.tasks import together

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTION = ROOT / "scenarios/demo/vne.toml"
STORE = ROOT / "build/demo-store"
NAMESPACES = Path("/run/netns")
SNAPSHOT = "under-traffic"
TRAFFIC_S = 3.0  #: before the snapshot, so that there is something to lose
RUN_ON_S = 2.0  #: between the snapshot and the kill, and again after the restore
READY_S = 120.0
DEADLINE_S = 60.0


@define
class Demo:
    """The run of the demonstration."""

    vne: qsnap.VNE
    place: qsnap.Place
    screen: Screen = field(factory=Screen)

    async def run(self, keep: bool) -> None:
        """All of it, in the order in which it is shown. With `keep` the VNE and the snapshot are left."""
        await self.check_not_up()
        shutil.rmtree(self.place.store, ignore_errors=True)
        try:
            await self.show_all()
        except BaseException:
            await self.clear()
            raise
        if not keep:
            with self.screen.step("Taking everything down") as done:
                await self.clear()
                done.append("Taken down; nothing is left")

    async def show_all(self) -> None:
        """From the start of the VMs to the proofs."""
        await self.start()
        saved = await self.save()
        killed = await self.run_on_and_kill()
        restored = await self.restore()
        end = await self.finish()
        cuts = await self.examine(saved)
        self.conclude(cuts, killed, restored, end)

    async def check_not_up(self) -> None:
        """A VNE of this name may be someone's: leave it alone."""
        if await self.is_up():
            advice = f".venv/bin/qsnap down {self.vne.name}"
            raise qsnap.StateError(f"a VNE {self.vne.name} is up already; take it down first", advice=advice)

    async def is_up(self) -> bool:
        """Whether the VNE is up, its VMs alive or not."""
        return any(status.name == self.vne.name for status in await qsnap.statuses(place=self.place))

    async def clear(self) -> None:
        """Take away the VNE and the snapshot."""
        with trio.CancelScope(shield=True):
            if await self.is_up():
                await qsnap.down(self.vne.name, place=self.place)
            shutil.rmtree(self.place.store, ignore_errors=True)
        left = [
            path for path in (self.place.run / self.vne.name, NAMESPACES / f"qsnap-{self.vne.name}") if path.exists()
        ]
        require(not left, f"left behind: {left}")

    async def start(self) -> None:
        """Three running guests, talking to each other."""
        with self.screen.step("Starting three VMs") as done:
            status = await qsnap.up(self.vne, place=self.place)
            done.append(describe(status))
        with self.screen.step("Booting the guests") as done:
            async with self.consoles() as consoles:
                await together(partial(console.wait_ready, trio.current_time() + READY_S) for console in consoles)
            await trio.sleep(TRAFFIC_S)
            done.append("Guests are talking: UDP all to all, TCP in a ring, 20 MB/s of memory rewritten in each")

    async def save(self) -> qsnap.Snapshot:
        """The snapshot, under traffic."""
        with self.screen.step("Saving them while they run") as done:
            saved = await qsnap.snapshot(self.vne.name, SNAPSHOT, place=self.place)
            done.append("Saved, live, without a word to the guests")
        header = ("VM", "downtime", "stored", "engine")
        self.screen.table(header, [describe_capture(vm) for vm in saved.vms])
        self.screen.say(f"    Discrepancy: first to last VM stopped within {saved.discrepancy_ms:.1f} ms.", "dim")
        return saved

    async def run_on_and_kill(self) -> list[GuestState]:
        """Let the VMs go on past the cut, then end them the hard way. Returns how far they had come."""
        with self.screen.step("Letting them run on") as done:
            await trio.sleep(RUN_ON_S)
            killed = await self.statuses()
            done.append("They ran on past the snapshot")
        pids = [vm.pid for vm in (await qsnap.status(self.vne.name, place=self.place)).vms]
        with self.screen.step("Killing them") as done:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            await self.wait_dead()
            done.append(f"Dead: kill -9 {' '.join(map(str, pids))}")
        return killed

    async def wait_dead(self) -> None:
        """Return once no VM lives."""
        with trio.fail_after(DEADLINE_S):
            while any(vm.state != "dead" for vm in (await qsnap.status(self.vne.name, place=self.place)).vms):
                await trio.sleep(0.02)

    async def restore(self) -> list[GuestState]:
        """The VNE as it was saved. Returns what the guests say right after."""
        with self.screen.step("Restoring") as done:
            report = await qsnap.restore(self.vne.name, SNAPSHOT, place=self.place)
            restored = await self.statuses()
            ways = ", ".join(sorted(set(report.ram.values())))
            done.append(f"Restored in {report.ready_ms:.0f} ms: all three run (RAM {ways})")
        return restored

    async def finish(self) -> list[GuestState]:
        """Let the restored guests work on, then have them end their streams and compare."""
        with self.screen.step("Letting the restored guests talk on") as done:
            await trio.sleep(RUN_ON_S)
            with trio.fail_after(DEADLINE_S):
                async with self.consoles() as consoles:
                    end = await together(console.finish for console in consoles)
            done.append("The restored guests talked on, ended their TCP streams and compared checksums")
        return end

    async def examine(self, saved: qsnap.Snapshot) -> list[Cut]:
        """Read the stored files: all digests, then what the RAM images say."""
        with self.screen.step("Reading what was stored") as done:
            await qsnap.verify(self.vne.name, SNAPSHOT, place=self.place)
            directory = self.place.store / self.vne.name
            cuts = [await trio.to_thread.run_sync(read_cut, vm, directory) for vm in saved.vms]
            done.append("What was stored read again: digests right, memory examined page by page")
        return cuts

    def conclude(
        self, cuts: list[Cut], killed: list[GuestState], restored: list[GuestState], end: list[GuestState]
    ) -> None:
        """Judge, and show what was proved."""
        self.screen.say()
        self.screen.say("Proved", "bold")
        for proof in prove_all(cuts, killed, restored, end):
            self.show(proof)

    def show(self, proof: Proof) -> None:
        """A claim, and the evidence below it."""
        self.screen.mark(proof.claim)
        for line in proof.evidence:
            self.screen.say(f"   {line}", "dim")

    async def statuses(self) -> list[GuestState]:
        """What the guests say of themselves now."""
        with trio.fail_after(DEADLINE_S):
            async with self.consoles() as consoles:
                return await together(console.status for console in consoles)

    @asynccontextmanager
    async def consoles(self) -> AsyncIterator[list[GuestConsole]]:
        """The guests' serial consoles."""
        async with AsyncExitStack() as stack:
            paths = [qsnap.console_path(self.vne.name, vm.name, place=self.place) for vm in self.vne.vms]
            yield [await stack.enter_async_context(GuestConsole(path)) for path in paths]


def describe(status: qsnap.VNEStatus) -> str:
    """What was started, and on what."""
    vm = status.vms[0]
    kvm = vm.accelerator is qsnap.Accelerator.KVM
    how = f"QEMU {version_text(vm.qemu_version)}, {'KVM' if kvm else 'TCG (emulation: no KVM here)'}"
    return f"{len(status.vms)} VMs of {vm.memory_bytes >> 20} MiB on one network: {how}"


def describe_capture(vm: VMSnapshot) -> tuple[str, ...]:
    """A row of the table of a snapshot."""
    figures = vm.measurements
    return (
        vm.vm.name,
        f"{figures.downtime_ms:.1f} ms",
        f"{figures.image_bytes >> 20} MiB",
        vm.engine.value,
    )


async def run_until_signal(demo: Demo, keep: bool) -> bool:
    """Run the demonstration; Ctrl-C and the like end it in good order. Whether it came to its end."""
    complete = False
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_at_signal() -> None:
                async for _ in signals:
                    demo.screen.say(" Interrupted: taking it down", "yellow")
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop_at_signal)
            await demo.run(keep)
            complete = True
            nursery.cancel_scope.cancel()
    return complete


def say_next(screen: Screen, keep: bool) -> None:
    """Where to go from here."""
    again = ("qsnap up scenarios/demo/vne.toml", "qsnap snapshot demo s1", "qsnap down demo", "qsnap restore demo s1")
    kept = (
        f"qsnap show demo {SNAPSHOT} --store {STORE.relative_to(ROOT)}",
        "qsnap console demo alice",
        "qsnap down demo",
    )
    screen.say()
    screen.say("Next: look at what was kept" if keep else "Next: the same by hand", "bold")
    for command in ("export PATH=$PWD/.venv/bin:$PATH", *(kept if keep else again)):
        screen.say(f"   {command}", "cyan")
    screen.say("README.md tells of descriptions, commands and the library; scenarios/demo/vne.toml is this VNE.")


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Save running VMs, kill them, restore them.")
    parser.add_argument("--keep", action="store_true", help="leave the restored VNE up, and the snapshot in its store")
    keep = parser.parse_args().keep
    screen = Screen()
    screen.say("qsnap: save a running virtual network, kill it, bring it back", "bold")
    complete = False
    try:
        demo = Demo(qsnap.load_description(DESCRIPTION), qsnap.Place(store=STORE), screen)
        complete = trio.run(run_until_signal, demo, keep)
    except* (qsnap.QsnapError, DisprovedError, GuestConsoleError) as group:
        for error in group.exceptions:
            screen.say(f" ✗ {error}", "bold red")
    except* trio.TooSlowError:
        screen.say(" ✗ The guests do not answer in time. Is the machine busy?", "bold red")
    if complete:
        say_next(screen, keep)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
