"""One outcome for an operation on several hosts: the transition tables of the two-phase commit.

The *coordinator* leads all *participants*, one per host, through the phases of an operation. Who has done the last one
has *voted*. The first participant is the *decider*: its commit is the commit of the whole, and is recorded before
anybody else is told (Gray and Lamport, Consensus on Transaction Commit, 2006, section 2; here the record is with a
participant, and not with the coordinator, which may go and never come back). Who has voted and hears nothing asks it.

`participant_next` and `coordinator_next` take an event and return the value to go on with, and what has to be done, in
this order. `tests/rules/test_commit_model.py` goes through all that can happen. It holds if the callers keep to this:

- A participant takes one event at a time. Phases are worked on beside that; UNDO ends such work first.
- A participant that works or has voted is in a journal before it works, and before it answers; what it voted for is
  durable by then.
- COMMIT writes the record by which it is committed, which has the operation's own id. It has failed only where there is
  no such record: FAILED is the next event then, of the participant as it was before.
- Who has aborted takes no more phases of the operation. An agent that is started again knows of none that has ended
  without a record: it is idle, and the answer of a decider is that it has aborted.
- The coordinator has connections to all before the first phase. Phases come over these only, so that none reaches an
  agent which was started later. The other messages may be lost, repeated, late, and come over any connection.
- What cannot be sent is LOST.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Literal

from attrs import evolve, frozen

from qsnap.errors import ProtocolError


class Phase(Enum):
    """A part of an operation that all participants have done before any begins the next; as an answer: it is done."""

    PREPARE = "prepare"
    CUT = "cut"  #: stop, and resume as soon as the VM's own state is safe
    STOP = "stop"
    RESUME = "resume"
    COLLECT = "collect"  #: all files of the part are complete and synced


CUTS = (Phase.CUT, Phase.STOP)  #: what all are to begin at one moment
START = (Phase.PREPARE,)  #: up and restore: the VMs are there
SNAPSHOT_COLOUR = (Phase.PREPARE, Phase.CUT, Phase.COLLECT)
SNAPSHOT_BARRIER = (Phase.PREPARE, Phase.STOP, Phase.RESUME, Phase.COLLECT)


class Event(Enum):
    """What happens to a participant or to the coordinator, beside phases."""

    COMMIT = "commit"  #: message of the coordinator
    ABORT = "abort"  #: message of the coordinator
    ASK = "ask"  #: message to the decider: what became of it?
    COMMITTED = "committed"  #: answer
    ABORTED = "aborted"  #: answer, also of a participant that has failed, or does not know the operation
    DONE = "done"  #: the participant's work on the phase has succeeded
    FAILED = "failed"  #: its own work has failed; of the coordinator: it gives up (Ctrl-C)
    LOST = "lost"  #: the coordinator, or this participant, is silent or cannot be reached
    RESTARTED = "restarted"  #: the agent's process was killed, and its successor has found this in the journal


Message = Phase | Event  #: what is sent: a phase, or one of the first five events


class Action(Enum):
    """What a participant has to do."""

    WORK = "work"  #: begin to work on `phase`, which ends with the event DONE or FAILED
    UNDO = "undo"  #: end that work and undo all phases; if it is interrupted it is done again
    COMMIT = "commit"  #: record that it is committed, and finish; if that is interrupted it is done again
    ANSWER = "answer"  #: send `answer` to whom the message came from; to the coordinator if it was none
    ASK = "ask"  #: ask the decider, and again until it has answered


class State(Enum):
    """Where a participant stands."""

    IDLE = "idle"  #: it knows nothing of the operation
    WORKING = "working"
    WAITING = "waiting"  #: for the next phase
    VOTED = "voted"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Turn(Enum):
    """What a phase, or the end of one, means at this moment: the tables have this in its place."""

    NEXT = auto()  #: the phase that comes next
    AGAIN = auto()  #: to a participant: it was done, is being worked on, or the operation has ended
    LAST_DONE = auto()  #: by a participant: its work on the last phase has succeeded
    SOME_DONE = auto()  #: by some participants: this phase
    ALL_DONE = auto()  #: by all participants: this phase
    ALL_VOTED = auto()  #: by all participants: the last phase


Signal = Event | Turn
Rows = dict[tuple[State, Signal], tuple[State, tuple[Action, ...]]]

_GIVEN_UP = (State.ABORTED, (Action.UNDO,))
_GIVEN_UP_ANSWERED = (State.ABORTED, (Action.UNDO, Action.ANSWER))
_IN_DOUBT = (State.VOTED, (Action.ASK,))

_EVERYBODY: Rows = {
    (State.IDLE, Turn.NEXT): (State.WORKING, (Action.WORK,)),
    (State.IDLE, Event.COMMIT): (State.ABORTED, (Action.ANSWER,)),
    (State.IDLE, Event.ABORT): (State.ABORTED, (Action.ANSWER,)),
    (State.IDLE, Event.LOST): (State.IDLE, ()),
    (State.WORKING, Turn.AGAIN): (State.WORKING, ()),
    (State.WORKING, Event.DONE): (State.WAITING, (Action.ANSWER,)),
    (State.WORKING, Turn.LAST_DONE): (State.VOTED, (Action.ANSWER,)),
    (State.WORKING, Event.FAILED): _GIVEN_UP_ANSWERED,
    (State.WORKING, Event.ABORT): _GIVEN_UP_ANSWERED,
    (State.WORKING, Event.LOST): _GIVEN_UP,
    (State.WORKING, Event.RESTARTED): _GIVEN_UP,
    (State.WAITING, Turn.NEXT): (State.WORKING, (Action.WORK,)),
    (State.WAITING, Turn.AGAIN): (State.WAITING, (Action.ANSWER,)),
    (State.WAITING, Event.FAILED): _GIVEN_UP_ANSWERED,
    (State.WAITING, Event.ABORT): _GIVEN_UP_ANSWERED,
    (State.WAITING, Event.LOST): _GIVEN_UP,
    (State.WAITING, Event.RESTARTED): _GIVEN_UP,
    (State.VOTED, Turn.AGAIN): (State.VOTED, (Action.ANSWER,)),
    (State.VOTED, Event.COMMIT): (State.COMMITTED, (Action.COMMIT, Action.ANSWER)),
    (State.VOTED, Event.ABORT): _GIVEN_UP_ANSWERED,
    (State.COMMITTED, Turn.AGAIN): (State.COMMITTED, (Action.ANSWER,)),
    (State.COMMITTED, Event.COMMIT): (State.COMMITTED, (Action.ANSWER,)),
    (State.COMMITTED, Event.ABORT): (State.COMMITTED, (Action.ANSWER,)),
    (State.COMMITTED, Event.LOST): (State.COMMITTED, ()),
    (State.COMMITTED, Event.RESTARTED): (State.COMMITTED, (Action.COMMIT,)),
    (State.ABORTED, Turn.AGAIN): (State.ABORTED, (Action.ANSWER,)),
    (State.ABORTED, Event.COMMIT): (State.ABORTED, (Action.ANSWER,)),
    (State.ABORTED, Event.ABORT): (State.ABORTED, (Action.ANSWER,)),
    (State.ABORTED, Event.LOST): (State.ABORTED, ()),
    (State.ABORTED, Event.RESTARTED): _GIVEN_UP,
}

DECIDER: Rows = _EVERYBODY | {
    (State.IDLE, Event.ASK): (State.ABORTED, (Action.ANSWER,)),  # and not IDLE: PREPARE may be under way to it
    (State.WORKING, Event.ASK): _GIVEN_UP_ANSWERED,
    (State.WAITING, Event.ASK): _GIVEN_UP_ANSWERED,
    (State.VOTED, Event.ASK): _GIVEN_UP_ANSWERED,
    (State.VOTED, Event.FAILED): _GIVEN_UP_ANSWERED,
    (State.VOTED, Event.LOST): _GIVEN_UP,
    (State.VOTED, Event.RESTARTED): _GIVEN_UP,
    (State.COMMITTED, Event.ASK): (State.COMMITTED, (Action.ANSWER,)),
    (State.ABORTED, Event.ASK): (State.ABORTED, (Action.ANSWER,)),
}

OTHER: Rows = _EVERYBODY | {
    (State.IDLE, Event.ABORTED): (State.IDLE, ()),  # it asked, aborted, and was killed: the answer comes again
    (State.VOTED, Event.FAILED): _IN_DOUBT,  # it could not commit, and tries again when the answer has come
    (State.VOTED, Event.LOST): _IN_DOUBT,
    (State.VOTED, Event.RESTARTED): _IN_DOUBT,
    (State.VOTED, Event.COMMITTED): (State.COMMITTED, (Action.COMMIT,)),
    (State.VOTED, Event.ABORTED): _GIVEN_UP,
    (State.COMMITTED, Event.COMMITTED): (State.COMMITTED, ()),
    (State.ABORTED, Event.ABORTED): (State.ABORTED, ()),
}


@frozen
class Participant:
    """One host's part in an operation: where it stands, and how many of the phases it has done.

    For a participant that has RESTARTED it is made of what the journal, or the record of the commit, says.
    """

    phases: tuple[Phase, ...]
    decider: bool
    state: State = State.IDLE
    done: int = 0

    @property
    def phase(self) -> Phase:
        """The phase that a participant in WORKING is to do."""
        return self.phases[self.done]

    @property
    def answer(self) -> Message:
        """What it says of itself: the outcome, or the last phase that it has done."""
        if self.state in (State.WAITING, State.VOTED):
            return self.phases[self.done - 1]
        return Event.COMMITTED if self.state is State.COMMITTED else Event.ABORTED

    @property
    def ended(self) -> bool:
        """Whether it knows the outcome."""
        return self.state in (State.COMMITTED, State.ABORTED)

    def __str__(self) -> str:
        if self.state is State.WORKING:
            return f"working on {self.phase.name}"
        if self.state is State.WAITING:
            return f"waiting after {self.phases[self.done - 1].name}"
        return str(self.state.value)


def participant_next(before: Participant, event: Message) -> tuple[Participant, tuple[Action, ...]]:
    """The participant after `event`, and what it has to do. Raises ProtocolError for what cannot happen to it."""
    signal = _signal_to(before, event)
    rows = DECIDER if before.decider else OTHER
    if signal is None or (before.state, signal) not in rows:
        raise _illegal(event, f"the {'decider' if before.decider else 'participant'} is {before}")
    state, actions = rows[before.state, signal]
    return evolve(before, state=state, done=before.done + (event is Event.DONE)), actions


def _signal_to(participant: Participant, event: Message) -> Signal | None:
    phases, done = participant.phases, participant.done
    if isinstance(event, Event):
        return Turn.LAST_DONE if event is Event.DONE and done + 1 == len(phases) else event
    if participant.ended or event in phases[: done + (participant.state is State.WORKING)]:
        return Turn.AGAIN
    return Turn.NEXT if event in phases[done : done + 1] else None


class Stage(Enum):
    """How far the coordinator is."""

    PHASES = "phases"
    DECIDING = "deciding"  #: from the COMMIT to the decider on, until it is known what became of that
    COMMITTED = "committed"
    ABORTED = "aborted"


class To(Enum):
    """Whom the coordinator sends a message to, and then waits for."""

    ALL = auto()
    DECIDER = auto()
    REST = auto()  #: all but the one whose message this is about
    NOBODY = auto()  #: it goes on waiting, but no more for the one whose message this is about


_NOTED = (None, To.NOBODY)

COORDINATOR: dict[tuple[Stage, Signal], tuple[Stage, Event | Literal[Turn.NEXT] | None, To]] = {
    (Stage.PHASES, Turn.SOME_DONE): (Stage.PHASES, *_NOTED),
    (Stage.PHASES, Turn.ALL_DONE): (Stage.PHASES, Turn.NEXT, To.ALL),
    (Stage.PHASES, Turn.ALL_VOTED): (Stage.DECIDING, Event.COMMIT, To.DECIDER),
    (Stage.PHASES, Event.ABORTED): (Stage.ABORTED, Event.ABORT, To.REST),
    (Stage.PHASES, Event.FAILED): (Stage.ABORTED, Event.ABORT, To.REST),
    (Stage.PHASES, Event.LOST): (Stage.ABORTED, Event.ABORT, To.REST),
    (Stage.DECIDING, Event.COMMITTED): (Stage.COMMITTED, Event.COMMIT, To.REST),
    (Stage.DECIDING, Event.ABORTED): (Stage.ABORTED, Event.ABORT, To.REST),
    (Stage.DECIDING, Event.LOST): (Stage.DECIDING, Event.ASK, To.DECIDER),
    (Stage.COMMITTED, Event.COMMITTED): (Stage.COMMITTED, *_NOTED),
    (Stage.COMMITTED, Event.FAILED): (Stage.COMMITTED, *_NOTED),
    (Stage.COMMITTED, Event.LOST): (Stage.COMMITTED, *_NOTED),
    (Stage.ABORTED, Event.ABORTED): (Stage.ABORTED, *_NOTED),
    (Stage.ABORTED, Event.FAILED): (Stage.ABORTED, *_NOTED),
    (Stage.ABORTED, Event.LOST): (Stage.ABORTED, *_NOTED),
}


@frozen
class Send:
    """A message that the coordinator has to send."""

    message: Message
    to: str


@frozen
class Coordinator:
    """Who leads an operation: its participants, the decider first, and those that it waits for.

    In the stages COMMITTED and ABORTED these have not said yet that they know.
    """

    phases: tuple[Phase, ...]
    participants: tuple[str, ...]
    waiting: frozenset[str]
    stage: Stage = Stage.PHASES
    done: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing is left to be done. A participant that was lost finds out by itself."""
        return self.stage in (Stage.COMMITTED, Stage.ABORTED) and not self.waiting

    def __str__(self) -> str:
        where = self.phases[self.done].name if self.stage is Stage.PHASES else self.stage.value
        names = [name for name in self.participants if name in self.waiting]
        return f"{where}, waiting for {', '.join(names)}" if names else where


