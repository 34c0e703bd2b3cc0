"""Whether molecules moved as they do when nobody disturbs them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from math import prod

from attrs import frozen

from scenarios.history import Finding, History, Run
from scenarios.processes import Worker, check_workers

GRID = re.compile(r"^ *(\d+) by (\d+) by (\d+) MPI processor grid", re.MULTILINE)
THERMO = re.compile(r"^ *\d+(?: +-?\d[\d.e+-]*){4} *$", re.MULTILINE)


@frozen
class Outcome:
    """What LAMMPS told. A line of `thermo` is of one step: its number, temperature, energies and pressure."""

    ranks: int  #: that the work was divided among
    last_step: int  #: that was asked for
    thermo: tuple[str, ...]
    atoms_sha256: str  #: of where each atom was in the end, and how fast
    workers: tuple[Worker, ...]


def parse_log(text: str, last_step: int, atoms_sha256: str, workers: tuple[Worker, ...]) -> Outcome:
    """The outcome, of the text of LAMMPS's log. What is not there is missing in it."""
    grid = GRID.search(text)
    lines = tuple(" ".join(line.split()) for line in THERMO.findall(text))
    return Outcome(prod(map(int, grid.groups())) if grid else 0, last_step, lines, atoms_sha256, workers)


def check(history: History[Outcome]) -> tuple[Finding, ...]:
    """The findings about all runs."""
    first = history.runs[0].outcome
    return (
        Finding(
            "All steps were computed, by all ranks.",
            tuple(fault for run in history.runs for fault in _missing(run)),
            f"{len(history.runs)} runs of {first.last_step} steps by {first.ranks} ranks",
        ),
        Finding(
            "All runs come to the same, in every digit: temperature, energies, pressure, and each atom in the end.",
            tuple(fault for run in history.runs[1:] for fault in _differences(history.runs[0], run)),
            f"{len(first.thermo)} lines, the last of which is {first.thermo[-1] if first.thermo else 'none'}",
        ),
        check_workers(history, lambda outcome: outcome.workers),
    )


def _missing(run: Run[Outcome]) -> Iterator[str]:
    outcome = run.outcome
    if outcome.ranks != len(outcome.workers):
        yield f"{run.title}: {outcome.ranks} ranks divided the work, on {len(outcome.workers)} guests"
    if not outcome.thermo or outcome.thermo[-1].split()[0] != str(outcome.last_step):
        yield f"{run.title}: the last line is {outcome.thermo[-1:]}, not that of step {outcome.last_step}"


def _differences(first: Run[Outcome], run: Run[Outcome]) -> Iterator[str]:
    for before, now in zip_longest(first.outcome.thermo, run.outcome.thermo):
        if before != now:
            yield f"{run.title}: a line is {now}, not {before}"
            return
    if first.outcome.atoms_sha256 != run.outcome.atoms_sha256:
        yield f"{run.title}: the atoms in the end have {run.outcome.atoms_sha256}, not {first.outcome.atoms_sha256}"
