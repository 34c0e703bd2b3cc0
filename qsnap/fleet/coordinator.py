"""Driving one operation through all of its participants: the same for this host alone and for many.

What is sent to whom is the tables' to say (`qsnap.rules.commit`); here it is sent, and the answers are collected. The
coordinator keeps nothing: it may die at any moment (decision 0021).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import trio
from attrs import define, evolve, field

from qsnap.errors import ConnectionLostError, QsnapError
from qsnap.fleet.participants import Order, Participant, open_local, phases_of
from qsnap.host.clock import steady_s
from qsnap.host.place import Place, Progress
from qsnap.host.tasks import one_error, run_all, uncollected
from qsnap.model import VNE, Host, Outcome, RestoreOrder, UpOrder
from qsnap.rules.commit import CUTS, Event, Message, Phase, Send, Stage, coordinator_next, coordinator_start
from qsnap.rules.parts import hosts_in_use

if TYPE_CHECKING:
    from qsnap.fleet.remote import Dial, Remote

AHEAD_S = 0.01  #: for agents that wait for a processor
SEND_S = 0.5e-3  #: what it takes to tell one more host
Decide = Callable[[Sequence[Any]], Outcome]  #: of what the last phase returned, by participant
log = logging.getLogger("qsnap")


async def carry_out(
    order: Order, whole: VNE | None, place: Place, progress: Progress, decide: Decide = lambda votes: Outcome()
) -> list[Any]:
    """Do all of an operation, and return what each participant's commit did; on any failure it leaves nothing.

    It is on this host, or on those that the VNE `whole` is spread over. Raises InDoubtError if the host that decides
    was lost meanwhile: then all will agree once it is back.
    """
    with one_error():
        if whole is None:
            async with open_local(order, place, progress) as local:
                return await lead({"": local}, phases_of(order), decide)
        from qsnap.fleet.channel import connect  # TLS and certificates take a while to import, and few need them
        from qsnap.fleet.identity import load_identity

        dial = partial(connect, identity=load_identity(place.identity))
        async with open_remotes(order, whole, dial, progress) as remotes:
            return await lead(remotes, phases_of(order), decide)


@asynccontextmanager
async def open_remotes(
    order: Order, whole: VNE, dial: Dial, progress: Progress
) -> AsyncIterator[Mapping[str, Participant]]:
    """All hosts of a VNE, each with its part of the operation begun. The first is the decider.

    No garbage is collected meanwhile: with many hosts it would be half of the work, and come amid a cut.
    """
    from qsnap.fleet.remote import open_remote

    hosts = hosts_in_use(whole)
    operation = uuid4().hex
    over = trio.Event()

    async def hold(host: Host, *, task_status: trio.TaskStatus[Remote]) -> None:
        decider = "" if host is hosts[0] else hosts[0].name
        async with open_remote(host, order_for(order, whole, host, operation, decider), dial, progress) as remote:
            task_status.started(remote)
            await over.wait()

    with uncollected():
        async with trio.open_nursery() as nursery:  # a task for each: if one fails all are cancelled, which undoes all
            remotes = await run_all([partial(nursery.start, hold, host) for host in hosts])
            try:
                yield {host.name: remote for host, remote in zip(hosts, remotes, strict=True)}
            except BaseException:
                if remotes[0].ended:  # it may have committed: all others ask it, and nobody is told to undo
                    for remote in remotes:
                        remote.ended = True
                raise
            over.set()


def order_for(order: Order, whole: VNE, host: Host, operation: str, decider: str) -> Order:
    """What one host is told to do of an operation on several."""
    part = whole.part(host.name)
    match order:
        case RestoreOrder() if part.vms:
            return evolve(order, part=part, id=operation, decider=decider)
        case UpOrder() | RestoreOrder():  # who only keeps what is saved of others has nothing to restore
            return UpOrder(part, operation, decider)
    return evolve(order, id=operation, decider=decider)


def _ahead_s(participants: Collection[Participant]) -> float:
    """How long before a cut its moment is told, so that it is known everywhere by then."""
    if len(participants) < 2:
        return 0.0
    return AHEAD_S + SEND_S * len(participants) + max(each.round_trip_s for each in participants)


async def lead(participants: Mapping[str, Participant], phases: tuple[Phase, ...], decide: Decide) -> list[Any]:
    """Take all through the phases and the commit; what each one's commit returned.

    Where there are several, a cut has a moment, and all are told of it ahead. The first failure is raised once all that
    can be reached have undone their parts.
    """
    leading = _Leading(participants, decide, _ahead_s(participants.values()))
    state, sends = coordinator_start(phases, tuple(participants))
    while sends:
        answers: list[Answered] = [(Event.FAILED, "")]
        shield = trio.CancelScope(shield=state.stage is not Stage.PHASES)
        with suppress(trio.Cancelled), shield:  # which comes again below, when all is undone
            answers = await leading.send_all(sends, state.stage)
        sends = ()
        for event, sender in answers:
            state, more = coordinator_next(state, event, sender)
            sends += more
    await trio.lowlevel.checkpoint_if_cancelled()
    if state.stage is not Stage.COMMITTED:
        assert leading.failure is not None
        raise leading.failure
    return [leading.results[name] for name in participants if name in leading.results]


Answered = tuple[Message, str]  #: an event of the tables, and whose it is


@define
class _Leading:
    """The participants, and what they have answered."""

    participants: Mapping[str, Participant]
    decide: Decide
    ahead_s: float
    votes: dict[str, Any] = field(factory=dict)
    results: dict[str, Any] = field(factory=dict)
    outcome: Outcome | None = None
    failure: QsnapError | None = None

    async def send_all(self, sends: Sequence[Send], stage: Stage) -> list[Answered]:
        """Send all side by side; what they answered, in the order in which it came. A failed phase ends the others."""
        answers: list[Answered] = []
        at_s = steady_s() + self.ahead_s if self.ahead_s and sends[0].message in CUTS else 0.0

        async def send_one(send: Send) -> None:
            event = await self._send(send, stage, at_s)
            answers.append((event, send.to))
            if stage is Stage.PHASES and isinstance(event, Event):
                nursery.cancel_scope.cancel()

        with one_error():
            async with trio.open_nursery() as nursery:
                for send in sends:
                    nursery.start_soon(send_one, send)
        return answers

    async def _send(self, send: Send, stage: Stage, at_s: float) -> Message:
        participant = self.participants[send.to]
        try:
            return await self._deliver(send.message, send.to, participant, at_s)
        except QsnapError as error:
            if send.message is Event.ASK:
                raise
            if stage is Stage.COMMITTED:
                log.warning("it is committed, and one host has yet to learn of it: %s", error)
                return Event.LOST
            self.failure = self.failure or error
            unsure = isinstance(error, ConnectionLostError) or stage is Stage.DECIDING  # it may have failed afterwards
            return Event.LOST if unsure else Event.ABORTED

    async def _deliver(self, message: Message, name: str, participant: Participant, at_s: float) -> Message:
        match message:
            case Phase():
                self.votes[name] = await participant.perform(message, at_s)
                return message
            case Event.COMMIT:
                self.outcome = self.outcome or self.decide(list(self.votes.values()))
                self.results[name] = await participant.commit(self.outcome)
                return Event.COMMITTED
            case Event.ABORT:
                await participant.undo()
                return Event.ABORTED
        return Event.COMMITTED if await participant.inquire() else Event.ABORTED
