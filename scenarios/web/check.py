"""Whether what a web server was asked for came right. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from scenarios.history import Finding, History, Run


@frozen
class Load:
    """What one client got. `sha256` is of all answers in a row, `latency_ms` the slowest answer of each second.

    `broken` connections ended anywhere but between two answers. Seconds are those of the guest, whose clock stands
    still while it is paused.
    """

    guest: str
    process: str  #: its number, and when it started, in clock ticks of the guest
    requests: int
    wrong: int
    broken: int
    connections: int
    bytes: int
    sha256: str
    latency_ms: tuple[float, ...]


@frozen
class Outcome:
    """What all clients got, and what each was to get, known without the guests: requests, bytes and digest by guest."""

    loads: tuple[Load, ...]
    expected: dict[str, tuple[int, int, str]]


def check(history: History[Outcome]) -> tuple[Finding, ...]:
    """The findings about all runs."""
    total = sum(load.requests for load in history.runs[0].outcome.loads)
    slowest = max((max(load.latency_ms) for load in history.snapshotted.outcome.loads), default=0.0)
    return (
        Finding(
            "Every answer is right, to the byte.",
            tuple(fault for run in history.runs for fault in _wrong(run)),
            f"{len(history.runs)} runs of {total} requests; the slowest answer around a snapshot took {slowest:.0f} ms",
        ),
        Finding(
            "No connection broke.",
            tuple(
                f"{run.title}: {load.guest} lost {load.broken} connections in the middle of an answer"
                for run in history.runs
                for load in run.outcome.loads
                if load.broken
            ),
            f"{sum(load.connections for run in history.runs for load in run.outcome.loads)} connections",
        ),
        Finding(
            "What was restored went on: the same processes finished their requests.",
            tuple(fault for run in history.restored for fault in _new_processes(history.snapshotted, run)),
        ),
    )


def _wrong(run: Run[Outcome]) -> Iterator[str]:
    outcome = run.outcome
    if {load.guest for load in outcome.loads} != outcome.expected.keys() or not outcome.loads:
        yield f"{run.title}: a client is missing"
    for load in outcome.loads:
        if load.wrong:
            yield f"{run.title}: {load.guest} found {load.wrong} wrong answers"
        elif (load.requests, load.bytes, load.sha256) != outcome.expected.get(load.guest):
            yield f"{run.title}: {load.guest} got {load.requests} answers, {load.bytes} bytes with {load.sha256}"


def _new_processes(snapshotted: Run[Outcome], run: Run[Outcome]) -> Iterator[str]:
    before = {load.guest: load.process for load in snapshotted.outcome.loads}
    for load in run.outcome.loads:
        if before.get(load.guest) != load.process:
            yield f"{run.title}: {load.guest} finished with process {load.process}, not {before.get(load.guest)}"
