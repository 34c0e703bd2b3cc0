"""Hosts that follow the commit tables: what each can do next, with every way in which it can be killed meanwhile.

A host is a frozen value. What the callers of the tables have to keep to (`qsnap.rules.commit`) is done here as a real
agent does it, and nothing else: the journal outlives a process, the memory of having aborted does not.
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import evolve, frozen

from qsnap.rules.commit import (
    START,
    Action,
    Coordinator,
    Event,
    Message,
    Participant,
    Phase,
    Stage,
    State,
    coordinator_next,
    participant_next,
)

COORDINATOR = ""
DECIDER = "a"
Sent = tuple[str, str, Message]  #: from, to, what
PAUSED = {  #: the only places at which a VM of a live agent is paused; START makes VMs, which wait for the commit
    "snapshot": ("working on CUT", "working on STOP", "waiting after STOP", "working on RESUME"),
    "start": ("working on PREPARE", "voted"),
}


@frozen
class Host:
    """A host: its part of the operation, and what has become of its VM."""

    name: str
    participant: Participant
    up: bool = True  #: its agent runs
    first: bool = True  #: the agent is the one that the coordinator has a connection to
    changed: bool = False  #: there is something that an abort has to undo
    paused: bool = False

    def __str__(self) -> str:
        marks = [mark for mark, holds in (("killed", not self.up), ("VM paused", self.paused)) if holds]
        return f"{self.name} {', '.join([str(self.participant), *marks])}"


@frozen
class Result:
    """What a host is after a step, and what it has sent."""

    host: Host
    sent: tuple[Sent, ...] = ()


def new_host(name: str, phases: tuple[Phase, ...]) -> Host:
    """A host that knows nothing of the operation yet."""
    return Host(name, Participant(phases, decider=name == DECIDER))


def can_reach(host: Host, message: Message) -> bool:
    """Whether a message can reach the host if its agent runs: phases come over the first connection only."""
    return host.first or not isinstance(message, Phase)


def react(host: Host, event: Message, sender: str = COORDINATOR) -> list[Result]:
    """All that can follow on an event. The first is what does without a fault; in the others it is killed on the way,
    or its commit fails.
    """
    after, actions = participant_next(host.participant, event)
    if event is Event.DONE and host.participant.phase in (Phase.CUT, Phase.RESUME):
        host = evolve(host, paused=False)
    now = host if Action.COMMIT in actions else evolve(host, participant=after)
    stages = [Result(now)]
    for action in actions:
        stages.append(_act(stages[-1], action, after, sender))
    faults = [Result(killed(stage.host), stage.sent) for stage in stages]
    if Action.COMMIT in actions and host.participant.state is State.VOTED:
        faults += react(host, Event.FAILED)
    return [stages[-1], *faults]


def _act(so_far: Result, action: Action, after: Participant, sender: str) -> Result:
    host, sent = so_far.host, so_far.sent
    match action:
        case Action.WORK:
            pauses = after.phase in (Phase.CUT, Phase.STOP) or after.phases == START
            return Result(evolve(host, changed=True, paused=host.paused or pauses), sent)
        case Action.UNDO:
            return Result(evolve(host, changed=False, paused=False), sent)
        case Action.COMMIT:
            paused = host.paused and after.phases != START
            return Result(evolve(host, participant=after, changed=False, paused=paused), sent)
        case Action.ANSWER:
            return Result(host, (*sent, (host.name, sender, after.answer)))
        case Action.ASK:
            return Result(host, (*sent, (host.name, DECIDER, Event.ASK)))


def killed(host: Host) -> Host:
    """What is left of a host whose agent is killed: the journal and the record of a commit, and so not an abort."""
    forgotten = host.participant.state is State.ABORTED and not host.changed
    participant = evolve(host.participant, state=State.IDLE, done=0) if forgotten else host.participant
    return evolve(host, participant=participant, up=False, first=False)


def restart(host: Host) -> list[Result]:
    """All that can follow when the agent of a killed host is started again."""
    host = evolve(host, up=True)
    return [Result(host)] if host.participant.state is State.IDLE else react(host, Event.RESTARTED)


def can_do(host: Host) -> Iterator[Event]:
    """What can happen to a live host by itself, without a fault: its work gets done."""
    if host.up and host.participant.state is State.WORKING:
        yield Event.DONE


def can_suffer(host: Host) -> Iterator[Event]:
    """What faults can bring to a live host at any time."""
    if host.up:
        yield Event.LOST
        if host.participant.state in (State.WORKING, State.WAITING):
            yield Event.FAILED


def waits(host: Host) -> bool:
    """Whether a live host counts on hearing something: silence will be LOST to it."""
    return host.up and host.participant.state in (State.WAITING, State.VOTED)


def conduct(coordinator: Coordinator, event: Message, sender: str = "") -> tuple[Coordinator, tuple[Sent, ...]]:
    """The coordinator after an event, and what it has sent."""
    after, sends = coordinator_next(coordinator, event, sender)
    return after, tuple((COORDINATOR, send.to, send.message) for send in sends)


def check_agreement(hosts: tuple[Host, ...]) -> str:
    """What is wrong if one has committed: all others have, or have voted and can."""
    states = [host.participant.state for host in hosts]
    if State.COMMITTED in states and not set(states) <= {State.VOTED, State.COMMITTED}:
        return "one has committed, and another can not"
    return ""


def check_order(hosts: tuple[Host, ...]) -> str:
    """What is wrong if one is at a phase: all others have done those before it, or have given up."""
    at_work = [host.participant.done for host in hosts if host.participant.state is State.WORKING]
    behind = [
        host.participant.done
        for host in hosts
        if host.first and host.participant.state in (State.IDLE, State.WORKING, State.WAITING)
    ]
    too_early = at_work and behind and max(at_work) > min(behind)
    return "a phase is begun before all have done the one before it" if too_early else ""


def check_vms(hosts: tuple[Host, ...]) -> str:
    """What is wrong with VMs: one is paused where it should run. A doubt never pauses any."""
    for host in hosts:
        places = PAUSED["start" if host.participant.phases == START else "snapshot"]
        if host.up and host.paused and str(host.participant) not in places:
            return "a VM is paused"
    return ""


def check_end(hosts: tuple[Host, ...], coordinator: Coordinator | None) -> str:
    """What is wrong where nothing more can happen, beside what the others find."""
    states = {host.participant.state for host in hosts}
    if states & {State.WORKING, State.WAITING, State.VOTED}:
        return "one never learns the outcome"
    if any(host.changed or host.paused for host in hosts):
        return "something is left behind"
    if coordinator is not None and not coordinator.ended:
        return "the coordinator waits for ever"
    if coordinator is not None and (coordinator.stage is Stage.COMMITTED) != (State.COMMITTED in states):
        return "the coordinator reports another outcome"
    return ""
