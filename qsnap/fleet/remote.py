"""Another host, through its agent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeVar

import trio
from attrs import define, evolve

from qsnap.errors import ConnectionLostError, InDoubtError, ProtocolError, QsnapError
from qsnap.fleet.channel import Connection
from qsnap.fleet.participants import Order, vne_of
from qsnap.host.clock import steady_s
from qsnap.host.place import Progress, no_progress
from qsnap.model import Host, Outcome, SnapshotOrder
from qsnap.rules.clocks import Exchange, clock_offset_s
from qsnap.rules.commit import Phase
from qsnap.wire import messages as m

CAPABILITY = "appointment"
CLOCK_PROBES = 8
UNDO_S = 90.0  #: an undo may have to merge disks
INQUIRY_S = 30.0  #: how long a decider that was lost is asked before its outcome is left open
POLL_S = 0.5

M = TypeVar("M")
Dial = Callable[[Host], AbstractAsyncContextManager[Connection]]  #: connects to the agent of a host


@define
class Remote:
    """One host's part of an operation."""

    host: Host
    order: Order
    dial: Dial
    connection: Connection
    progress: Progress
    round_trip_s: float = 0.0  #: the longest that was seen
    ended: bool = False  #: the host has been told to commit or to undo, or cannot be told any more

    async def perform(self, phase: Phase, at_s: float = 0.0) -> Any:
        """What the host's own `perform` returned."""
        message: m.Message = m.Perform(phase.value)
        if at_s and isinstance(self.order, SnapshotOrder) and CAPABILITY in self.connection.capabilities:
            message = m.PerformAt(phase.value, at_s - self.order.clock_offset_s)
        return (await self._ask(message, m.Performed)).vms

    async def commit(self, outcome: Outcome) -> Any:
        """What the host's own `commit` returned."""
        self.ended = True
        return (await self._ask(m.Commit(outcome), m.Committed)).result

    async def undo(self) -> None:
        """Have all of it taken back, and wait until it is."""
        self.ended = True
        with trio.fail_after(UNDO_S):
            await self.connection.send(m.Undo())
            while not isinstance(await self.connection.receive(), m.Undone):
                pass  # what the host was still at when it was told

    async def inquire(self) -> Outcome | None:
        """What became of it, from the host that decides it, which was lost. Raises InDoubtError if that stays so."""
        with trio.move_on_after(INQUIRY_S):
            while True:
                with suppress(ConnectionLostError):
                    return await inquire(self.host, self.dial, question(self.order))
                await trio.sleep(POLL_S)
        raise InDoubtError(
            "the connection was lost while it committed, and it does not answer",
            where=f"host {self.host.name}",
            advice="When its agent is back, all hosts will agree by themselves. See `qsnap ps`.",
        )

    async def _ask(self, message: m.Message, kind: type[M]) -> M:
        """Send a message and wait for its answer, while the host tells of its progress."""
        try:
            return await ask(self.connection, message, kind, self.progress)
        except QsnapError:
            self.ended = True  # it has undone its part, or cannot be told to
            raise


@asynccontextmanager
async def open_remote(host: Host, order: Order, dial: Dial, progress: Progress) -> AsyncIterator[Remote]:
    """One host's part of an operation, which is undone if the block is left without a commit."""
    async with dial(host) as connection:
        round_trip_s = 0.0
        if isinstance(order, SnapshotOrder):
            exchanges = await probe_clock(connection)
            order = evolve(order, clock_offset_s=clock_offset_s(exchanges))
            round_trip_s = max(exchange.delay_s for exchange in exchanges)
        remote = Remote(host, order, dial, connection, progress, round_trip_s)
        await remote._ask(m.Begin.of(order), m.Begun)
        try:
            yield remote
        except BaseException:
            if not remote.ended:
                with trio.CancelScope(shield=True), suppress(QsnapError, trio.TooSlowError):
                    await remote.undo()
            raise


async def ask(connection: Connection, message: m.Message, kind: type[M], progress: Progress = no_progress) -> M:
    """Send a message and wait for its answer, of this kind, while the other host tells of its progress."""
    here = f"host {connection.peer.name}"
    try:
        await connection.send(message)
        while isinstance(reply := await connection.receive(), m.Progressed):
            progress(reply.stage, reply.vm, reply.done, reply.total)
    except QsnapError as error:
        if not error.where.startswith(here):
            error.where = ", ".join(filter(None, (here, error.where)))
        raise
    if not isinstance(reply, kind):
        raise ProtocolError(f"it answered {type(message).__name__} with {type(reply).__name__}", where=here)
    return reply


def question(order: Order) -> m.Ask:
    """What to ask the decider of an operation."""
    return m.Ask(vne_of(order), order.id, order.name if isinstance(order, SnapshotOrder) else "")


async def inquire(host: Host, dial: Dial, message: m.Ask) -> Outcome | None:
    """What the decider of an operation says of it; None if it is undone, which it is from now on at the latest."""
    async with dial(host) as connection:
        return (await ask(connection, message, m.Answer)).outcome


async def probe_clock(connection: Connection) -> list[Exchange]:
    """Messages that went to a host and back, to compare its clock with this one's."""
    exchanges = []
    for _ in range(CLOCK_PROBES):
        reply = await ask(connection, m.ClockProbe(steady_s()), m.ClockReply)
        exchanges.append(Exchange(reply.sent_s, reply.received_s, reply.answered_s, steady_s()))
    return exchanges
