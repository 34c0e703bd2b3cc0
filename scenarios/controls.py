"""Negative controls: histories in which something is wrong, made of one in which nothing is. Pure.

A check that finds nothing in them proves nothing where it finds nothing either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from attrs import evolve, frozen

from scenarios.history import Finding, History, Run, Way

T = TypeVar("T")

MIXED = "one VM is of a later epoch than the others"


@frozen
class Control:
    """What was made wrong, and the claims that were refuted by it."""

    wrong: str
    refuted: tuple[str, ...]


@frozen
class Damage(Generic[T]):
    """What came of it where something was made wrong for real.

    Attributes:
        outcome: that of guests in which as little as can be was damaged.
        mixed: a run that was restored from one snapshot, but for one VM, which came from a later one; why it came to no
            end; or None where there were no two snapshots, or the programs may get over it.
        verdicts: what is wrong with some images, and what the scenario read out of them.
        flipped: what is said of a snapshot with one altered bit; empty if nothing is.
    """

    outcome: T
    mixed: Run[T] | str | None = None
    verdicts: tuple[tuple[str, Any], ...] = ()
    flipped: str = ""


def bad_histories(history: History[T], damage: Damage[T]) -> Iterator[tuple[str, History[T]]]:
    """What is wrong in each, and the history."""
    *others, last = history.runs
    first = history.runs[0]
    yield "what one guest made is damaged", History((*others, evolve(last, outcome=damage.outcome)))
    yield "the last run stopped early", History((*others, evolve(last, samples=last.samples[:1])))
    booted = evolve(first, way=Way.RESTORED, origin=last.origin)
    yield "a run that was booted anew passes for a restored one", History((*others, booted))
    yield "the last snapshot holds finished work", History((*others, evolve(last, samples=last.samples[-1:])))
    if isinstance(damage.mixed, Run):
        yield MIXED, History((*history.runs, damage.mixed))
    snapshotted = history.snapshotted
    for wrong, verdict in damage.verdicts:
        *saved, latest = snapshotted.saved
        run = evolve(snapshotted, saved=(*saved, evolve(latest, verdict=verdict)))
        yield wrong, History(tuple(run if each is snapshotted else each for each in history.runs))


def run_controls(
    check: Callable[[History[T]], Sequence[Finding]], history: History[T], damage: Damage[T]
) -> tuple[Control, ...]:
    """What the check finds in each bad history, and what was found before there was one."""
    found = [Control("a bit of a stored image is another one", (damage.flipped,) if damage.flipped else ())]
    if isinstance(damage.mixed, str):
        found.append(Control(MIXED, (f"That it comes to an end: {damage.mixed}",)))
    for wrong, bad in bad_histories(history, damage):
        found.append(Control(wrong, tuple(finding.claim for finding in check(bad) if not finding.held)))
    return tuple(found)


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
