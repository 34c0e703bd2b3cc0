"""An agent's part of an operation, with work that stands for a host's: what it answers, whatever is said to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import define, evolve, field
from trio.testing import MockClock, memory_stream_pair

import qsnap
from qsnap.errors import QsnapError
from qsnap.fleet.agent import Agent
from qsnap.fleet.channel import Connection
from qsnap.fleet.identity import Peer
from qsnap.fleet.part import DEAD_MAN_S
from qsnap.fleet.participants import Order
from qsnap.fleet.remote import Remote
from qsnap.host.place import Place, Progress, no_progress
from qsnap.model import Cut, Host, Outcome, SnapshotOrder
from qsnap.rules.commit import Phase
from qsnap.wire import messages as m

COLOUR = SnapshotOrder("lab", "one", id="1")
BARRIER = SnapshotOrder("lab", "one", cut=Cut.BARRIER, id="1")
COMMIT = m.Commit(Outcome(7.0, 0.5))


@define
class Work:
    """What a host does."""

    done: list[str] = field(factory=list)
    slow: str = ""
    round_trip_s: float = 0.0
    times: list[float] = field(factory=list)

    async def perform(self, phase: Phase, at_s: float = 0.0) -> Any:
        self.times.append(at_s)
        if phase.value == self.slow:
            await trio.sleep_forever()
        self.done.append(phase.value)

    async def commit(self, outcome: Outcome) -> Any:
        self.done.append("commit")

    async def undo(self) -> None:
        self.done.append("undo")

    async def inquire(self) -> Outcome | None:
        raise AssertionError


@asynccontextmanager
async def agent(work: Work, tmp_path: Path) -> AsyncIterator[Connection]:
    """A connection to an agent that does this work."""

    @asynccontextmanager
    async def open_work(order: Order, place: Place, progress: Progress) -> AsyncIterator[Work]:
        yield work

    ours, theirs = memory_stream_pair()
    coordinator, at_agent = Connection(ours, Peer("alpha")), Connection(theirs, Peer("initiator"))
    serving = Agent(qsnap.Place(tmp_path / "run", tmp_path / "store"), open_part=open_work)
    async with trio.open_nursery() as nursery:
        serving.nursery = nursery
        for task in coordinator.run, at_agent.run:
            nursery.start_soon(task)
        nursery.start_soon(serving.handle, at_agent)
        try:
            yield coordinator
        finally:
            nursery.cancel_scope.cancel()
            coordinator.end()
            at_agent.end()


async def say(connection: Connection, messages: Sequence[m.Message]) -> list[str]:
    """Say all of this at once, and return the names of as many answers."""
    for message in messages:
        await connection.send(message)
    answers = []
    with trio.fail_after(5):
        for _ in messages:
            try:
                answers.append(type(await connection.receive()).__name__)
            except QsnapError as error:
                answers.append(type(error).__name__)
    return answers


async def begin(connection: Connection, order: SnapshotOrder, *phases: str) -> None:
    """Begin an operation, and have these phases done."""
    assert await say(connection, [m.Begin.of(order)]) == ["Begun"]
    for phase in phases:
        assert await say(connection, [m.Perform(phase)]) == ["Performed"]


async def test_a_commit_that_is_sent_again_is_answered_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    work = Work()
    async with agent(work, tmp_path) as connection:
        await begin(connection, COLOUR, "prepare", "cut", "collect")
        answers = await say(connection, [COMMIT, COMMIT, COMMIT])
        assert answers[0] == "Committed"
        assert set(answers[1:]) <= {"Committed", "StateError"}  # by then there may be no operation any more
        assert work.done == ["prepare", "cut", "collect", "commit"]


async def test_a_commit_before_the_vote_is_refused_and_undoes(tmp_path: Path, autojump_clock: MockClock) -> None:
    work = Work()
    async with agent(work, tmp_path) as connection:
        await begin(connection, COLOUR, "prepare")
        assert await say(connection, [COMMIT]) == ["ProtocolError"]
        assert await say(connection, [COMMIT, m.Undo()]) == ["StateError", "Undone"]
        assert "commit" not in work.done


async def test_an_undo_that_is_sent_again_is_answered_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    work = Work(slow="cut")
    async with agent(work, tmp_path) as connection:
        await begin(connection, COLOUR, "prepare")
        await connection.send(m.Perform("cut"))
        assert await say(connection, [m.Undo(), m.Undo(), m.Undo()]) == ["Undone"] * 3
        assert work.done == ["prepare", "undo"]


async def test_a_phase_that_is_sent_again_is_not_done_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    work = Work()
    async with agent(work, tmp_path) as connection:
        await begin(connection, COLOUR, "prepare")
        assert await say(connection, [m.Perform("prepare")]) == ["Performed"]
        assert await say(connection, [m.Perform("cut")]) == ["Performed"]
        assert work.done == ["prepare", "cut"]


async def test_the_time_of_a_cut_is_passed_on(tmp_path: Path, autojump_clock: MockClock) -> None:
    work = Work()
    async with agent(work, tmp_path) as connection:
        await begin(connection, COLOUR, "prepare")
        assert await say(connection, [m.PerformAt("cut", 5.5)]) == ["Performed"]
        assert work.times == [0.0, 5.5]


@pytest.mark.parametrize(("capabilities", "at_s"), [({"appointment"}, 8.0), (set(), 0.0)])
async def test_the_time_of_a_cut_is_told_on_the_clock_of_the_host(
    capabilities: set[str], at_s: float, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """And not at all to one that does not know of such times yet."""
    work = Work()
    async with agent(work, tmp_path) as connection:
        connection.capabilities = frozenset(capabilities)
        await begin(connection, COLOUR, "prepare")
        order, host = evolve(COLOUR, clock_offset_s=2.0), Host("alpha", "127.0.0.1", 7907, "127.0.0.1")
        remote = Remote(host, order, _never, connection, no_progress)
        await remote.perform(Phase.CUT, 10.0)
        assert work.times[-1] == at_s


def _never(host: Host) -> AbstractAsyncContextManager[Connection]:
    raise AssertionError


async def test_a_coordinator_that_is_silent_at_a_barrier(tmp_path: Path, autojump_clock: MockClock) -> None:
    work = Work()
    async with agent(work, tmp_path) as connection:
        await begin(connection, BARRIER, "prepare", "stop")
        await trio.sleep(DEAD_MAN_S - 0.1)
        assert work.done == ["prepare", "stop"]
        await trio.sleep(0.2)
        assert work.done == ["prepare", "stop", "undo"]
        assert await say(connection, [m.Perform("resume")]) == ["StateError"]


async def test_what_does_not_belong_here_undoes_the_part(tmp_path: Path, autojump_clock: MockClock) -> None:
    work = Work()
    async with agent(work, tmp_path) as connection:
        await begin(connection, COLOUR, "prepare", "cut", "collect")
        assert await say(connection, [m.Ask("lab", "1", "one")]) == ["ProtocolError"]
        assert work.done == ["prepare", "cut", "collect", "undo"]


@pytest.mark.parametrize("order", [SnapshotOrder("lab", "one"), SnapshotOrder("lab", "one", decider="beta")])
async def test_an_operation_needs_an_id(order: SnapshotOrder, tmp_path: Path, autojump_clock: MockClock) -> None:
    async with agent(Work(), tmp_path) as connection:
        assert await say(connection, [m.Begin.of(order)]) == ["StateError"]
