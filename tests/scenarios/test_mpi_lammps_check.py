"""The check of the scenario `mpi_lammps`, on a good history and on bad ones; and what it reads of LAMMPS's log."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import evolve

from scenarios.history import History
from scenarios.mpi_lammps.check import Outcome, check, parse_log
from scenarios.processes import Worker, parse_worker
from tests.scenarios.histories import OTHER_WORKERS, WORKERS, history_of, refuted_by

LOG = """\
Created orthogonal box = (0 0 0) to (10 10 10)
  1 by 1 by 2 MPI processor grid
Created 864 atoms
Step Temp E_pair TotEng Press
       0    3      -6.77   -2.28  -3.70
      10    2.5    -6.1e0  -2.28  1e-05
      20    1.625  -5.62   -2.28  3.5
Loop time of 2.5 on 2 procs for 20 steps with 864 atoms
Histogram: 1 0 0 0 0 0 0 0 0 1
"""
GOOD = parse_log(LOG, 20, "aa" * 32, WORKERS)
STEPS, SAME, PROCESSES = "All steps were", "All runs come", "What was restored"


def history(restored: Outcome = GOOD) -> History[Outcome]:
    return history_of(evolve(GOOD, workers=OTHER_WORKERS), GOOD, restored)


def refuted(judged: History[Outcome]) -> list[str]:
    return refuted_by(check, judged)


def test_a_good_history() -> None:
    assert refuted(history()) == []


def said(old: str, new: str) -> Callable[[Outcome], Outcome]:
    assert old in LOG
    return lambda outcome: parse_log(LOG.replace(old, new, 1), 20, outcome.atoms_sha256, outcome.workers)


BAD: dict[str, tuple[Callable[[Outcome], Outcome], list[str]]] = {
    "another digit": (said("1.625", "1.624"), [SAME]),
    "a line less": (said("      10 ", "lost"), [SAME]),
    "another last line": (said("      20 ", "      30 "), [STEPS, SAME]),
    "no log": (lambda outcome: parse_log("", 20, "aa" * 32, outcome.workers), [STEPS, SAME]),
    "other atoms in the end": (lambda outcome: evolve(outcome, atoms_sha256="bb" * 32), [SAME]),
    "a rank less": (said("1 by 1 by 2", "1 by 1 by 1"), [STEPS]),
    "another process": (
        lambda outcome: evolve(outcome, workers=(WORKERS[0], Worker("node-2", ("90:9",), "90:9"))),
        [PROCESSES],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_run(name: str) -> None:
    change, claims = BAD[name]
    assert refuted(history(change(GOOD))) == claims


def test_what_is_read_of_a_log() -> None:
    assert GOOD.ranks == 2
    assert GOOD.thermo == ("0 3 -6.77 -2.28 -3.70", "10 2.5 -6.1e0 -2.28 1e-05", "20 1.625 -5.62 -2.28 3.5")


@pytest.mark.parametrize(
    ("text", "began", "ended"),
    [
        ("began 9:5\nended 9:5 0", ("9:5",), "9:5"),
        ("began 9:5\nended 9:5 1", ("9:5",), ""),
        ("began 9:5", ("9:5",), ""),
        ("began 9:5\nbegan 9:6\nended 9:6 0", ("9:5", "9:6"), "9:6"),
        ("", (), ""),
    ],
)
def test_what_is_read_of_a_process(text: str, began: tuple[str, ...], ended: str) -> None:
    assert parse_worker("node-2", text) == Worker("node-2", began, ended)
