"""The check of the scenarios `r_snow` and `ipyparallel`, on a good history and on bad ones; and what is expected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import evolve

from scenarios.history import History
from scenarios.ipyparallel.workload import expect
from scenarios.processes import Worker
from scenarios.rounds import Outcome, check
from tests.scenarios.histories import OTHER_WORKERS, WORKERS, history_of, refuted_by

GOOD = Outcome(3, ("1 0.5", "2 0.25", "3 0.125"), WORKERS, "3 0.125")
ROUNDS, SAME, PROCESSES = "All rounds were", "All runs come", "What was restored"


def history(restored: Outcome = GOOD) -> History[Outcome]:
    return history_of(evolve(GOOD, workers=OTHER_WORKERS), GOOD, restored)


def refuted(judged: History[Outcome]) -> list[str]:
    return refuted_by(check, judged)


def test_a_good_history() -> None:
    assert refuted(history()) == []
    assert refuted(history(evolve(GOOD, last=""))) == []


def came(*lines: str) -> Callable[[Outcome], Outcome]:
    return lambda outcome: evolve(outcome, lines=lines)


BAD: dict[str, tuple[Callable[[Outcome], Outcome], list[str]]] = {
    "another digit": (came("1 0.5", "2 0.26", "3 0.125"), [SAME]),
    "another end": (came("1 0.5", "2 0.25", "3 0.126"), [ROUNDS, SAME]),
    "an end that is not the known one": (lambda outcome: evolve(outcome, last="3 0.126"), [ROUNDS]),
    "a round less": (came("1 0.5", "2 0.25"), [ROUNDS, SAME]),
    "a round lost": (came("1 0.5", "3 0.125"), [ROUNDS, SAME]),
    "a round twice": (came("1 0.5", "2 0.25", "2 0.25", "3 0.125"), [ROUNDS, SAME]),
    "no round": (came(), [ROUNDS, SAME]),
    "another process": (
        lambda outcome: evolve(outcome, workers=(WORKERS[0], Worker("node-2", ("90:9",), "90:9"))),
        [PROCESSES],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_run(name: str) -> None:
    change, claims = BAD[name]
    assert refuted(history(change(GOOD))) == claims


def test_what_is_expected_depends_on_rounds_and_engines() -> None:
    assert expect(2, 2) == expect(2, 2)
    assert len({expect(2, 2)[2:], expect(3, 2)[2:], expect(2, 3)[2:]}) == 3
