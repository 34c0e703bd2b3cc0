"""The check of the scenario `postgres`, on a good history and on bad ones; and what servers and client tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from scenarios.history import History, Run, Way
from scenarios.postgres.check import Database, Outcome, check, find_ranges
from scenarios.postgres.workload import parse_database, parse_processes
from tests.scenarios.histories import sample

ROWS = {"ledger": "aa" * 32, "pgbench_accounts": "bb" * 32}
PRIMARY = Database("primary", ((1, 9),), ROWS, (5, 5, 5, 5), 0, ())
REPLICA = evolve(PRIMARY, server="replica")
PROCESSES = {"primary walsender": "248@1.5", "replica walreceiver": "238@1.2", "client": "213@9"}
GOOD = Outcome((PRIMARY, REPLICA), ((1, 9),), 9, 0, False, 70, 8, 8, PROCESSES, PROCESSES)
LOST, OTHER = "No acknowledged commit was lost", "Primary and replica have the same rows"
CORRUPT, BROKEN = "amcheck and the checksums of pages find nothing", "No connection broke"
TOLD = """\
process|walsender|248@1.5
commit|1
commit|3
commit|2
rows|ledger|aa
balances|5|5|-5|5
checksums|0
"""


def history(restored: Outcome = GOOD) -> History[Outcome]:
    samples = (sample(0, 0.5, 0.5), sample(1, 1, 1))
    other = dict.fromkeys(PROCESSES, "100@1")
    first = Run(Way.UNINTERRUPTED, evolve(GOOD, begun=other, ended=other), {}, samples)
    second = Run(Way.SNAPSHOTTED, GOOD, {}, samples)
    return History((first, second, Run(Way.RESTORED, restored, {}, samples, origin="one")))


def refuted(judged: History[Outcome]) -> list[str]:
    return [finding.claim.split(",")[0].split(":")[0].rstrip(".") for finding in check(judged) if not finding.held]


def on(server: str, **changes: Any) -> Callable[[Outcome], Outcome]:
    """Changes what one server holds."""

    def change(outcome: Outcome) -> Outcome:
        return evolve(
            outcome,
            databases=tuple(
                evolve(database, **changes) if database.server == server else database for database in outcome.databases
            ),
        )

    return change


BAD: dict[str, tuple[Callable[[Outcome], Outcome], list[str]]] = {
    "a commit that the primary lost": (on("primary", commits=((1, 4), (6, 9))), [LOST]),
    "a commit that the replica lost": (on("replica", commits=((1, 8),)), [LOST]),
    "a commit that was not acknowledged": (lambda outcome: evolve(outcome, acknowledged=((1, 8),)), [LOST]),
    "a commit that the replica had too late": (lambda outcome: evolve(outcome, stale=1), [LOST]),
    "no replica": (lambda outcome: evolve(outcome, databases=(PRIMARY,)), [LOST]),
    "no server": (lambda outcome: evolve(outcome, databases=()), [LOST]),
    "other rows on the replica": (on("replica", rows={**ROWS, "ledger": "cc" * 32}), [OTHER]),
    "a table less": (on("replica", rows={"ledger": "aa" * 32}), [OTHER]),
    "books that do not balance": (on("primary", balances=(5, 5, 5, 4)), [OTHER]),
    "no books": (on("replica", balances=()), [OTHER]),
    "a transaction less": (lambda outcome: evolve(outcome, transactions=7), [OTHER]),
    "a corrupt page": (on("replica", checksum_failures=1), [CORRUPT]),
    "no checksums": (on("primary", checksum_failures=-1), [CORRUPT]),
    "a corrupt index": (on("primary", faults=('btree index "bench.public.ledger_pkey":',)), [CORRUPT]),
    "a broken connection": (lambda outcome: evolve(outcome, broken=True), [BROKEN]),
    "another process": (lambda outcome: evolve(outcome, ended={**PROCESSES, "client": "214@9"}), [BROKEN]),
    "a process less": (lambda outcome: evolve(outcome, ended={"client": "213@9"}), [BROKEN]),
    "processes of another life": (
        lambda outcome: evolve(outcome, begun={"client": "1@1"}, ended={"client": "1@1"}),
        [BROKEN],
    ),
    # A VM of an earlier epoch beside two of a later one: what it had acknowledged, or applied, since then is gone.
    "a primary of another epoch": (
        lambda outcome: evolve(
            on("primary", commits=((1, 3),), rows={**ROWS, "ledger": "cc" * 32})(outcome),
            acknowledged=((1, 6),),
            broken=True,
        ),
        [LOST, OTHER, BROKEN],
    ),
    "a replica of another epoch": (
        lambda outcome: evolve(
            on("replica", commits=((1, 3),), rows={**ROWS, "ledger": "cc" * 32})(outcome),
            ended={**PROCESSES, "replica walreceiver": "300@8"},
        ),
        [LOST, OTHER, BROKEN],
    ),
    "a replica of another epoch, which has caught up": (lambda outcome: evolve(outcome, stale=3), [LOST]),
    "a client of another epoch": (
        lambda outcome: evolve(outcome, acknowledged=((1, 3),), broken=True),
        [LOST, BROKEN],
    ),
}


def test_a_good_history() -> None:
    assert refuted(history()) == []


@pytest.mark.parametrize("name", BAD)
def test_a_bad_run(name: str) -> None:
    change, claims = BAD[name]
    assert refuted(history(change(GOOD))) == claims


def test_what_was_lost_is_named() -> None:
    faults = check(history(on("replica", commits=((1, 4), (6, 7)))(GOOD)))[0].faults
    assert faults == ("restored from one: replica has lost commits 5, 8 to 9",)


def test_numbers_as_ranges() -> None:
    assert find_ranges([3, 1, 2, 7, 9, 8]) == ((1, 3), (7, 9))
    assert find_ranges([]) == ()


def test_what_a_server_tells() -> None:
    assert parse_database("primary", TOLD) == Database("primary", ((1, 3),), {"ledger": "aa"}, (5, 5, -5, 5), 0, ())
    assert dict(parse_processes("primary", TOLD)) == {"primary walsender": "248@1.5"}


def test_what_else_a_server_tells_is_a_fault() -> None:
    said = "ERROR:  invalid page in block 100 of relation base/16384/16411"
    assert parse_database("replica", f"{TOLD}{said}\n").faults == (said,)
    assert parse_database("replica", said).checksum_failures == -1
