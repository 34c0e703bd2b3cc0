"""Capturing one VM: prepare while it runs, stop it for the cut, resume it, and take in the rest of its state.

The order inside the stop phase is the heart of qsnap: `stop`, one `transaction` for all disks, every tap onto the
post-snapshot bridge, then the device state. VMs among others are halted before any goes through it (decision 0026).
Each engine (`Background`, `Precopy`) differs in what it does before the stop and in how it learns that the VM may run
again. After any failure `abandon` leaves the VM as it was found.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import trio
from attrs import define, field, frozen

from qsnap.errors import HostError, QemuError, QsnapError
from qsnap.host.clock import steady_s
from qsnap.host.daemon import Receiving
from qsnap.host.disks import DiskCut
from qsnap.host.migration import (
    BACKGROUND_CAPABILITIES,
    FD_NAME,
    PRECOPY_CAPABILITIES,
    STEP_TIMEOUT_S,
    cont,
    set_capabilities,
)
from qsnap.host.qmp import Command, Qmp, deadline
from qsnap.host.tasks import one_error, run_all
from qsnap.model import Engine, Measurements

#: Behind the last of RAM, QEMU waits for it before it takes the device state and gives up the disks.
HAND_OVER: Command = ("migrate-continue", {"state": "pre-switchover"})
DOWNTIME_LIMIT_MS = 1  #: a precopy ends when what is left can be sent in this time
POLL_S = 0.005
#: While QEMU answers this at some length, its monitor reads the commands behind it, at 4 µs a byte: not in the pause.
READ_AHEAD: Command = ("query-commands", {})


class DivergedError(QemuError):
    """A precopy did not converge within its bounds. The VM was not stopped."""


@frozen
class Bounds:
    """How long a precopy may go on: so many passes over dirty pages and so many seconds."""

    passes_at_first_limit: int = 8  #: with the least downtime; after them the limit is raised to the last one
    last_limit_ms: int = 10
    passes: int = 40
    time_s: float = 20.0


@frozen
class Captured:
    """What one capture yielded. Instants are QEMU's, on the clock of `qsnap.host.clock`."""

    receipt: dict[str, Any]
    start_instant_s: float
    total_ms: float
    iterations: int
    last_iteration_pages: int
    stop_instant_s: float  # 0, as the next, if the VM was paused all along
    resume_instant_s: float

    def measurements(self, image_bytes: int) -> Measurements:
        """The figures kept with the snapshot; `image_bytes` are what RAM and device state take on disk."""
        ram_bytes = self.receipt["ram_bytes"]
        return Measurements(
            total_ms=self.total_ms,
            iterations=self.iterations,
            last_iteration_pages=self.last_iteration_pages,
            stop_instant_s=self.stop_instant_s,
            resume_instant_s=self.resume_instant_s,
            downtime_ms=max(0.0, self.resume_instant_s - self.stop_instant_s) * 1e3,
            image_bytes=image_bytes,
            image_to_memory=image_bytes / ram_bytes,
            start_instant_s=self.start_instant_s,
        )


def allocated_bytes(paths: Iterable[Path]) -> int:
    """What files take on disk."""
    return sum(path.stat().st_blocks * 512 for path in paths)


