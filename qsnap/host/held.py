"""Precopy by a QEMU that can be kept from its end: the passes come before the cut, and the cut when qsnap wants it."""

from __future__ import annotations

import trio
from attrs import define, field

from qsnap.host.capture import HAND_OVER, Capture, Captured, Precopy
from qsnap.host.daemon import Daemon
from qsnap.host.migration import HELD_CAPABILITIES, STEP_TIMEOUT_S, cont
from qsnap.host.qmp import Command, QmpError, deadline
from qsnap.host.tasks import one_error, run_all

#: QEMU looks for what has become dirty when less is left than may be sent in 1 ms at this rate. At the rate that it
#: measures that would be nothing while it is held, and until 10.0 it then never looks (`migration_iteration_run`).
SWITCHOVER_BYTES_S = 100_000_000


@define
class HeldPrecopy(Precopy):
    """A precopy that goes on until the VM is stopped (decision 0027).

    QEMU waits for an acknowledgement that never comes (`switchover-ack`), and only while the VM runs
    (`migration_can_switchover`, migration/migration.c). So the passes are made before the cut, which stops this VM when
    it stops all others: what is left to be sent then was written in the last moments. Until then QEMU is held.
    """

    holder: Daemon = field(kw_only=True)  #: the daemon, which holds QEMU
    early: bool = False  #: somebody else has stopped the VM

    capabilities = HELD_CAPABILITIES

    async def prepare(self, stream_fd: int) -> None:
        """The passes are made here. Raises DivergedError where memory changes too fast for them."""
        await super().prepare(stream_fd)
        await self._assume_bandwidth(SWITCHOVER_BYTES_S)
        await self._start_migration()
        with one_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_for_end, nursery.cancel_scope)
                if not await self.holder.wait_settled():
                    self._refuse_unless_forced()
                nursery.cancel_scope.cancel()
        self.passes = (await self.qmp.execute("query-migrate")).get("ram", {}).get("dirty-sync-count", 0)

    async def _assume_bandwidth(self, bytes_s: int) -> None:
        await self.qmp.execute("migrate-set-parameters", {"avail-switchover-bandwidth": bytes_s})

    async def complete(self) -> Captured:
        captured = await super().complete()
        await self._assume_bandwidth(0)  # what it measures
        return captured

    async def _watch_for_end(self, waiting: trio.CancelScope) -> None:
        """Raise what ends the migration. It comes to its end by itself if somebody else stops the VM."""
        await self._wait_migration("pre-switchover")
        self.early = True
        waiting.cancel()

    def _mark_stop(self) -> None:
        if self.early:
            self.mark = self.began
        else:
            super()._mark_stop()

    async def halt(self, nursery: trio.Nursery) -> None:
        await Capture.halt(self, nursery)

    async def stop(self, nursery: trio.Nursery) -> None:
        """QEMU sends what is left while the disks are cut and the taps moved, and takes the device state at once."""
        self._mark_stop()
        with deadline(STEP_TIMEOUT_S, "the stop", self.qmp.vm):
            await run_all([self.holder.let_go, self._cut, self._move_taps_once_stopped])
            await self._wait_migration("completed")
            await self.qmp.execute_all(*self.disks.commands_after_handover())

    async def _cut(self) -> None:
        commands = (*self._stop_commands(), *self.disks.commands_before_handover())
        if self.disks.clones:
            await self.qmp.execute_all(*commands)
        elif await self._hand_over(*commands):
            return
        await self._wait_migration("pre-switchover")
        await self.disks.clone()
        await self.qmp.execute_all(HAND_OVER)

    async def _hand_over(self, *before: Command) -> bool:
        """Do so right behind the other commands, where QEMU has come that far by then; whether it had."""
        try:
            await self.qmp.execute_all(*before, HAND_OVER)
        except QmpError as error:
            if error.command != HAND_OVER[0]:
                raise
            return False
        return True

    async def _release(self) -> None:
        await cont(self.qmp)
