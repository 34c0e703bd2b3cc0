"""Precopy by a QEMU that can be kept from its end: the passes come before the cut, and the cut when qsnap wants it."""

from __future__ import annotations

import os
import socket
from typing import Any

import trio
from attrs import define, field

from qsnap.host.capture import HAND_OVER, Capture, Precopy
from qsnap.host.migration import HELD_CAPABILITIES, STEP_TIMEOUT_S, cont
from qsnap.host.qmp import Command, QmpError, deadline
from qsnap.host.streams import narrow_socket, widen_socket
from qsnap.host.tasks import one_error, run_all

FIRST_PASS_POLL_S = 0.01
POLL_S = 0.001
PASS_S, LAST_PASS_S = 0.003, 0.01  #: what a short pass takes, and what is put up with where memory changes fast
HOLD_S, SHORTEST_HOLD_S, LONGEST_HOLD_S = 0.1, 0.01, 1.0  #: between two times of catching up
LEFT_BYTES = 2 << 20  #: more than this is not to be left for the pause


@define
class HeldPrecopy(Precopy):
    """A precopy that goes on until the VM is stopped (decision 0027).

    QEMU waits for an acknowledgement that never comes (`switchover-ack`), and only while the VM runs
    (`migration_can_switchover`, migration/migration.c). So the passes are made before the cut, which stops this VM when
    it stops all others: what is left to be sent then was written in the last moments. Until then QEMU has to wait with
    its stream most of the time, or it would spin; now and then it makes another few passes, so that not much is left.
    """

    inlet: socket.socket = field(init=False)  #: the end of the stream that QEMU writes to
    early: bool = False  #: somebody else has stopped the VM, and so QEMU has come to the end
    holding: trio.CancelScope = field(factory=trio.CancelScope)
    released: trio.Event = field(factory=trio.Event)

    capabilities = HELD_CAPABILITIES

    async def prepare(self, stream_fd: int, nursery: trio.Nursery) -> None:
        """The passes are made here. Raises DivergedError where memory changes too fast for them."""
        self.inlet = socket.socket(fileno=os.dup(stream_fd))
        try:
            await super().prepare(stream_fd, nursery)
            await self._start_migration()
            self.mark = self.began
            with one_error():
                async with trio.open_nursery() as watch:
                    watch.start_soon(self._watch_daemon)
                    await self._converge()
                    watch.cancel_scope.cancel()
        except BaseException:
            self.inlet.close()
            raise
        nursery.start_soon(self._hold)

    async def _converge(self) -> None:
        while (await self._look_passes()) < 2 and not self.early:  # everything is sent once, however long that takes
            await trio.sleep(FIRST_PASS_POLL_S)
        if not await self._catch_up():
            self._refuse_unless_forced()
        self.passes = await self._look_passes()

    async def _catch_up(self) -> bool:
        """Let QEMU make passes until they are so short that what is dirty can be sent in a pause; whether they are."""
        begun_s, first = trio.current_time(), await self._look_passes()
        before_s, before = begun_s, first
        while before_s < begun_s + self.bounds.time_s and before - first <= self.bounds.passes:
            pass_s = PASS_S if before - first <= self.bounds.passes_at_first_limit else LAST_PASS_S
            await trio.sleep(pass_s)
            now_s, now = trio.current_time(), await self._look_passes()
            if self.early or (now - before - 1) * pass_s >= now_s - before_s:  # whole ones lie between two looks
                return True
            before_s, before = now_s, now
        return False

    async def _hold(self) -> None:
        """Until the cut. The more there is to catch up with, the shorter QEMU waits."""
        wait_s, sent = HOLD_S, _sent_bytes(await self._look())
        with self.inlet:
            with self.holding:
                while not self.early:
                    narrow_socket(self.inlet)
                    await self.daemon.pause_reading()
                    await trio.sleep(wait_s)
                    widen_socket(self.inlet)
                    await self.daemon.resume_reading()
                    await self._catch_up()
                    before, sent = sent, _sent_bytes(await self._look())
                    much = sent - before > LEFT_BYTES
                    wait_s = max(wait_s / 2, SHORTEST_HOLD_S) if much else min(2 * wait_s, LONGEST_HOLD_S)
            widen_socket(self.inlet)  # which wakes QEMU
        await self.daemon.resume_reading()
        self.released.set()

    async def halt(self, nursery: trio.Nursery) -> None:
        await Capture.halt(self, nursery)

    async def stop(self) -> None:
        """QEMU sends what is left while the disks are cut and the taps moved, and takes the device state at once."""
        self._mark_stop()
        with deadline(STEP_TIMEOUT_S, "the stop", self.qmp.vm):
            await run_all([self._let_go, self._cut, self._move_taps_once_stopped])
            if commands := self.disks.commands_after_handover():
                await self._wait_migration("completed")
                await self.qmp.execute_all(*commands)

    def _mark_stop(self) -> None:
        if not self.early:
            super()._mark_stop()

    async def _let_go(self) -> None:
        self.holding.cancel()
        await self.released.wait()

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
        await cont(self.qmp)  # which QEMU refuses until it has taken the device state

    async def _wait_migration(self, status: str) -> None:
        while (await self._look())["status"] != status:
            await trio.sleep(POLL_S)

    async def _look_passes(self) -> int:
        return int((await self._look()).get("ram", {}).get("dirty-sync-count", 0))

    async def _look(self) -> dict[str, Any]:
        """How far the migration is; raises what has ended it."""
        info: dict[str, Any] = await self.qmp.execute("query-migrate")
        if info["status"] in ("failed", "cancelled"):
            await self._raise_ended(info["status"])
        self.early = info["status"] == "pre-switchover"
        return info


def _sent_bytes(info: dict[str, Any]) -> int:
    return int(info.get("ram", {}).get("transferred", 0))
