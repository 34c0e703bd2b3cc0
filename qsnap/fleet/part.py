"""One host's part of an operation on several, at its agent: what happens to it, and what the tables make of that."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Any

import trio
from attrs import define, field, frozen

from qsnap.errors import ConnectionLostError, InDoubtError, ProtocolError, QsnapError, StateError
from qsnap.fleet import participants
from qsnap.fleet.channel import Connection
from qsnap.fleet.participants import Order, vne_of
from qsnap.host.keeping import Keeping
from qsnap.host.place import Progress
from qsnap.host.tasks import one_error
from qsnap.model import Outcome, VMSnapshot
from qsnap.rules.commit import Action, Event, Message, Participant, Phase, State, participant_next
from qsnap.wire import messages as m

DEAD_MAN_S = 2.0  #: how long VMs stay paused at a barrier of which nothing more is heard


_PHASES = {phase.value: phase for phase in Phase}


@define
class Part:
    """This host's part of an operation under way. What happens to it waits in `events`, but an end does not wait."""

    order: Order
    at: Participant
    events: trio.MemorySendChannel[Happened]
    work: trio.CancelScope = field(factory=trio.CancelScope)
    busy: trio.Lock = field(factory=trio.Lock)  #: held while there is work being done
    keeping: Keeping | None = None  #: what it keeps of other hosts' VMs
    vms: tuple[VMSnapshot, ...] = ()
    result: Any = None  #: what the commit returned
    failure: QsnapError | None = None
    ended: trio.Event = field(factory=trio.Event)

    def end_work(self) -> None:
        """Whatever is being done for a phase is cancelled: it is to be undone anyway."""
        self.work.cancel()


@frozen
class Happened:
    """Something that happened to a part: a message of the coordinator's, or the end of its own work."""

    event: Message
    outcome: Outcome | None = None
    at_s: float = 0.0


async def take_part(
    connection: Connection,
    part: Part,
    events: trio.MemoryReceiveChannel[Happened],
    open_work: Callable[[Progress], AbstractAsyncContextManager[participants.Participant]],
) -> None:
    """Do the part, until it has ended or is in doubt. What fails is raised, and undone."""
    with one_error():
        async with trio.open_nursery() as nursery:
            reports = await nursery.start(send_reports, connection)
            nursery.start_soon(_read, connection, part)
            async with open_work(partial(report, reports)) as local:
                part.keeping = local.keeping if isinstance(local, participants.Local) else None
                await connection.send(m.Begun())
                await _drive(nursery, connection, local, part, events)
            nursery.cancel_scope.cancel()
        await _answer_rest(connection, part, events)


async def _read(connection: Connection, part: Part) -> None:
    """Pass on what the coordinator says; nothing that it has received is lost if this is cancelled."""
    while True:
        try:
            happened = _parse(await connection.receive())
        except QsnapError as error:
            part.end_work()
            part.failure = part.failure or error
            part.events.send_nowait(Happened(Event.LOST if connection.lost else Event.FAILED))
            return
        if happened.event is Event.ABORT:
            part.end_work()
        try:
            part.events.send_nowait(happened)
        except trio.WouldBlock:
            raise ProtocolError("too much is said at once", where=f"host {connection.peer.name}") from None


def _parse(message: m.Message) -> Happened:
    match message:
        case m.Perform(phase) if phase in _PHASES:
            return Happened(_PHASES[phase])
        case m.PerformAt(phase, at_s) if phase in _PHASES:
            return Happened(_PHASES[phase], at_s=at_s)
        case m.Commit(outcome):
            return Happened(Event.COMMIT, outcome)
        case m.Undo():
            return Happened(Event.ABORT)
    raise ProtocolError(f"{type(message).__name__} is not expected now")


async def _drive(
    nursery: trio.Nursery,
    connection: Connection,
    local: participants.Participant,
    part: Part,
    events: trio.MemoryReceiveChannel[Happened],
) -> None:
    """Do what the tables say, until the operation has ended for this host, or is in doubt."""
    while not part.at.ended:
        happened = await _next_event(part, events)
        before, (part.at, actions) = part.at, participant_next(part.at, happened.event)
        if happened.event is Event.ASK:
            part.failure = StateError("it is undone: another host had lost the coordinator, and asked for the outcome")
        for action in actions:
            match action:
                case Action.WORK:
                    part.work = trio.CancelScope()
                    nursery.start_soon(_work, local, part, happened.at_s)
                case Action.UNDO:
                    part.end_work()
                    with trio.CancelScope(shield=True):
                        async with part.busy:
                            await local.undo()
                case Action.COMMIT:
                    try:
                        with trio.CancelScope(shield=True):
                            part.result = await local.commit(happened.outcome or Outcome())
                    except QsnapError as error:
                        part.failure, part.at = error, before
                        part.events.send_nowait(Happened(Event.FAILED))
                        break
                case Action.ANSWER:
                    await _say(connection, part)
                case Action.ASK:
                    raise InDoubtError(
                        f"{part.order.decider} is asked for the outcome", where=f"VNE {vne_of(part.order)}"
                    )
        if part.at.state is State.IDLE:
            return  # nothing was begun, and the coordinator is lost


async def _answer_rest(connection: Connection, part: Part, events: trio.MemoryReceiveChannel[Happened]) -> None:
    """Answer what was said meanwhile, such as a message that was sent twice: of what has ended no work is left."""
    with suppress(trio.WouldBlock):
        while True:
            part.at, actions = participant_next(part.at, events.receive_nowait().event)
            if Action.ANSWER in actions:
                await _say(connection, part)


async def _next_event(part: Part, events: trio.MemoryReceiveChannel[Happened]) -> Happened:
    """The next event; or LOST, if VMs wait at a barrier of which nothing is heard."""
    at_barrier = part.at.state is State.WAITING and part.at.phases[part.at.done - 1] is Phase.STOP
    with trio.move_on_after(DEAD_MAN_S if at_barrier else math.inf):
        return await events.receive()
    return Happened(Event.LOST)


async def _work(local: participants.Participant, part: Part, at_s: float) -> None:
    """Do a phase, and say how it went; nothing if it was cancelled, as what cancels it says why."""
    with part.work:
        async with part.busy:
            try:
                part.vms = await local.perform(part.at.phase, at_s) or ()
                event = Event.DONE
            except QsnapError as error:
                part.failure = error
                event = Event.FAILED
        await part.events.send(Happened(event))


async def _say(connection: Connection, part: Part) -> None:
    """Tell the coordinator where this part stands. Whether it hears it is for the connection to find out."""
    match part.at.answer:
        case Event.COMMITTED:
            reply: m.Message = m.Committed.of(part.result)
        case Phase():
            reply = m.Performed(part.at.answer.value, part.vms)
        case _:
            reply = m.Refused.of(part.failure) if part.failure else m.Undone()
    with suppress(ConnectionLostError):
        await connection.send(reply)


async def send_reports(
    connection: Connection, task_status: trio.TaskStatus[trio.MemorySendChannel[m.Progressed]]
) -> None:
    """Tell the coordinator of progress, as far as it can take it in."""
    reports_in, reports = trio.open_memory_channel[m.Progressed](16)
    task_status.started(reports_in)
    with suppress(ConnectionLostError):
        async for progressed in reports:
            await connection.send(progressed)


def report(reports: trio.MemorySendChannel[m.Progressed], stage: str, vm: str, done: int, total: int) -> None:
    """Have it told to the coordinator, if that can take it in now."""
    with suppress(trio.WouldBlock):  # there will be another
        reports.send_nowait(m.Progressed(stage, vm, done, total))
