"""Work in rounds, each of which needs the one before from all workers: a line is what came of a round. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from attrs import frozen

from scenarios.history import Finding, History, Run
from scenarios.processes import Worker, check_workers


@frozen
class Outcome:
    """What came of the rounds, and who had a part. `last` is the last line where that is known without the guests."""

    asked: int  #: rounds
    lines: tuple[str, ...]
    workers: tuple[Worker, ...]
    last: str = ""


def check(history: History[Outcome]) -> tuple[Finding, ...]:
    """The findings about all runs."""
    first = history.runs[0].outcome
    return (
        Finding(
            "All rounds were made, once each, and as is known without the guests if that can be.",
            tuple(fault for run in history.runs for fault in _missing(run)),
            f"{len(history.runs)} runs of {first.asked} rounds",
        ),
        Finding(
            "All runs come to the same in every round and every digit.",
            tuple(fault for run in history.runs[1:] for fault in _differences(first.lines, run)),
            f"the last is {first.lines[-1] if first.lines else 'missing'}",
        ),
        check_workers(history, lambda outcome: outcome.workers),
    )


def _missing(run: Run[Outcome]) -> Iterator[str]:
    numbers = [line.split(" ")[0] for line in run.outcome.lines]
    if numbers != [str(number + 1) for number in range(run.outcome.asked)] or not numbers:
        yield f"{run.title}: there are {len(numbers)} rounds, or some twice, not 1 to {run.outcome.asked}"
    elif run.outcome.last and run.outcome.lines[-1] != run.outcome.last:
        yield f"{run.title}: the last round is {run.outcome.lines[-1]}, not {run.outcome.last}"


def _differences(expected: tuple[str, ...], run: Run[Outcome]) -> Iterator[str]:
    for before, now in zip_longest(expected, run.outcome.lines):
        if before != now:
            yield f"{run.title}: a round is {now}, not {before}"
            return
