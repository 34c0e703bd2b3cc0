"""Whether a primary and its replica kept what they had acknowledged. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from attrs import frozen

from scenarios.history import Finding, History, Run

Ranges = tuple[tuple[int, int], ...]  #: whole numbers: the first and the last of each row of them

SUMS = ("accounts", "tellers", "branches", "history")


@frozen
class Database:
    """What one server holds in the end, or `faults`: what it and pg_amcheck said that is wrong.

    `checksum_failures` is -1 where pages have no checksums.
    """

    server: str
    commits: Ranges  #: of the client: those whose row is there
    rows: Mapping[str, str]  #: the SHA-256 of all rows in order, by table
    balances: tuple[int, ...]  #: as SUMS has them
    checksum_failures: int
    faults: tuple[str, ...]


@frozen
class Outcome:
    """What servers and client told. `begun` and `ended` have by name the processes at both ends of the connections."""

    databases: tuple[Database, ...]
    acknowledged: Ranges  #: commits, by the log of the client
    commits: int  #: that were to be made
    stale: int  #: acknowledged commits that the replica did not show at once
    broken: bool  #: whether a connection of the client broke, which ended its work
    slowest_ms: int  #: of the commits, by the guest's clock, which stands still while it is paused
    transactions: int  #: of pgbench, by itself
    expected: int  #: of them
    begun: Mapping[str, str]
    ended: Mapping[str, str]


def find_ranges(numbers: Iterable[int]) -> Ranges:
    """The same numbers as ranges."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and number <= found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return tuple(found)


def check(history: History[Outcome]) -> tuple[Finding, ...]:
    """The findings about all runs."""
    first, *_ = history.runs
    slowest = max(run.outcome.slowest_ms for run in history.runs)
    return (
        Finding(
            "No acknowledged commit was lost, and the replica had each when it was acknowledged.",
            tuple(fault for run in history.runs for fault in _lost(run)),
            f"{len(history.runs)} runs of {first.outcome.commits} commits; the slowest took {slowest} ms",
        ),
        Finding(
            "Primary and replica have the same rows, as without a snapshot, and pgbench's books balance.",
            tuple(fault for run in history.runs for fault in _other_rows(first, run)),
            f"{first.outcome.expected} transactions of pgbench in each run",
        ),
        Finding(
            "amcheck and the checksums of pages find nothing.",
            tuple(fault for run in history.runs for fault in _corrupt(run)),
        ),
        Finding(
            "No connection broke: the same processes are at both ends.",
            tuple(fault for run in history.runs for fault in _broken(history, run)),
            ", ".join(sorted(first.outcome.begun)),
        ),
    )


def _lost(run: Run[Outcome]) -> Iterator[str]:
    outcome = run.outcome
    if {database.server for database in outcome.databases} != {"primary", "replica"}:
        yield f"{run.title}: a server is missing"
    acknowledged = _numbers(outcome.acknowledged)
    if acknowledged != set(range(1, outcome.commits + 1)):
        yield f"{run.title}: {len(acknowledged)} of {outcome.commits} commits were acknowledged"
    for database in outcome.databases:
        lost = find_ranges(acknowledged - _numbers(database.commits))
        if lost:
            yield f"{run.title}: {database.server} has lost commits {_text(lost)}"
    if outcome.stale:
        yield f"{run.title}: the replica did not have {outcome.stale} commits when they were acknowledged"


def _other_rows(first: Run[Outcome], run: Run[Outcome]) -> Iterator[str]:
    outcome = run.outcome
    if outcome.transactions != outcome.expected:
        yield f"{run.title}: pgbench made {outcome.transactions} of {outcome.expected} transactions"
    right = first.outcome.databases[0].rows if first.outcome.databases else {}
    for database in outcome.databases:
        if len(database.balances) != len(SUMS) or len(set(database.balances)) > 1:
            sums = ", ".join(f"{name} {value}" for name, value in zip(SUMS, database.balances, strict=False))
            yield f"{run.title}: {database.server} does not balance: {sums or 'no sums'}"
        for table in sorted(right.keys() | database.rows.keys()):
            if database.rows.get(table) != right.get(table):
                yield f"{run.title}: {database.server} has other rows in {table}"


def _corrupt(run: Run[Outcome]) -> Iterator[str]:
    for database in run.outcome.databases:
        if database.checksum_failures:
            yield f"{run.title}: {database.server} has {database.checksum_failures} failures of checksums"
        yield from (f"{run.title}: {database.server}: {fault}" for fault in database.faults)


def _broken(history: History[Outcome], run: Run[Outcome]) -> Iterator[str]:
    if run.outcome.broken:
        yield f"{run.title}: a connection of the client broke"
    begun = history.snapshotted.outcome.begun if run in history.restored else run.outcome.begun
    for name in sorted(begun.keys() | run.outcome.ended.keys()):
        now, before = run.outcome.ended.get(name), begun.get(name)
        if now != before:
            yield f"{run.title}: {name} is process {now}, not {before}"


def _numbers(ranges: Ranges) -> set[int]:
    return {number for first, last in ranges for number in range(first, last + 1)}


def _text(ranges: Ranges) -> str:
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in ranges)
