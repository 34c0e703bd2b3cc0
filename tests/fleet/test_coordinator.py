"""The coordinator with participants that stand for hosts: what it asks of whom, and what it leaves when they fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from attrs import define, field

from qsnap.errors import ConnectionLostError, HostError, InDoubtError, QsnapError
from qsnap.fleet.coordinator import lead
from qsnap.host.clock import steady_s
from qsnap.model import Outcome
from qsnap.rules.commit import SNAPSHOT_BARRIER, SNAPSHOT_COLOUR, Phase

NAMES = ("a", "b", "c")
LOST = ConnectionLostError("it has gone")
BROKEN = HostError("no space")


@define(slots=False)
class Fake:
    """A participant whose steps fail as they are told to, and who is `committed` or `undone` in the end."""

    name: str
    log: list[str]
    faults: dict[str, QsnapError] = field(factory=dict)
    answer: Outcome | QsnapError | None = None
    state: str = ""
    slow: str = ""
    round_trip_s: float = 0.0
    times: dict[Phase, float] = field(factory=dict)

    async def _step(self, step: str) -> None:
        self.log.append(f"{self.name} {step}")
        if self.slow == step:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        if step in self.faults:
            raise self.faults[step]

    async def perform(self, phase: Phase, at_s: float = 0.0) -> Any:
        self.times[phase] = at_s
        await self._step(phase.value)
        return f"vote of {self.name}"

    async def commit(self, outcome: Outcome) -> Any:
        await self._step("commit")
        self.state = "committed"
        return (self.name, outcome)

    async def undo(self) -> None:
        await self._step("undo")
        assert self.state != "committed"
        self.state = "undone"

    async def inquire(self) -> Outcome | None:
        self.log.append(f"{self.name} inquire")
        if isinstance(self.answer, QsnapError):
            raise self.answer
        return self.answer


def make(**faults: dict[str, QsnapError]) -> tuple[dict[str, Fake], list[str]]:
    log: list[str] = []
    return {name: Fake(name, log, faults.get(name, {})) for name in NAMES}, log


def decide(votes: Sequence[Any]) -> Outcome:
    assert sorted(votes) == [f"vote of {name}" for name in NAMES]
    return Outcome(7.0, 0.5)


async def test_all_phases_then_the_decider_then_the_others() -> None:
    fakes, log = make()
    results = await lead(fakes, SNAPSHOT_BARRIER, decide)
    assert results == [(name, Outcome(7.0, 0.5)) for name in NAMES]
    for number, step in enumerate(("prepare", "stop", "resume", "collect")):
        assert sorted(log[3 * number : 3 * number + 3]) == [f"{name} {step}" for name in NAMES]
    assert log[12] == "a commit"
    assert sorted(log[13:]) == ["b commit", "c commit"]


@pytest.mark.parametrize(("phases", "cut"), [(SNAPSHOT_COLOUR, Phase.CUT), (SNAPSHOT_BARRIER, Phase.STOP)])
async def test_a_cut_has_one_time_for_all(phases: tuple[Phase, ...], cut: Phase) -> None:
    fakes, _ = make()
    begun_s = steady_s()
    fakes["b"].round_trip_s = 0.5
    await lead(fakes, phases, decide)
    (at_s,) = {fake.times[cut] for fake in fakes.values()}
    assert begun_s + 0.5 < at_s < steady_s() + 1.0
    assert {fake.times[phase] for fake in fakes.values() for phase in phases if phase is not cut} == {0.0}


@pytest.mark.parametrize("phase", [phase.value for phase in SNAPSHOT_COLOUR])
@pytest.mark.parametrize("error", [BROKEN, LOST])
@pytest.mark.parametrize("name", NAMES)
async def test_one_that_fails_undoes_all(name: str, error: QsnapError, phase: str) -> None:
    fakes, log = make(**{name: {phase: error}})
    with pytest.raises(type(error), match=error.message):
        await lead(fakes, SNAPSHOT_COLOUR, decide)
    assert not any("commit" in line for line in log)
    for other in set(NAMES) - {name}:
        assert fakes[other].state == "undone"


async def test_a_failure_does_not_wait_for_those_that_are_at_work() -> None:
    fakes, _ = make(b={"prepare": BROKEN})
    fakes["c"].slow = "prepare"
    with trio.fail_after(5), pytest.raises(HostError):
        await lead(fakes, SNAPSHOT_COLOUR, decide)
    assert fakes["c"].state == "undone"


@pytest.mark.parametrize("phase", ["prepare", "cut", "collect"])
async def test_who_gives_up_leaves_nothing(phase: str) -> None:
    fakes, log = make()
    fakes["b"].slow = phase
    with trio.move_on_after(0.05) as scope:
        await lead(fakes, SNAPSHOT_COLOUR, decide)
    assert scope.cancelled_caught
    assert [fake.state for fake in fakes.values()] == ["undone"] * 3
    assert not any("commit" in line for line in log)


async def test_what_the_decider_cannot_commit_is_undone() -> None:
    fakes, log = make(a={"commit": BROKEN})
    with pytest.raises(HostError):
        await lead(fakes, SNAPSHOT_COLOUR, decide)
    assert [fakes["b"].state, fakes["c"].state] == ["undone"] * 2
    assert "a inquire" in log  # it may have failed after it had committed


@pytest.mark.parametrize("error", [BROKEN, LOST])
async def test_a_decider_that_fails_after_it_has_committed_has_decided(error: QsnapError) -> None:
    fakes, _ = make(a={"commit": error})
    fakes["a"].answer = Outcome(7.0, 0.5)
    assert [name for name, _ in await lead(fakes, SNAPSHOT_COLOUR, decide)] == ["b", "c"]


async def test_a_lost_decider_that_has_committed_has_decided() -> None:
    fakes, log = make(a={"commit": LOST})
    fakes["a"].answer = Outcome(7.0, 0.5)
    results = await lead(fakes, SNAPSHOT_COLOUR, decide)
    assert [name for name, _ in results] == ["b", "c"]
    assert log.index("a inquire") < min(log.index("b commit"), log.index("c commit"))


async def test_a_lost_decider_that_has_not_committed_has_decided_too() -> None:
    fakes, _ = make(a={"commit": LOST})
    with pytest.raises(ConnectionLostError):
        await lead(fakes, SNAPSHOT_COLOUR, decide)
    assert [fakes["b"].state, fakes["c"].state] == ["undone"] * 2


async def test_nobody_is_told_what_a_decider_did_not_say() -> None:
    fakes, log = make(a={"commit": LOST})
    fakes["a"].answer = InDoubtError("it does not answer")
    with pytest.raises(InDoubtError):
        await lead(fakes, SNAPSHOT_COLOUR, decide)
    assert [fakes["b"].state, fakes["c"].state] == ["", ""]
    assert not any(line.endswith(("b commit", "c commit", "undo")) for line in log)


@pytest.mark.parametrize("error", [BROKEN, LOST])
async def test_one_that_cannot_follow_does_not_change_what_is_decided(
    error: QsnapError, caplog: pytest.LogCaptureFixture
) -> None:
    fakes, _ = make(b={"commit": error})
    results = await lead(fakes, SNAPSHOT_COLOUR, decide)
    assert [name for name, _ in results] == ["a", "c"]
    assert fakes["c"].state == "committed"
    assert error.message in caplog.text


async def test_a_commit_is_not_interrupted() -> None:
    fakes, _ = make()
    entered = trio.Event()
    commit = fakes["b"].commit

    async def slow(outcome: Outcome) -> Any:
        entered.set()
        await trio.sleep(0.05)
        return await commit(outcome)

    fakes["b"].commit = slow  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lead, fakes, SNAPSHOT_COLOUR, decide)
        await entered.wait()
        nursery.cancel_scope.cancel()
    assert [fake.state for fake in fakes.values()] == ["committed"] * 3
