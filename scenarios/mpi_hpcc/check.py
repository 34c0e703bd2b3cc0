"""Whether the HPC Challenge found its own results right, and found what it finds when nobody disturbs it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from attrs import frozen

from scenarios.history import Finding, History, Run
from scenarios.processes import Worker, check_workers

#: Locations of the table that are wrong. Where a rank has several receives at once, the word that another has ended may
#: overtake that one's last updates, which are lost then (RandomAccess/MPIRandomAccess.c, USE_MULTIPLE_RECV): HPCC lets
#: one in a hundred pass.
LOCATIONS = ("MPIRandomAccess_Errors", "MPIRandomAccess_LCG_Errors")
ORDERLY_RANKS = 4  #: at most so many, and each has one receive at a time
LOST_SHARE = 0.01
ERRORS = ("PTRANS_residual", *LOCATIONS)  #: that are to be 0
#: What the summary has that does not depend on time. PTRANS_n does: it is of the fastest of several (pdtransdriver.c).
NUMBERS = (
    *ERRORS,
    "Success",
    "CommWorldProcs",
    "DGEMM_N",
    "MPIRandomAccess_N",
    "MPIFFT_N",
    "MPIFFT_maxErr",
)
SYSTEM = re.compile(r"^W\w+ +(\d+) +(\d+) +(\d+) +(\d+) .*\n-+\n.*\)= +(\S+) \.+ (\w+)$", re.MULTILINE)


@frozen
class System:
    """A system of linear equations that was solved: its order, in blocks, on a grid of ranks."""

    order: int
    block: int
    rows: int
    columns: int


@frozen
class Outcome:
    """What hpccoutf.txt says. Residuals, as they are printed, and whether they passed, are of `asked` in order."""

    asked: tuple[System, ...]
    solved: tuple[tuple[System, str, bool], ...]
    failed: int  #: checks of any benchmark that failed, by the word
    numbers: Mapping[str, str]
    workers: tuple[Worker, ...]


def parse_output(text: str, asked: tuple[System, ...], workers: tuple[Worker, ...]) -> Outcome:
    """The outcome, of the text of hpccoutf.txt. What is not there is missing in it."""
    solved = [(System(*map(int, found[:4])), found[4], found[5] == "PASSED") for found in SYSTEM.findall(text)]
    summary = dict(line.split("=", 1) for line in text.partition("Begin of Summary")[2].splitlines() if "=" in line)
    numbers = {name: summary.get(name, "") for name in NUMBERS}
    return Outcome(asked, tuple(solved), text.count("FAILED"), numbers, workers)


def check(history: History[Outcome]) -> tuple[Finding, ...]:
    """The findings about all runs."""
    first = history.runs[0].outcome
    return (
        Finding(
            "All benchmarks came to their end and verified their results, of the sizes that were asked for.",
            tuple(fault for run in history.runs for fault in _unverified(run.title, run.outcome)),
            f"{len(history.runs)} runs by {len(first.workers)} ranks, of {len(first.asked)} systems each",
        ),
        Finding(
            "All runs come to the same residuals and errors, in every digit.",
            tuple(fault for run in history.runs[1:] for fault in _differences(history.runs[0], run)),
            f"residuals {', '.join(sorted({residual for _, residual, _ in first.solved}))}; "
            f"largest error of the Fourier transform {first.numbers['MPIFFT_maxErr']}",
        ),
        check_workers(history, lambda outcome: outcome.workers),
    )


def _unverified(title: str, outcome: Outcome) -> Iterator[str]:
    numbers = outcome.numbers
    if numbers["Success"] != "1" or outcome.failed:
        yield f"{title}: Success is {numbers['Success'] or 'not told'}, {outcome.failed} checks failed"
    if numbers["CommWorldProcs"] != str(len(outcome.workers)):
        yield f"{title}: there were {numbers['CommWorldProcs']} ranks on {len(outcome.workers)} guests"
    if tuple(system for system, _, _ in outcome.solved) != outcome.asked or not outcome.asked:
        yield f"{title}: {len(outcome.solved)} systems were solved, which are not the {len(outcome.asked)} asked for"
    for system, residual, passed in outcome.solved:
        if not passed:
            yield f"{title}: {system} has a residual of {residual}"
    for name in ERRORS:
        allowed = LOST_SHARE * float(numbers["MPIRandomAccess_N"] or 0) if name in _disorderly(outcome) else 0.0
        if not float(numbers[name] or "nan") <= allowed:
            yield f"{title}: {name} is {numbers[name] or 'not told'}"


def _differences(first: Run[Outcome], run: Run[Outcome]) -> Iterator[str]:
    for before, now in zip(first.outcome.solved, run.outcome.solved, strict=False):
        if before != now:
            yield f"{run.title}: the residual of {now[0]} is {now[1]}, not {before[1]}"
    for name, number in first.outcome.numbers.items():
        if run.outcome.numbers[name] != number and name not in _disorderly(first.outcome):
            yield f"{run.title}: {name} is {run.outcome.numbers[name]}, not {number}"


def _disorderly(outcome: Outcome) -> tuple[str, ...]:
    """The numbers that are not the same whenever HPCC is run."""
    return LOCATIONS if len(outcome.workers) > ORDERLY_RANKS else ()
