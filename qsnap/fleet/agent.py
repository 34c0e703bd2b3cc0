"""The agent of a host: does what coordinators ask of it, and brings to its end what they leave undone.

Of an operation on several hosts it does its part (`_Part`), as `qsnap.rules.commit` has it. A coordinator that falls
silent before this host has voted, or before it decides, has its part undone; after that the decider is asked.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial

import trio
from attrs import define, evolve, field

from qsnap.config import files_of
from qsnap.errors import HostError, QsnapError, StateError
from qsnap.fleet.answers import ANSWERS
from qsnap.fleet.channel import Connection, connect, serve
from qsnap.fleet.consoles import serve_console
from qsnap.fleet.fetching import fetch, send_file
from qsnap.fleet.identity import load_identity
from qsnap.fleet.keeping import keep
from qsnap.fleet.part import Happened, Part, report, send_reports, take_part
from qsnap.fleet.participants import Open, Order, open_local, phases_of, vne_of
from qsnap.fleet.remote import inquire
from qsnap.host.clock import steady_s
from qsnap.host.journal import Kind
from qsnap.host.place import Place
from qsnap.host.recovery import has_started, recover, settle
from qsnap.host.tasks import one_error
from qsnap.model import VNE, Outcome, UpOrder
from qsnap.rules.commit import Event, Participant, State
from qsnap.wire import messages as m

DOUBT_S = (0.5, 10.0)  #: how long to wait before the decider is asked again: at first, and at most
log = logging.getLogger("qsnap")


async def run_agent(
    listen: tuple[str, int],
    place: Place,
    allow: Sequence[str] = (),
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve coordinators for ever. `allow` are patterns of the VNEs that they may have here, none of them for all.

    What an agent that was killed has left behind is put right before the first connection.
    """
    agent = Agent(place, tuple(allow))
    try:
        await recover(place=place)
    except QsnapError as error:  # whoever needs that VNE is told so again
        log.warning("not all could be put right: %s", error)
    with one_error():
        async with trio.open_nursery() as agent.nursery:
            for vne in place.runtime().interrupted():
                agent.nursery.start_soon(agent.settle_doubt, vne)
            await serve(listen, place.identity, agent.handle, task_status=task_status)