@define
class Capture(ABC):
    """One VM being captured: `prepare`, `stop`, `resume`, `complete`; or `abandon` at any moment."""

    qmp: Qmp
    daemon: Receiving
    disks: DiskCut
    was_running: bool
    move_taps: Callable[[], None]
    started_s: float = 0.0  # trio's clock
    start_instant_s: float = 0.0
    began: int = 0  # events before this index are from before the migration
    mark: int = 0  #: events before this index are from before the stop
    halted: bool = False  #: `stop` was sent ahead

    engine: ClassVar[Engine]

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[str]:
        """The migration capabilities of this engine."""

    async def prepare(self, stream_fd: int) -> None:
        """Everything slow. `stream_fd` is handed to QEMU and closed here."""
        try:
            await set_capabilities(self.qmp, self.capabilities)
            await self.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": DOWNTIME_LIMIT_MS})
            await self.qmp.send_fd(FD_NAME, stream_fd)
        finally:
            os.close(stream_fd)
        await self.daemon.wait_ready()

    async def halt(self, nursery: trio.Nursery) -> None:
        """Stop the VM and do no more, ahead of `stop`, unless its engine knows better when.

        It has stopped when this returns. What QEMU still does then, such as to flush the disks, is waited for in
        `nursery`, so that other VMs need not wait for it.
        """
        self._mark_stop()
        self.halted = True
        nursery.start_soon(self.qmp.execute, "stop")
        with deadline(STEP_TIMEOUT_S, "the stop", self.qmp.vm):
            await self._wait_stopped()

    async def stop(self, nursery: trio.Nursery) -> None:
        """The VM's cut: stop it, redirect its disks, and make its taps post-snapshot.

        What QEMU does by itself before it lets the VM run may still be under way; it is waited for in `nursery`.
        """
        self._mark_stop()
        with deadline(STEP_TIMEOUT_S, "the stop", self.qmp.vm):
            await self.qmp.execute_all(*self._stop_commands(), *self.disks.commands())
            await self._wait_stopped()
            self.move_taps()
            await self.disks.clone()

    def _mark_stop(self) -> None:
        if not self.halted:
            self.mark = self._paused_since()

    def _paused_since(self) -> int:
        """Where STOP will be among QEMU's events, or is if somebody else has paused the VM meanwhile."""
        events = self.qmp.events
        last = next((index for index in reversed(range(len(events))) if events[index].name in ("STOP", "RESUME")), -1)
        return last if last >= 0 and events[last].name == "STOP" else len(events)

    def _stop_commands(self) -> tuple[Command, ...]:
        return () if self.halted else (READ_AHEAD, ("stop", {}))

    async def _wait_stopped(self) -> None:
        if self.was_running:
            await self.qmp.wait_event(lambda event: event.name == "STOP", since=self.mark)

    async def _move_taps_once_stopped(self) -> None:
        await self._wait_stopped()
        self.move_taps()

    async def resume(self) -> None:
        """Let the VM run on as soon as the state at the cut is safe. It stays paused if it was found paused."""
        with deadline(STEP_TIMEOUT_S, "the pause", self.qmp.vm):
            await self._release()

    async def stop_and_resume(self) -> None:
        """The cut of a VM that waits for no other."""
        with one_error():
            async with trio.open_nursery() as nursery:
                await self.stop(nursery)
                await self.resume()

    @abstractmethod
    async def complete(self) -> Captured:
        """Wait for the rest of the state and for the daemon's files."""

    @abstractmethod
    async def _release(self) -> None: ...

    def explain(self, reason: str) -> str:
        """The reason for the engine, and what became of it."""
        return reason

    async def _finish(self) -> tuple[dict[str, Any], dict[str, Any]]:
        await self._wait_migration("completed")
        receipt = await self.daemon.wait_done()
        info = await self.qmp.execute("query-migrate")
        await set_capabilities(self.qmp, frozenset())
        return receipt, info

    async def _start_migration(self) -> None:
        self._note_start()
        await self.qmp.execute("migrate", {"uri": f"fd:{FD_NAME}"})

    def _note_start(self) -> None:
        self.began = len(self.qmp.events)
        self.started_s = trio.current_time()
        self.start_instant_s = steady_s()

    async def _wait_migration(self, status: str) -> None:
        """Wait for a migration status; raises what ends the migration before, be it QEMU's side or the daemon's."""
        ends = (status, "failed", "cancelled")
        with one_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_daemon)
                event = await self.qmp.wait_event(
                    lambda event: event.name == "MIGRATION" and event.data["status"] in ends, since=self.began
                )
                nursery.cancel_scope.cancel()
        if event.data["status"] != status:
            with trio.move_on_after(1.0):  # a daemon that died is the cause, and says more than a broken pipe
                await self.daemon.wait_done()
            info = await self.qmp.execute("query-migrate")
            raise self._migration_error(event.data["status"], info)

    async def _watch_daemon(self) -> None:
        """Raise what the daemon fails with; a migration that failed first or a QEMU that died is a better reason."""
        try:
            await self.daemon.wait_done()
        except HostError:  # its own trouble: it breaks the pipe, and QEMU's complaint about that says less
            raise
        except QsnapError:
            info = await self.qmp.execute("query-migrate")
            if info.get("status") == "failed" and "error-desc" in info:
                raise self._migration_error("failed", info) from None
            raise

    def _migration_error(self, status: str, info: dict[str, Any]) -> QemuError:
        reason = info.get("error-desc", "no reason given")
        return QemuError(f"the {self.engine.value} migration {status}: {reason}", where=f"VM {self.qmp.vm}")

    def _captured(self, receipt: dict[str, Any], passes: int, last_pages: int) -> Captured:
        return Captured(
            receipt=receipt,
            start_instant_s=self.start_instant_s,
            total_ms=(trio.current_time() - self.started_s) * 1e3,
            iterations=passes,
            last_iteration_pages=last_pages,
            stop_instant_s=self._instant("STOP"),
            resume_instant_s=self._instant("RESUME"),
        )

    def _instant(self, name: str) -> float:
        if not self.was_running:
            return 0.0
        return next((event.instant_s for event in self.qmp.events[self.mark :] if event.name == name), 0.0)

    def _has_resumed(self) -> bool:
        return any(event.name == "RESUME" for event in self.qmp.events[self.mark :])