def coordinator_start(phases: tuple[Phase, ...], participants: tuple[str, ...]) -> tuple[Coordinator, tuple[Send, ...]]:
    """The coordinator of an operation that begins, and what it has to send. The first participant is the decider."""
    begun = Coordinator(phases, participants, frozenset(participants))
    return begun, tuple(Send(phases[0], name) for name in participants)


def coordinator_next(before: Coordinator, event: Message, sender: str = "") -> tuple[Coordinator, tuple[Send, ...]]:
    """The coordinator after what `sender` has answered, or LOST of it; and what it has to send, in this order.

    Without a sender the event is its own FAILED. Raises ProtocolError for what no participant can have to say.
    """
    signal = _signal_from(before, event, sender)
    if signal is None:
        return before, ()
    if (before.stage, signal) not in COORDINATOR:
        raise _illegal(event, f"the coordinator is at {before}", sender)
    stage, send, to = COORDINATOR[before.stage, signal]
    done = before.done + (send is Turn.NEXT)
    receivers = {
        To.ALL: before.participants,
        To.DECIDER: before.participants[:1],
        To.REST: tuple(name for name in before.participants if name != sender),
        To.NOBODY: (),
    }[to]
    waiting = before.waiting - {sender} if to is To.NOBODY else frozenset(receivers)
    message = before.phases[done] if send is Turn.NEXT else send
    sends = tuple(Send(message, name) for name in receivers) if message else ()
    return evolve(before, stage=stage, done=done, waiting=waiting), sends


def _signal_from(coordinator: Coordinator, event: Message, sender: str) -> Signal | None:
    """None for what says nothing new: late answers, and whatever is not the decider's while it decides."""
    if coordinator.stage is Stage.DECIDING and sender != coordinator.participants[0]:
        return None
    if isinstance(event, Event):
        return event
    if coordinator.stage is not Stage.PHASES or event is not coordinator.phases[coordinator.done]:
        return None
    if coordinator.waiting - {sender}:
        return Turn.SOME_DONE
    return Turn.ALL_DONE if coordinator.done + 1 < len(coordinator.phases) else Turn.ALL_VOTED


def _illegal(event: Message, standing: str, sender: str = "") -> ProtocolError:
    what = f"{event.name} of {sender}" if sender else event.name
    return ProtocolError(f"{what} cannot happen while {standing}")
