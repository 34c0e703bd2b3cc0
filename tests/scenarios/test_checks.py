"""Checks of scenarios, on a good history and on bad ones: a claim is refuted by what refutes it, by nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import evolve

from scenarios.bittorrent.check import Outcome, check
from scenarios.checks import check_history
from scenarios.controls import MIXED, Control, Damage, check_controls, run_controls
from scenarios.history import Finding, History, Run, Saved
from tests.scenarios.histories import BAD, GOOD, good_history, outcome, sample

DAMAGE = Damage(outcome(2, BAD), flipped="sha256 is another")
Bad = Callable[[Run[Outcome]], Run[Outcome]]


def check_all(history: History[Outcome]) -> tuple[Finding, ...]:
    return (*check_history(history), *check(history))


def refuted(history: History[Outcome]) -> list[str]:
    return [finding.claim.split(":")[0].rstrip(".") for finding in check_all(history) if not finding.held]


def with_run(index: int, change: Bad) -> History[Outcome]:
    runs = list(good_history().runs)
    runs[index] = change(runs[index])
    return History(tuple(runs))


WAYS = "All three ways were gone to their end"
MIDDLE = "Every snapshot was taken in the middle of the work"
SAME_GUEST = "Every restored guest is the one that was saved"
RIGHT = "Every download is whole and right, by its SHA-256"
AGREE = "All runs come to the same"
PROCESSES = "What was restored went on"


def test_a_good_history() -> None:
    assert refuted(good_history()) == []


def test_ways_that_are_missing() -> None:
    history = good_history()
    assert refuted(History(history.runs[:2])) == [WAYS]
    assert refuted(History(history.runs[1:])) == [WAYS]


BAD_RUNS: dict[str, tuple[int, Bad, list[str]]] = {
    "not done": (0, lambda run: evolve(run, samples=(sample(0, 0, 0), sample(9, 1, 0.99))), [WAYS]),
    "snapshot too early": (1, lambda run: evolve(run, saved=(early(run), *run.saved[1:])), [MIDDLE]),
    "snapshot too late": (3, lambda run: evolve(run, samples=(sample(0, 1, 0.95), sample(5, 1, 1))), [MIDDLE]),
    "another boot": (2, lambda run: evolve(run, boots={**run.boots, "tracker": "third-1"}), [SAME_GUEST]),
    "an older state": (2, lambda run: evolve(run, samples=(sample(0, 0.5, 0.1), sample(5, 1, 1))), [SAME_GUEST]),
    "nothing left to do": (3, lambda run: evolve(run, samples=(sample(0, 1, 1),)), [MIDDLE]),
    "from no snapshot": (3, lambda run: evolve(run, origin="other"), [SAME_GUEST]),
    "damaged": (3, lambda run: evolve(run, outcome=outcome(2, BAD)), [RIGHT, AGREE]),
    "cut short": (3, lambda run: evolve(run, outcome=cut_short(run.outcome)), [RIGHT, AGREE]),
    "no download": (2, lambda run: evolve(run, outcome=evolve(run.outcome, downloads=())), [RIGHT, AGREE]),
    "a restarted process": (2, lambda run: evolve(run, outcome=outcome(3)), [PROCESSES]),
}


def early(run: Run[Outcome]) -> Saved:
    return evolve(run.saved[0], before=sample(0, 0, 0.02))


def cut_short(made: Outcome) -> Outcome:
    first, *others = made.downloads
    return evolve(made, downloads=(evolve(first, bytes=999), *others))


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_bad_run(name: str) -> None:
    index, change, claims = BAD_RUNS[name]
    assert refuted(with_run(index, change)) == claims


def test_no_snapshot_at_all() -> None:
    assert MIDDLE in refuted(with_run(1, lambda run: evolve(run, saved=())))


def test_fewer_snapshots_than_planned() -> None:
    assert refuted(with_run(1, lambda run: evolve(run, planned=3))) == [MIDDLE]


def test_a_wrong_seed_is_found() -> None:
    wrong = evolve(outcome(1), sha256=BAD)
    assert refuted(with_run(0, lambda run: evolve(run, outcome=wrong))) == [RIGHT]
    assert wrong.seeds[0].sha256 == GOOD


def test_controls_refute_every_claim() -> None:
    history = good_history()
    controls = run_controls(check_all, history, DAMAGE)
    assert check_controls(check_all(history), controls).held


def test_an_epoch_that_is_not_noticed() -> None:
    """Neither by the check, nor because it comes to no end."""
    history = good_history()
    unnoticed, stuck = (
        run_controls(check_all, history, evolve(DAMAGE, mixed=mixed)) for mixed in (history.runs[-1], "it hangs")
    )
    assert check_controls(check_all(history), unnoticed).faults == (f"nothing is found where {MIXED}",)
    assert check_controls(check_all(history), stuck).held


def test_a_flipped_bit_that_is_not_noticed() -> None:
    history = good_history()
    controls = run_controls(check_all, history, evolve(DAMAGE, flipped=""))
    assert check_controls(check_all(history), controls).faults == (
        "nothing is found where a bit of a stored image is another one",
    )


def test_a_check_that_finds_nothing_is_found_out() -> None:
    blind = Finding("Blind.", ())

    def check_blindly(history: History[Outcome]) -> tuple[Finding, ...]:
        return (*check_all(history), blind)

    history = good_history()
    controls = run_controls(check_blindly, history, DAMAGE)
    assert check_controls(check_blindly(history), controls).faults == ("no control refutes: Blind.",)


def test_a_control_that_refutes_nothing_is_found_out() -> None:
    idle = Control("nothing is wrong", ())
    assert check_controls((), (idle,)).faults == ("nothing is found where nothing is wrong",)
