"""The commit tables in every situation that can arise: all states of a coordinator and of two or three hosts.

The network loses, repeats and delays: what was ever sent may arrive at any later time, any number of times, or never.
Any agent is killed at any point and comes back; the coordinator is killed at any point and does not; anybody takes
anybody for lost at any time; work and commits fail. There is no bound on how much of this happens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import permutations
from typing import NamedTuple

import pytest

from qsnap.errors import ProtocolError
from qsnap.rules import commit
from qsnap.rules.commit import (
    SNAPSHOT_BARRIER,
    SNAPSHOT_COLOUR,
    START,
    Action,
    Coordinator,
    Event,
    Message,
    Phase,
    Stage,
    State,
    To,
    Turn,
    coordinator_start,
)
from tests.rules import hosts as h
from tests.rules.hosts import Host, Result, Sent

GONE = 0  #: the number of a coordinator that was killed
World = tuple[int, ...]  #: the coordinator, the hosts, and the messages as a set of bits


class Broken(AssertionError):
    """A property does not hold; the message has the states that lead there."""


class Move(NamedTuple):
    """A step of one part of the world: the message it takes, the part's next state, and the messages it sends.

    `deaf` are messages that will never again make a difference to it.
    """

    needs: int
    to: int
    sends: int
    deaf: int = 0
    error: str = ""


class Moves(NamedTuple):
    """What a part can do: `calm` are the steps without a fault, `silence` is what it does if nothing else happens."""

    every: list[Move]
    calm: list[Move]
    silence: list[Move]
    deaf: int  #: as in Move


class Model:
    """All worlds of one operation. Parts of a world are numbers, since there are many worlds and few parts.

    A killed agent comes back at once, unless it `stays_away`: to the others it is as if its messages took longer.
    With `late_phases` phases reach agents that were started later, which the tables do not stand. A `lenient` model
    passes over what cannot happen, to see what comes of it.
    """

    def __init__(
        self,
        phases: tuple[Phase, ...],
        count: int,
        *,
        stays_away: bool = False,
        late_phases: bool = False,
        lenient: bool = False,
    ) -> None:
        self.names = tuple("abc"[:count])
        self.stays_away, self.late_phases, self.lenient = stays_away, late_phases, lenient
        begun, sends = coordinator_start(phases, self.names)
        self.coordinators: list[Coordinator | None] = [None, begun]
        self.hosts = [h.new_host(name, phases) for name in self.names]
        self.messages: list[Sent] = [*self._messages(phases)]
        self.numbers: dict[object, int] = {begun: 1} | {host: number for number, host in enumerate(self.hosts)}
        self.bits = {message: 1 << number for number, message in enumerate(self.messages)}
        self.host_moves: dict[int, Moves] = {}
        self.coordinator_moves = {GONE: Moves([], [], [], deaf=self._net(self._sent_to(h.COORDINATOR)))}
        net = self._net((h.COORDINATOR, send.to, send.message) for send in sends)
        self.start: World = (1, *range(count), net)

    def _messages(self, phases: tuple[Phase, ...]) -> Iterator[Sent]:
        every: list[Message] = [*phases, Event.COMMIT, Event.ABORT, Event.ASK, Event.COMMITTED, Event.ABORTED]
        for sender, receiver in permutations((h.COORDINATOR, *self.names), 2):
            yield from ((sender, receiver, message) for message in every)

    def _sent_to(self, name: str) -> Iterator[Sent]:
        return (message for message in self.messages if message[1] == name)

    def _net(self, sent: Iterable[Sent]) -> int:
        net = 0
        for message in sent:
            net |= self.bits[message]
        return net

    def _number_of_host(self, host: Host) -> int:
        if host not in self.numbers:
            self.numbers[host] = len(self.hosts)
            self.hosts.append(host)
        return self.numbers[host]

    def _number_of_coordinator(self, coordinator: Coordinator) -> int:
        if coordinator not in self.numbers:
            self.numbers[coordinator] = len(self.coordinators)
            self.coordinators.append(coordinator)
        return self.numbers[coordinator]

    def moves_of_host(self, number: int) -> Moves:
        """What a host can do in any world."""
        if number not in self.host_moves:
            self.host_moves[number] = self._find_host_moves(self.hosts[number])
        return self.host_moves[number]

    def _find_host_moves(self, host: Host) -> Moves:
        deaf = self._deaf_host(host)
        if not host.up:
            again = self._moves(partial(h.restart, host))
            return Moves(again, again[:1], [], deaf)
        found = Moves(self._moves(lambda: [Result(h.killed(host))]), [], [], deaf)
        for message in self._sent_to(host.name):
            if not deaf & self.bits[message]:
                taken = self._moves(partial(h.react, host, message[2], message[0]), self.bits[message])
                found.every.extend(taken)
                found.calm.extend(taken[:1])
        for event in h.can_do(host):
            done = self._moves(partial(h.react, host, event))
            found.every.extend(done)
            found.calm.extend(done[:1])
        for event in h.can_suffer(host):
            found.every.extend(self._moves(partial(h.react, host, event)))
        if h.waits(host):
            found.silence.extend(self._moves(partial(h.react, host, Event.LOST))[:1])
        return found

    def _deaf_host(self, host: Host) -> int:
        return self._net(m for m in self._sent_to(host.name) if not (self.late_phases or h.can_reach(host, m[2])))

    def _moves(self, find: Callable[[], list[Result]], needs: int = 0) -> list[Move]:
        try:
            results = find() if self.stays_away else brought_back(find())
        except ProtocolError as error:
            return [Move(needs, 0, 0, error=str(error))]
        return [
            Move(needs, self._number_of_host(result.host), self._net(result.sent), self._deaf_host(result.host))
            for result in results
        ]

    def moves_of_coordinator(self, number: int) -> Moves:
        """What the coordinator can do in any world."""
        if number not in self.coordinator_moves:
            coordinator = self.coordinators[number]
            assert coordinator is not None
            self.coordinator_moves[number] = self._find_coordinator_moves(coordinator)
        return self.coordinator_moves[number]

    def _find_coordinator_moves(self, coordinator: Coordinator) -> Moves:
        def move(event: Message, sender: str = "", needs: int = 0) -> Move:
            try:
                after, sent = h.conduct(coordinator, event, sender)
            except ProtocolError as error:
                return Move(needs, 0, 0, error=str(error))
            return Move(needs, self._number_of_coordinator(after), self._net(sent), self._deaf_coordinator(after))

        hears = self._sent_to(h.COORDINATOR)
        calm = [move(message[2], message[0], self.bits[message]) for message in hears]
        lost = {name: move(Event.LOST, name) for name in self.names}
        killed = Move(0, GONE, 0, self.coordinator_moves[GONE].deaf)
        every = [killed, move(Event.FAILED), *lost.values(), *calm]
        silence = [lost[name] for name in sorted(coordinator.waiting)]
        return Moves(every, calm, silence, self._deaf_coordinator(coordinator))

    def _deaf_coordinator(self, coordinator: Coordinator) -> int:
        awaited = coordinator.phases[coordinator.done :] if coordinator.stage is Stage.PHASES else ()
        return self._net(
            message
            for message in self._sent_to(h.COORDINATOR)
            if coordinator.ended or (isinstance(message[2], Phase) and message[2] not in awaited)
        )

    def parts(self, world: World) -> list[tuple[int, Moves]]:
        """The place of each part in a world, and what it can do."""
        hosts = [(place, self.moves_of_host(world[place])) for place in range(1, len(world) - 1)]
        return [(0, self.moves_of_coordinator(world[0])), *hosts]

    def faulty_steps(self, world: World) -> Iterator[World]:
        """Whatever can happen next. What is sent stays in the network for as long as it can make a difference."""
        net, parts = world[-1], self.parts(world)
        for place, moves in parts:
            before, after, deaf = world[:place], world[place + 1 : -1], 0
            for another, others in parts:
                if another != place:
                    deaf |= others.deaf
            for needs, to, sends, now_deaf, error in moves.every:
                if needs & net == needs:
                    if error and self._is_illegal(error):
                        continue
                    yield (*before, to, *after, (net | sends & ~deaf) & ~now_deaf)

    def calm_steps(self, world: World) -> list[World]:
        """What happens next if no fault happens any more: silence is noticed when there is nothing else to do."""
        steps = [*self._calm(world, lambda moves: moves.calm)]
        return steps or [step for step in self._calm(world, lambda moves: moves.silence) if step != world]

    def _calm(self, world: World, chosen: Callable[[Moves], list[Move]]) -> Iterator[World]:
        net = world[-1]
        for place, moves in self.parts(world):
            for needs, to, sends, _, error in chosen(moves):
                if needs & net == needs:
                    if error and self._is_illegal(error):
                        continue
                    yield (*world[:place], to, *world[place + 1 : -1], net & ~needs | sends)

    def _is_illegal(self, error: str) -> bool:
        if not self.lenient:
            raise Broken(f"legal: {error}")
        return True

    def hosts_of(self, world: World) -> tuple[Host, ...]:
        return tuple(self.hosts[number] for number in world[1:-1])

    def text(self, world: World) -> str:
        coordinator = self.coordinators[world[0]]
        return f"coordinator {coordinator or 'gone'}; " + "; ".join(map(str, self.hosts_of(world)))


def brought_back(results: list[Result]) -> list[Result]:
    """The same, with the agents that were killed started again, however often they are killed in that, too."""
    found: dict[Result, None] = {}
    todo = [*results]
    for result in todo:
        if result.host.up:
            found[result] = None
        else:
            again = [Result(r.host, tuple(dict.fromkeys((*result.sent, *r.sent)))) for r in h.restart(result.host)]
            todo += [r for r in again if r not in todo]
    return [*found]


def explore(model: Model) -> dict[World, World]:
    """All worlds that can be reached, each with the one it was reached from. Raises Broken at the first wrong one."""
    reached, todo, looked_at = {model.start: model.start}, deque([model.start]), set()
    while todo:
        world = todo.popleft()
        try:
            if world[1:-1] not in looked_at:
                looked_at.add(world[1:-1])
                check_world(model, world)
            for following in model.faulty_steps(world):
                if following not in reached:
                    reached[following] = world
                    todo.append(following)
        except Broken as error:
            raise Broken(f"{error}\n" + "\n".join(path(model, reached, world))) from None
    return reached


def check_world(model: Model, world: World) -> None:
    hosts = model.hosts_of(world)
    for name, check in (("agreement", h.check_agreement), ("order", h.check_order), ("vms", h.check_vms)):
        if wrong := check(hosts):
            raise Broken(f"{name}: {wrong}")


def path(model: Model, reached: dict[World, World], world: World) -> list[str]:
    texts = [model.text(world)]
    while reached[world] != world:
        world = reached[world]
        texts.append(model.text(world))
    return texts[::-1]


def check_ends(model: Model, starts: Iterable[World], wrong_end: Callable[[World], str]) -> int:
    """Check that without faults every path from `starts` ends, and well. Returns the number of worlds on them."""
    following: dict[World, list[World]] = {}
    sources: dict[World, list[World]] = {}
    todo = [*starts]
    while todo:
        world = todo.pop()
        if world in following:
            continue
        following[world] = model.calm_steps(world)
        for another in following[world]:
            sources.setdefault(another, []).append(world)
        todo += following[world]
    left = {world: len(steps) for world, steps in following.items()}
    ended = [world for world, steps in left.items() if not steps]
    for world in ended:
        if wrong := wrong_end(world):
            raise Broken(f"end: {wrong}\n{model.text(world)}")
    while ended:
        for source in sources.get(ended.pop(), ()):
            left[source] -= 1
            if not left[source]:
                ended.append(source)
    if going_round := [world for world, steps in left.items() if steps]:
        raise Broken(f"end: it goes on for ever\n{model.text(going_round[0])}")
    return len(following)


def prove(model: Model) -> tuple[int, int]:
    """Check all properties; returns the number of worlds with faults, and of those on paths without."""

    def wrong_end(world: World) -> str:
        return h.check_end(model.hosts_of(world), model.coordinators[world[0]])

    def not_committed(world: World) -> str:
        states = {host.participant.state for host in model.hosts_of(world)}
        return wrong_end(world) or ("" if states == {State.COMMITTED} else "nothing failed, and it is not committed")

    check_ends(model, [model.start], not_committed)
    reached = explore(model)
    calm = check_ends(model, {(*world[:-1], 0) for world in reached}, wrong_end)
    return len(reached), calm


OPERATIONS = [START, SNAPSHOT_COLOUR, SNAPSHOT_BARRIER]


@pytest.mark.parametrize("phases", OPERATIONS, ids=["start", "colour", "barrier"])
@pytest.mark.parametrize(("count", "least"), [(2, 3_000), (3, 150_000)])
def test_all_hosts_come_to_one_outcome_and_all_vms_run(phases: tuple[Phase, ...], count: int, least: int) -> None:
    worlds, calm = prove(Model(phases, count))
    assert worlds >= least, f"only {worlds} states were reached, and {calm} after the last fault"


def test_an_agent_that_stays_away_is_as_good_as_a_slow_one() -> None:
    """Which makes the worlds few enough to look at all of them."""
    at_once, later = Model(SNAPSHOT_BARRIER, 2), Model(SNAPSHOT_BARRIER, 2, stays_away=True)
    prove(later)

    def described(model: Model) -> set[tuple[object, ...]]:
        worlds = ((model.coordinators[world[0]], model.hosts_of(world), world[-1]) for world in explore(model))
        return {(coordinator, hosts, net) for coordinator, hosts, net in worlds if all(host.up for host in hosts)}

    assert described(at_once) == described(later)


def test_the_tables_need_phases_that_come_over_the_first_connection_only() -> None:
    with pytest.raises(Broken, match="agreement: "):
        prove(Model(START, 2, late_phases=True, lenient=True))


GIVEN_UP = (State.ABORTED, (Action.UNDO,))
MUTANTS = {
    "a participant that gives up in doubt": (
        [(commit.OTHER, (State.VOTED, Event.LOST), GIVEN_UP)],
        "agreement: ",
    ),
    "one that gives up what it voted for when it is started again": (
        [(commit.OTHER, (State.VOTED, Event.RESTARTED), GIVEN_UP)],
        "agreement: ",
    ),
    "one that commits because the coordinator is gone": (
        [(commit.OTHER, (State.VOTED, Event.LOST), (State.COMMITTED, (Action.COMMIT,)))],
        "agreement: ",
    ),
    "a decider that says aborted and goes on": (
        [(commit.DECIDER, (State.IDLE, Event.ASK), (State.IDLE, (Action.ANSWER,)))],
        "agreement: ",
    ),
    "a decider that says committed before it has recorded it": (
        [(commit.DECIDER, (State.VOTED, Event.COMMIT), (State.COMMITTED, (Action.ANSWER, Action.COMMIT)))],
        "agreement: ",
    ),
    "a coordinator that tells the others together with the decider": (
        [(commit.COORDINATOR, (Stage.PHASES, Turn.ALL_VOTED), (Stage.COMMITTED, Event.COMMIT, To.ALL))],
        "agreement: ",
    ),
    "a coordinator that takes a silent decider for one that has aborted": (
        [(commit.COORDINATOR, (Stage.DECIDING, Event.LOST), (Stage.ABORTED, Event.ABORT, To.REST))],
        "agreement: ",
    ),
    "a participant that takes a repeated message for the next one": (
        [(commit.OTHER, (State.WAITING, Turn.AGAIN), (State.WORKING, (Action.WORK,)))],
        "order: ",
    ),
    "a participant that gives up and lets no VM run": (
        [(commit.OTHER, (State.WORKING, Event.LOST), (State.ABORTED, ()))],
        "vms: a VM is paused",
    ),
    "one that gives up and undoes nothing": (
        [(commit.OTHER, (State.WAITING, Event.LOST), (State.ABORTED, ()))],
        "end: something is left behind",
    ),
    "one that was killed in undoing and leaves it at that": (
        [(commit.OTHER, (State.ABORTED, Event.RESTARTED), (State.ABORTED, ()))],
        "vms: a VM is paused",
    ),
    "a participant in doubt that does not ask": (
        [(commit.OTHER, (State.VOTED, Event.LOST), (State.VOTED, ()))],
        "end: one never learns the outcome",
    ),
    "a decider that waits for a coordinator": (
        [(commit.DECIDER, (State.VOTED, Event.LOST), (State.VOTED, ()))],
        "end: one never learns the outcome",
    ),
    "a decider that does not answer": (
        [(commit.DECIDER, (State.ABORTED, Event.ASK), (State.ABORTED, ()))],
        "end: it goes on for ever",
    ),
    "a coordinator that does not ask": (
        [(commit.COORDINATOR, (Stage.DECIDING, Event.LOST), (Stage.DECIDING, None, To.NOBODY))],
        "end: the coordinator waits for ever",
    ),
    "a coordinator that says the contrary": (
        [(commit.COORDINATOR, (Stage.DECIDING, Event.COMMITTED), (Stage.ABORTED, None, To.NOBODY))],
        "end: the coordinator reports another outcome",
    ),
    "a decider that never commits": (
        [(commit.DECIDER, (State.VOTED, Event.COMMIT), (State.ABORTED, (Action.UNDO, Action.ANSWER)))],
        "end: nothing failed, and it is not committed",
    ),
    "a table that lacks an answer to a question of before": (
        [(commit.OTHER, (State.IDLE, Event.ABORTED), None)],
        "legal: ABORTED cannot happen while the participant is idle",
    ),
}


@pytest.mark.parametrize(("changes", "broken"), MUTANTS.values(), ids=MUTANTS)
def test_wrong_tables_are_found(
    changes: list[tuple[dict[object, object], object, object]], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows, key, row in changes:
        assert key in rows
        if row is None:
            monkeypatch.delitem(rows, key)
        else:
            monkeypatch.setitem(rows, key, row)
    with pytest.raises(Broken, match=f"^{broken}"):
        prove_all(lenient=not broken.startswith("legal"))


def prove_all(*, lenient: bool) -> None:
    for phases in OPERATIONS:
        prove(Model(phases, 2, lenient=lenient))