@define
class Agent:
    """What an agent knows while it runs. All else is in the files of its place."""

    place: Place
    allow: tuple[str, ...] = ()
    open_part: Open = open_local
    nursery: trio.Nursery = field(init=False)
    parts: dict[str, Part] = field(factory=dict)  #: by operation

    async def handle(self, connection: Connection) -> None:
        """Answer one coordinator until it has nothing more to ask."""
        while True:
            message = await connection.receive()
            try:
                await self._answer(connection, message)
            except QsnapError as error:
                if connection.lost:
                    raise
                await connection.send(m.Refused.of(error))

    async def _answer(self, connection: Connection, message: m.Message) -> None:
        vne = getattr(message, "vne", "")
        if vne and not (connection.peer.may_use(vne) and self._allows(vne)):
            raise StateError(
                f"{connection.peer.name} may not use VNE {vne} here",
                advice="Its certificate (qsnap pki issue --vne) or this agent (qsnap agent --allow) has to say so.",
            )
        match message:
            case m.ClockProbe():
                now_s = steady_s()
                await connection.send(m.ClockReply(message.sent_s, now_s, now_s))
            case m.Begin():
                await self._take_part(connection, message.order)
            case m.Ask():
                await connection.send(m.Answer(await self._find_outcome(message)))
            case m.Undo():
                await connection.send(m.Undone())  # it is: no part is left without a commit
            case m.Fetch():
                await self._fetch(connection, message)
            case m.Keep():
                await self._keep(connection, message)
            case m.ReadFile():
                await send_file(connection, self.place, message)
            case m.OpenConsole():
                await serve_console(connection, self.place, message)
            case _:
                handler = ANSWERS.get(type(message))
                if handler is None:
                    advice = "If one was, it is undone: start anew."
                    raise StateError(f"{type(message).__name__}, and no operation is under way here", advice=advice)
                await connection.send(await handler(self.place, message))

    def _allows(self, vne: str) -> bool:
        return not self.allow or any(fnmatchcase(vne, pattern) for pattern in self.allow)

    async def _take_part(self, connection: Connection, order: Order) -> None:
        if not order.id or order.id in self.parts:
            raise StateError("every operation has an id of its own")
        await self._settle_once(vne_of(order))
        if isinstance(order, UpOrder):
            _check_files(order.vne)
        events_in, events = trio.open_memory_channel[Happened](64)
        part = self.parts[order.id] = Part(order, Participant(phases_of(order), not order.decider), events_in)
        try:
            await take_part(connection, part, events, partial(self.open_part, order, self.place))
        finally:
            del self.parts[order.id]
            part.ended.set()
            if part.at.state is State.VOTED and order.decider:
                self.nursery.start_soon(self.settle_doubt, vne_of(order))

    async def _fetch(self, connection: Connection, message: m.Fetch) -> None:
        """Fetch for as long as the coordinator waits for it; what has come is kept."""
        _check_files(message.part, saved=True)
        with one_error():
            async with trio.open_nursery() as nursery:
                reports = await nursery.start(send_reports, connection)
                nursery.start_soon(connection.cancel_when_lost, nursery.cancel_scope)
                part = await fetch(self.place, message, partial(report, reports))
                nursery.cancel_scope.cancel()
        if not connection.lost:
            await connection.send(m.Snapshots((part,)))

    async def _keep(self, connection: Connection, message: m.Keep) -> None:
        part = self.parts.get(message.operation)
        if part is None or part.keeping is None or vne_of(part.order) != message.vne:
            advice = f"It keeps VM {message.vm} from the next start on, or if it is restored: `saved_on` is new."
            raise StateError("it takes no part in this snapshot", where=f"VNE {message.vne}", advice=advice)
        await keep(connection, part.keeping, message)

    async def _find_outcome(self, ask: m.Ask) -> Outcome | None:
        """What became of an operation that this host decides; one that is not decided is undone."""
        part = self.parts.get(ask.operation)
        if part is not None and part.order.decider:
            raise StateError("another host decides that operation", where=f"VNE {ask.vne}")
        if part is not None:
            part.end_work()
            await part.events.send(Happened(Event.ASK))
            await part.ended.wait()
        await recover(ask.vne, place=self.place)
        if not ask.snapshot:
            return Outcome() if has_started(ask.vne, self.place.runtime(), ask.operation) else None
        with suppress(StateError):
            saved = await self.place.snapshots().load(ask.vne, ask.snapshot)
            if saved.operation == ask.operation:
                return Outcome(saved.created_s, saved.discrepancy_ms)
        return None

    async def settle_doubt(self, vne: str) -> None:
        """Ask the decider of an operation in doubt until it answers."""
        wait_s, most_s = DOUBT_S
        while True:
            try:
                await self._settle_once(vne)
                return
            except QsnapError as error:
                log.warning("%s", error)
            await trio.sleep(wait_s)
            wait_s = min(2 * wait_s, most_s)

    async def _settle_once(self, vne: str) -> None:
        runtime = self.place.runtime()
        found = runtime.journal(vne).read()
        if found is None or not found.in_doubt:
            return
        operation = found.operation
        decider = next(host for host in runtime.load(vne).vne.hosts if host.name == operation.decider)
        snapshot = operation.snapshot if operation.kind is Kind.SNAPSHOT else ""
        dial = partial(connect, identity=load_identity(self.place.identity))
        outcome = await inquire(decider, dial, m.Ask(vne, operation.id, snapshot))
        await settle(vne, runtime, outcome)


def _check_files(vne: VNE, *, saved: bool = False) -> None:
    """Raise HostError for a file of the description that is not on this host, and not part of a snapshot if `saved`."""
    vms = tuple(evolve(vm, disks=(), kernel="", initrd="") for vm in vne.vms) if saved else vne.vms
    for key, file in files_of(evolve(vne, vms=vms)):
        if not os.path.exists(file):
            raise HostError(f"there is no {file}", where=f"host {vne.here}, {key}", advice="Put it there.")