@define
class Background(Capture):
    """Capability background-snapshot: RAM is write-protected and saved while the VM runs on.

    The first RAM record after the setup section proves that the device state is taken and writes are tracked
    (`bg_migration_thread`, migration/migration.c): from then on the VM may run. QEMU up to 8.x lets it run by
    itself at that point, later ones keep a paused VM paused; what happens decides, not the version.
    """

    keeps_paused: bool = False  #: from QEMU 9.0 on: see `stop`

    engine = Engine.BACKGROUND
    capabilities = BACKGROUND_CAPABILITIES

    async def stop(self, nursery: trio.Nursery) -> None:
        """Where a paused VM stays paused, QEMU takes the device state while the taps are still being moved.

        It cuts the disks when it has the state. `cont` need not wait until it says so: its monitor has one command done
        before it begins the next.
        """
        if not self.keeps_paused:
            await super().stop(nursery)
            return
        self._note_start()
        self._mark_stop()
        migrate = ("migrate", {"uri": f"fd:{FD_NAME}"})
        commands = (*self._stop_commands(), migrate, *self.disks.commands())
        nursery.start_soon(self.qmp.execute_all, *commands)
        with deadline(STEP_TIMEOUT_S, "the stop", self.qmp.vm):
            await run_all([self._move_taps_once_stopped, self._clone_once_flushed])

    async def _clone_once_flushed(self) -> None:
        """STOP is sent before the disks are flushed; that the migration begins shows that `stop` has done it."""
        await self.qmp.wait_event(lambda event: event.name == "MIGRATION", since=self.mark)
        await self.disks.clone()

    async def _release(self) -> None:
        if not self.keeps_paused:
            await self._start_migration()
        await self.daemon.wait_tracking()
        if self.was_running and not self._has_resumed():
            await cont(self.qmp)
        elif not self.was_running:
            await self.qmp.execute("stop")

    async def complete(self) -> Captured:
        receipt, _ = await self._finish()
        return self._captured(receipt, 1, receipt["data_pages"])


@define
class Precopy(Capture):
    """Precopy migration into a receiver that keeps the newest copy of each page.

    QEMU stops the VM when what is left can be sent within the downtime limit, and then waits
    (`pause-before-switchover`) while the disks and taps are moved. A VM that does not get there within the bounds
    raises DivergedError while it still runs or, with `force`, is stopped all the same.
    """

    force: bool = False
    bounds: Bounds = field(factory=Bounds)
    forced: bool = False  #: the bounds ended it, not convergence
    passes: int = 0  #: that it took to converge, if that is not what QEMU says

    engine = Engine.PRECOPY
    capabilities = PRECOPY_CAPABILITIES

    async def halt(self, nursery: trio.Nursery) -> None:
        """Not before it has converged."""

    async def stop(self, nursery: trio.Nursery) -> None:
        await self._start_migration()
        self.mark = self.began
        with one_error():
            async with trio.open_nursery() as settling:
                settling.start_soon(self.disks.keep_settled)
                await self._converge()
                settling.cancel_scope.cancel()
        with deadline(STEP_TIMEOUT_S, "the stop", self.qmp.vm):
            await self._wait_migration("pre-switchover")
            await self.qmp.execute_all(*self.disks.commands_before_handover())
            self.move_taps()
            await self.disks.clone()

    async def _converge(self) -> None:
        """Return when QEMU has stopped the VM, or was made to."""
        ends_at = trio.current_time() + self.bounds.time_s
        limit_raised = False
        while not self._has_stopped():
            info = await self.qmp.execute("query-migrate")
            passes = info.get("ram", {}).get("dirty-sync-count", 0)
            if passes > self.bounds.passes or trio.current_time() > ends_at:
                await self._end_anyway()
                return
            if passes > self.bounds.passes_at_first_limit and not limit_raised:
                limit_raised = True
                await self.qmp.execute("migrate-set-parameters", {"downtime-limit": self.bounds.last_limit_ms})
            with trio.move_on_after(POLL_S):  # the pause has begun when this ends early
                await self._wait_migration("pre-switchover")

    def _has_stopped(self) -> bool:
        return any(event.name == "STOP" for event in self.qmp.events[self.mark :]) or not self.was_running

    async def _end_anyway(self) -> None:
        self._refuse_unless_forced()
        await self.qmp.execute("stop")

    def _refuse_unless_forced(self) -> None:
        if not self.force:
            raise DivergedError(
                "memory changes faster than precopy saves it",
                where=f"VM {self.qmp.vm}",
                advice="Take the engine background, or auto.",
            )
        self.forced = True

    def explain(self, reason: str) -> str:
        return f"{reason}; it did not converge within its bounds and was ended" if self.forced else reason

    async def _release(self) -> None:
        await self.qmp.execute_all(HAND_OVER)
        await self._wait_handed_over()
        await cont(self.qmp)
        if not self.was_running:  # only by running does QEMU leave `postmigrate`, from which it cannot migrate again
            await self.qmp.execute("stop")

    async def _wait_handed_over(self) -> None:
        await self._wait_migration("completed")
        await self.qmp.execute_all(*self.disks.commands_after_handover())

    async def complete(self) -> Captured:
        receipt, info = await self._finish()
        ram = info.get("ram", {"dirty-sync-count": 0, "page-size": 1})
        passes = self.passes or ram["dirty-sync-count"]
        return self._captured(receipt, passes, ram.get("downtime-bytes", 0) // ram["page-size"])


@define
class Record(Precopy):
    """A precopy whose stream the daemon keeps as it comes."""

    engine = Engine.RECORD
