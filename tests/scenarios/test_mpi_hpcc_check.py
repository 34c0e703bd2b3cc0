"""The check of the scenario `mpi_hpcc`, on a good history and on bad ones; and what it reads of hpcc's output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import evolve

from scenarios.history import History
from scenarios.mpi_hpcc.check import Outcome, System, check, parse_output
from scenarios.mpi_hpcc.workload import encode_input, plan_systems
from scenarios.processes import Worker
from tests.scenarios.histories import OTHER_WORKERS, WORKERS, history_of, refuted_by

ASKED = (System(48, 8, 1, 2), System(48, 12, 1, 2))
TEXT = """\
End of MPIFFT section.
WALL    24    24   8   8   1   2     0.00 PASSED    0.003  0.00
T/V                N    NB     P     Q               Time                 Gflops
--------------------------------------------------------------------------------
WR11C2R4          48     8     1     2               0.16              4.294e-03
--------------------------------------------------------------------------------
||Ax-b||_oo/(eps*(||A||_oo*||x||_oo+||b||_oo)*N)=        0.0140369 ...... PASSED
================================================================================
T/V                N    NB     P     Q               Time                 Gflops
--------------------------------------------------------------------------------
WR11C2R4          48    12     1     2               0.58              1.179e-03
--------------------------------------------------------------------------------
||Ax-b||_oo/(eps*(||A||_oo*||x||_oo+||b||_oo)*N)=        0.0110290 ...... PASSED
End of HPL section.
Begin of Summary section.
Success=1
CommWorldProcs=2
HPL_Tflops=0.000111351
DGEMM_N=20
PTRANS_residual=0
PTRANS_n=24
MPIRandomAccess_N=1024
MPIRandomAccess_Errors=0
MPIRandomAccess_LCG_Errors=0
MPIFFT_N=256
MPIFFT_maxErr=9.5505e-16
End of Summary section.
"""
GOOD = parse_output(TEXT, ASKED, WORKERS)
VERIFIED, SAME, PROCESSES = "All benchmarks came", "All runs come", "What was restored"


def history(restored: Outcome = GOOD) -> History[Outcome]:
    return history_of(evolve(GOOD, workers=OTHER_WORKERS), GOOD, restored)


def refuted(judged: History[Outcome]) -> list[str]:
    return refuted_by(check, judged)


def test_a_good_history() -> None:
    assert refuted(history()) == []
    assert refuted(history(said("PTRANS_n=24", "PTRANS_n=32")(GOOD))) == [], "another size was the fastest"


def said(old: str, new: str) -> Callable[[Outcome], Outcome]:
    assert old in TEXT
    return lambda outcome: parse_output(TEXT.replace(old, new, 1), ASKED, outcome.workers)


def worked(worker: Worker) -> Callable[[Outcome], Outcome]:
    return lambda outcome: evolve(outcome, workers=(WORKERS[0], worker))


BAD: dict[str, tuple[Callable[[Outcome], Outcome], list[str]]] = {
    "no success": (said("Success=1", "Success=0"), [VERIFIED, SAME]),
    "no summary": (lambda outcome: parse_output(TEXT.partition("Begin of S")[0], ASKED, WORKERS), [VERIFIED, SAME]),
    "a residual too large": (said("0.0140369 ...... PASSED", "99.0 ...... FAILED"), [VERIFIED, SAME]),
    "another residual": (said("0.0140369", "0.0140368"), [SAME]),
    "a transposition that failed": (said("0.00 PASSED", "0.00 FAILED"), [VERIFIED]),
    "a wrong table": (said("LCG_Errors=0", "LCG_Errors=1"), [VERIFIED, SAME]),
    "another error of the transform": (said("9.5505e-16", "9.5506e-16"), [SAME]),
    "a system less": (said("WR11C2R4          48    12", "other"), [VERIFIED]),
    "another system": (said("48    12     1     2", "56    12     1     2"), [VERIFIED, SAME]),
    "a rank less": (said("CommWorldProcs=2", "CommWorldProcs=1"), [VERIFIED, SAME]),
    "another process": (worked(Worker("node-2", ("90:9",), "90:9")), [PROCESSES]),
    "a process that was started again": (worked(Worker("node-2", ("90:8", "91:9"), "91:9")), [PROCESSES]),
    "a process that came to no good end": (worked(Worker("node-2", ("90:8",), "")), [PROCESSES]),
    "a guest without a part": (lambda outcome: evolve(outcome, workers=WORKERS[:1]), [VERIFIED, PROCESSES]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_run(name: str) -> None:
    change, claims = BAD[name]
    assert refuted(history(change(GOOD))) == claims


@pytest.mark.parametrize(("errors", "claims"), [(0, []), (1, []), (10, []), (11, [VERIFIED])])
def test_more_than_four_ranks_lose_a_few_updates(errors: int, claims: list[str]) -> None:
    text = TEXT.replace("CommWorldProcs=2", "CommWorldProcs=5").replace("Access_Errors=0", f"Access_Errors={errors}")
    workers = tuple(Worker(f"node-{number}", ("100:7",), "100:7") for number in range(1, 6))
    many = [parse_output(each, ASKED, workers) for each in (TEXT.replace("CommWorldProcs=2", "CommWorldProcs=5"), text)]
    assert refuted(history_of(many[0], many[0], many[1])) == claims


def test_nothing_asked_for_is_nothing_verified() -> None:
    nothing = parse_output(TEXT.replace("WR11", "none"), (), WORKERS)
    assert VERIFIED in refuted(history(nothing))


def test_what_is_asked_for() -> None:
    systems = plan_systems((48, 56), 8)
    assert [each.block for each in systems] == [8] * 6 + [12] * 6 + [8] * 6 + [12] * 6
    assert systems[0] == System(48, 8, 2, 4)
    lines = [line.split("  ")[0].strip() for line in encode_input(systems).splitlines()]
    assert lines[4:12] == ["2", "48 56", "2", "8 12", "0", "1", "2", "4"]
    assert [each.rows for ranks in (2, 3, 4, 16) for each in plan_systems((48,), ranks)[:1]] == [1, 1, 2, 4]
