"""The check of `partition` on a good history and on bad ones, and its judge on images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import evolve

from scenarios.controls import MIXED, Damage, check_controls, run_controls
from scenarios.history import Finding, History, Run, Saved, Way
from scenarios.partition.check import Outcome, Verdict, check
from testbed.state import GuestState, StreamPhase, StreamState
from tests.scenarios.histories import sample

NAMES = ("s1", "s2", "s3")
ORPHANS = "In no snapshot something was received that was not sent in it."
PAGES = "In every snapshot each page of memory is of the one moment."
STREAMS = "All streams ended with the right digest, and nothing was delivered twice."


def state(id: int) -> GuestState:
    """A guest of two, at the end of its run."""
    stream = StreamState(3 - id, StreamPhase.MATCHED, 9, 9, "aa")
    none = (0, 0)
    return GuestState(
        id,
        2,
        1,
        16,
        True,
        9,
        9,
        9,
        0,
        0,
        0,
        0,
        2,
        2,
        (9, 9),
        (8, 8),
        (9, 9),
        none,
        none,
        none,
        none,
        none,
        stream,
        stream,
    )


ENDED: Outcome = (state(1), state(2))


def saved(number: int, verdict: Verdict) -> Saved:
    at = sample(number, 0.2 * number, 0.2 * number)
    return Saved(NAMES[number - 1], "background", "colour", at, at, 5.0, 1.0, 100.0, 1 << 20, verdict)


def good_history() -> History[Outcome]:
    """Three snapshots, one of which was restored."""
    boots = {"tracker": "1", "client-1": "2"}
    whole = (sample(0, 0, 0), sample(9, 1, 1))
    kept = tuple(saved(number, Verdict(100 * number, 0, 0)) for number in (1, 2, 3))
    return History(
        (
            Run(Way.UNINTERRUPTED, ENDED, boots, whole),
            Run(Way.SNAPSHOTTED, ENDED, boots, whole, kept, 3),
            Run(Way.RESTORED, ENDED, boots, (sample(0, 0.6, 0.6), sample(4, 1, 1)), origin="s3"),
        )
    )


def refuted(history: History[Outcome]) -> list[str]:
    return [finding.claim for finding in check(history) if not finding.held]


def with_verdict(verdict: Verdict) -> History[Outcome]:
    first, run, last = good_history().runs
    return History((first, evolve(run, saved=(*run.saved[:2], saved(3, verdict))), last))


def test_a_good_history() -> None:
    assert refuted(good_history()) == []


@pytest.mark.parametrize(
    ("verdict", "claim"),
    [(Verdict(300, 1, 0), ORPHANS), (Verdict(200, 0, 0), ORPHANS), (Verdict(300, 0, 1), PAGES)],
)
def test_a_bad_snapshot(verdict: Verdict, claim: str) -> None:
    assert refuted(with_verdict(verdict)) == [claim]


BAD_ENDS: dict[str, Callable[[GuestState], GuestState]] = {
    "a wrong page": lambda state: evolve(state, stamp_errors=1),
    "a datagram twice": lambda state: evolve(state, duplicates=(0, 1)),
    "a broken stream": lambda state: evolve(state, stream_errors=1),
    "a wrong digest": lambda state: evolve(state, streams_matched=1),
    "no stream": lambda state: evolve(state, streams_completed=0, streams_matched=0),
}


@pytest.mark.parametrize("bad", BAD_ENDS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_bad_end(bad: str, index: int) -> None:
    runs = list(good_history().runs)
    runs[index] = evolve(runs[index], outcome=(ENDED[0], BAD_ENDS[bad](ENDED[1])))
    assert refuted(History(tuple(runs))) == [STREAMS]


def test_controls() -> None:
    """What is read out of wrong images refutes what it should, and an epoch that nobody looks for is no control."""
    spoiled = (evolve(ENDED[0], duplicates=(0, 1)), ENDED[1])
    verdicts = (("two epochs", Verdict(310, 4, 0)), ("a torn image", Verdict(310, 0, 7)))
    damage: Damage[Outcome] = Damage(spoiled, verdicts=verdicts, flipped="altered")
    controls = run_controls(check, good_history(), damage)
    found = {control.wrong: control.refuted for control in controls}
    assert (found["two epochs"], found["a torn image"]) == ((ORPHANS,), (PAGES,))
    assert MIXED not in found
    claims = [Finding(claim, ()) for claim in (ORPHANS, PAGES, STREAMS)]
    assert not [fault for fault in check_controls(claims, controls).faults if fault.startswith("no control")]
