"""The commit tables row by row, in up to six hosts at random, and what they say of events that cannot happen."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

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
    Participant,
    Phase,
    Send,
    Stage,
    State,
    coordinator_next,
    coordinator_start,
    participant_next,
)
from tests.rules import hosts as h
from tests.rules.hosts import Result, Sent

ENOUGH = 2_000  #: steps within which any operation has ended once no more faults happen


class Hosts(RuleBasedStateMachine):
    """An operation on several hosts, with faults; after the last one all have to agree, whatever happened before."""

    @initialize(phases=st.sampled_from([START, SNAPSHOT_COLOUR, SNAPSHOT_BARRIER]), count=st.integers(2, 6))
    def begin(self, phases: tuple[Phase, ...], count: int) -> None:
        names = tuple("abcdef"[:count])
        self.hosts = {name: h.new_host(name, phases) for name in names}
        self.coordinator: Coordinator | None
        self.coordinator, sends = coordinator_start(phases, names)
        self.pending: list[Sent] = [(h.COORDINATOR, send.to, send.message) for send in sends]
        self.sent = [*self.pending]

    def send(self, messages: tuple[Sent, ...]) -> None:
        self.pending += messages
        self.sent += messages

    def take(self, result: Result) -> None:
        self.hosts[result.host.name] = result.host
        self.send(result.sent)

    def results(self, message: Sent) -> list[Result]:
        """What can follow if a message comes to a host; nothing if it cannot."""
        sender, receiver, what = message
        host = self.hosts[receiver]
        return h.react(host, what, sender) if host.up and h.can_reach(host, what) else []

    def tell_coordinator(self, event: Message, sender: str) -> None:
        if self.coordinator is not None:
            self.coordinator, sent = h.conduct(self.coordinator, event, sender)
            self.send(sent)

    def deliver(self, message: Sent, fault: int = 0) -> None:
        if message[1] == h.COORDINATOR:
            self.tell_coordinator(message[2], message[0])
        elif results := self.results(message):
            self.take(results[fault % len(results)])

    @rule(steps=st.integers(1, 20))
    def it_goes_on(self, steps: int) -> None:
        for _ in range(steps):
            self.go_on()

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), fault=st.integers(0, 4))
    def a_message_arrives_before_others(self, data: st.DataObject, fault: int) -> None:
        """At a host that may fail over it."""
        self.deliver(self.pending.pop(data.draw(st.integers(0, len(self.pending) - 1))), fault)

    @rule(data=st.data(), lost=st.booleans())
    def a_message_is_repeated_or_lost(self, data: st.DataObject, lost: bool) -> None:
        message = data.draw(st.sampled_from(self.sent))
        if not lost:
            self.deliver(message)
        elif message in self.pending:
            self.pending.remove(message)

    @rule(data=st.data(), killed=st.booleans())
    def a_host_fails(self, data: st.DataObject, killed: bool) -> None:
        host = data.draw(st.sampled_from([*self.hosts.values()]))
        if killed and host.up:
            self.hosts[host.name] = h.killed(host)
        elif events := [*h.can_suffer(host)]:
            self.take(data.draw(st.sampled_from(h.react(host, data.draw(st.sampled_from(events))))))

    @rule(data=st.data(), gone=st.booleans())
    def the_coordinator_fails(self, data: st.DataObject, gone: bool) -> None:
        if gone:
            self.coordinator = None
        else:
            event, sender = data.draw(
                st.sampled_from([(Event.FAILED, ""), *((Event.LOST, name) for name in self.hosts)])
            )
            self.tell_coordinator(event, sender)

    @invariant()
    def all_is_well(self) -> None:
        hosts = tuple(getattr(self, "hosts", {}).values())
        assert not h.check_agreement(hosts)
        assert not h.check_order(hosts)
        assert not h.check_vms(hosts)

    def teardown(self) -> None:
        """No more faults: it comes to an end, and all agree."""
        if not hasattr(self, "hosts"):
            return
        for _ in range(ENOUGH):
            if not self.go_on() and not self.notice_silence():
                break
        else:
            pytest.fail("it goes on for ever")
        self.all_is_well()
        assert not h.check_end(tuple(self.hosts.values()), self.coordinator)

    def go_on(self) -> bool:
        """The next thing that happens by itself; False if there is none."""
        for host in self.hosts.values():
            if not host.up:
                self.take(h.restart(host)[0])
                return True
            for event in h.can_do(host):
                self.take(h.react(host, event)[0])
                return True
        if self.pending:
            self.deliver(self.pending.pop(0))
            return True
        return False

    def notice_silence(self) -> bool:
        """All who wait take whom they wait for to be lost; False if nobody does anything about it."""
        before = (self.coordinator, dict(self.hosts))
        for host in [*self.hosts.values()]:
            if h.waits(host):
                self.take(h.react(host, Event.LOST)[0])
        for name in self.coordinator.waiting if self.coordinator else ():
            self.tell_coordinator(Event.LOST, name)
        return bool(self.pending) or before != (self.coordinator, self.hosts)


MACHINE = settings(max_examples=400, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])
TestHosts = Hosts.TestCase
TestHosts.settings = MACHINE


def test_the_machine_finds_a_participant_that_gives_up_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(commit.OTHER, (State.VOTED, Event.LOST), (State.ABORTED, (Action.UNDO,)))
    quick = settings(
        MACHINE,
        max_examples=20_000,  # one in a thousand finds it
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises((AssertionError, ProtocolError), match=r"(?i)committed"):
        run_state_machine_as_test(Hosts, settings=quick)


THREE = ("a", "b", "c")


def participant(state: State, *, decider: bool = False, done: int = 0) -> Participant:
    return Participant(SNAPSHOT_BARRIER, decider, state, done)


def coordinator(stage: Stage, *waiting: str, done: int = 0) -> Coordinator:
    return Coordinator(SNAPSHOT_BARRIER, THREE, frozenset(waiting), stage, done)


@pytest.mark.parametrize("decider", [False, True])
@pytest.mark.parametrize("phases", [START, SNAPSHOT_COLOUR, SNAPSHOT_BARRIER])
def test_a_participant_goes_through_its_phases_and_commits(phases: tuple[Phase, ...], decider: bool) -> None:
    at = Participant(phases, decider)
    for phase in phases:
        at, actions = participant_next(at, phase)
        assert (actions, at.phase, f"{at}") == ((Action.WORK,), phase, f"working on {phase.name}")
        assert participant_next(at, phase) == (at, ())
        at, actions = participant_next(at, Event.DONE)
        assert (actions, at.answer) == ((Action.ANSWER,), phase)
        assert participant_next(at, phase) == (at, (Action.ANSWER,))
    assert f"{at}" == "voted"
    at, actions = participant_next(at, Event.COMMIT)
    assert (actions, at.answer, at.ended) == ((Action.COMMIT, Action.ANSWER), Event.COMMITTED, True)
    late: tuple[Message, ...] = (*phases, Event.COMMIT, Event.ABORT)
    for event in late:
        assert participant_next(at, event) == (at, (Action.ANSWER,))


WORK_OR_WAIT = [(State.WORKING, 1), (State.WAITING, 1)]


@pytest.mark.parametrize("decider", [False, True])
@pytest.mark.parametrize(("state", "done"), WORK_OR_WAIT)
@pytest.mark.parametrize(
    ("event", "answers"),
    [(Event.ABORT, True), (Event.FAILED, True), (Event.LOST, False), (Event.RESTARTED, False)],
)
def test_before_the_vote_everything_that_fails_is_undone(
    state: State, done: int, event: Event, answers: bool, decider: bool
) -> None:
    at, actions = participant_next(participant(state, decider=decider, done=done), event)
    assert actions == ((Action.UNDO, Action.ANSWER) if answers else (Action.UNDO,))
    assert (at.state, at.answer, at.ended) == (State.ABORTED, Event.ABORTED, True)
    for message in (Phase.PREPARE, Phase.STOP, Event.COMMIT, Event.ABORT):
        assert participant_next(at, message) == (at, (Action.ANSWER,))


@pytest.mark.parametrize("event", [Event.LOST, Event.RESTARTED, Event.FAILED])
def test_who_has_voted_asks_and_the_decider_gives_up(event: Event) -> None:
    other, decider = participant(State.VOTED, done=4), participant(State.VOTED, decider=True, done=4)
    assert participant_next(other, event) == (other, (Action.ASK,))
    after, actions = participant_next(decider, event)
    assert (after.state, actions[0]) == (State.ABORTED, Action.UNDO)


@pytest.mark.parametrize(
    ("answer", "state", "action"),
    [(Event.COMMITTED, State.COMMITTED, Action.COMMIT), (Event.ABORTED, State.ABORTED, Action.UNDO)],
)
def test_the_answer_of_the_decider_ends_a_doubt(answer: Event, state: State, action: Action) -> None:
    after, actions = participant_next(participant(State.VOTED, done=4), answer)
    assert (after.state, actions) == (state, (action,))
    assert participant_next(after, answer) == (after, ())


@pytest.mark.parametrize("state", [state for state in State if state is not State.COMMITTED])
def test_who_asks_before_the_decision_makes_it_an_abort(state: State) -> None:
    after, actions = participant_next(participant(state, decider=True), Event.ASK)
    assert (after.state, after.answer, actions[-1]) == (State.ABORTED, Event.ABORTED, Action.ANSWER)


def test_a_decider_that_has_committed_says_so() -> None:
    at = participant(State.COMMITTED, decider=True, done=4)
    assert participant_next(at, Event.ASK) == (at, (Action.ANSWER,))
    assert at.answer is Event.COMMITTED


@pytest.mark.parametrize("event", [Event.COMMIT, Event.ABORT])
def test_what_is_unknown_is_refused(event: Event) -> None:
    after, actions = participant_next(participant(State.IDLE), event)
    assert (after.answer, actions) == (Event.ABORTED, (Action.ANSWER,))


@pytest.mark.parametrize(
    ("at", "event", "text"),
    [
        (participant(State.IDLE), Phase.STOP, "STOP cannot happen while the participant is idle"),
        (
            participant(State.WORKING, done=1),
            Event.COMMIT,
            "COMMIT cannot happen while the participant is working on STOP",
        ),
        (
            participant(State.WAITING, decider=True, done=2),
            Phase.COLLECT,
            "COLLECT cannot happen while the decider is waiting after STOP",
        ),
        (participant(State.VOTED, done=4), Event.ASK, "ASK cannot happen while the participant is voted"),
        (participant(State.ABORTED), Event.COMMITTED, "COMMITTED cannot happen while the participant is aborted"),
        (Participant(START, True), Phase.CUT, "CUT cannot happen while the decider is idle"),
    ],
)
def test_what_cannot_happen_to_a_participant_says_event_role_and_state(
    at: Participant, event: Message, text: str
) -> None:
    with pytest.raises(ProtocolError) as caught:
        participant_next(at, event)
    assert str(caught.value) == text


def to_all(message: Message, *names: str) -> tuple[Send, ...]:
    return tuple(Send(message, name) for name in names)


def test_the_coordinator_waits_for_all_and_tells_the_decider_first() -> None:
    at, sends = coordinator_start(START, THREE)
    assert (f"{at}", sends) == ("PREPARE, waiting for a, b, c", to_all(Phase.PREPARE, *THREE))
    at, sends = coordinator_next(at, Phase.PREPARE, "a")
    assert (f"{at}", sends) == ("PREPARE, waiting for b, c", ())
    assert coordinator_next(at, Phase.PREPARE, "a") == (at, ())
    at, _ = coordinator_next(at, Phase.PREPARE, "c")
    at, sends = coordinator_next(at, Phase.PREPARE, "b")
    assert (f"{at}", sends) == ("deciding, waiting for a", to_all(Event.COMMIT, "a"))
    assert coordinator_next(at, Event.LOST, "b") == (at, ())
    at, sends = coordinator_next(at, Event.COMMITTED, "a")
    assert (f"{at}", sends, at.ended) == ("committed, waiting for b, c", to_all(Event.COMMIT, "b", "c"), False)
    at, _ = coordinator_next(at, Event.COMMITTED, "c")
    at, _ = coordinator_next(at, Event.LOST, "b")
    assert (f"{at}", at.ended) == ("committed", True)


def test_the_next_phase_begins_when_all_have_done_this_one() -> None:
    at, sends = coordinator_next(coordinator(Stage.PHASES, "b"), Phase.PREPARE, "b")
    assert at == coordinator(Stage.PHASES, *THREE, done=1)
    assert sends == to_all(Phase.STOP, *THREE)
    assert coordinator_next(at, Phase.PREPARE, "b") == (at, ())


@pytest.mark.parametrize("event", [Event.ABORTED, Event.LOST])
@pytest.mark.parametrize("stage", [Stage.PHASES, Stage.DECIDING])
def test_a_failure_before_the_decision_aborts_the_others(event: Event, stage: Stage) -> None:
    after, sends = coordinator_next(coordinator(stage, "a"), event, "a")
    if (stage, event) == (Stage.DECIDING, Event.LOST):
        assert (after, sends) == (coordinator(stage, "a"), to_all(Event.ASK, "a"))
    else:
        assert (after, sends) == (coordinator(Stage.ABORTED, "b", "c"), to_all(Event.ABORT, "b", "c"))


def test_a_coordinator_that_gives_up_does_so_before_the_decision_only() -> None:
    after, sends = coordinator_next(coordinator(Stage.PHASES, "b", done=2), Event.FAILED)
    assert (after, sends) == (coordinator(Stage.ABORTED, *THREE, done=2), to_all(Event.ABORT, *THREE))
    for stage in (Stage.DECIDING, Stage.COMMITTED, Stage.ABORTED):
        assert coordinator_next(coordinator(stage, "a"), Event.FAILED) == (coordinator(stage, "a"), ())


@pytest.mark.parametrize(
    ("stage", "event"),
    [(Stage.PHASES, Event.COMMITTED), (Stage.COMMITTED, Event.ABORTED), (Stage.ABORTED, Event.COMMITTED)],
)
def test_what_cannot_happen_to_the_coordinator_says_event_sender_and_stage(stage: Stage, event: Event) -> None:
    where = "PREPARE" if stage is Stage.PHASES else stage.value
    with pytest.raises(ProtocolError) as caught:
        coordinator_next(coordinator(stage, "b", "c"), event, "b")
    assert str(caught.value) == f"{event.name} of b cannot happen while the coordinator is at {where}, waiting for b, c"
