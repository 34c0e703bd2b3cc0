"""Negative controls: histories in which something is wrong, made of one in which nothing is. Pure.

A check that finds nothing in them proves nothing where it finds nothing either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from attrs import evolve, frozen

from scenarios.history import Finding, History, Way

T = TypeVar("T")


@frozen
class Control:
    """What was made wrong, and the claims that were refuted by it."""

    wrong: str
    refuted: tuple[str, ...]


def bad_histories(history: History[T], spoiled: T) -> Iterator[tuple[str, History[T]]]:
    """What is wrong in each, and the history. `spoiled` is an outcome that was damaged in the guests."""
    *others, last = history.runs
    first = history.runs[0]
    yield "what one guest made is damaged", History((*others, evolve(last, outcome=spoiled)))
    yield "the last run stopped early", History((*others, evolve(last, samples=last.samples[:1])))
    booted = evolve(first, way=Way.RESTORED, origin=last.origin)
    yield "a run that was booted anew passes for a restored one", History((*others, booted))
    yield "the last snapshot holds finished work", History((*others, evolve(last, samples=last.samples[-1:])))


def run_controls(
    check: Callable[[History[T]], Sequence[Finding]], history: History[T], spoiled: T
) -> tuple[Control, ...]:
    """What the check finds in each bad history."""
    return tuple(
        Control(wrong, tuple(finding.claim for finding in check(bad) if not finding.held))
        for wrong, bad in bad_histories(history, spoiled)
    )


def check_controls(findings: Sequence[Finding], controls: Sequence[Control]) -> Finding:
    """Whether each control refuted something, and each claim was refuted by a control."""
    refuted = {claim for control in controls for claim in control.refuted}
    idle = [f"nothing is found where {control.wrong}" for control in controls if not control.refuted]
    empty = [f"no control refutes: {finding.claim}" for finding in findings if finding.claim not in refuted]
    return Finding(
        "Every check finds what is wrong where something was made wrong.",
        tuple(idle + empty),
        f"{len(controls)} negative controls",
    )
