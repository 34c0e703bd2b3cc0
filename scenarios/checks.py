"""What holds in every scenario, whatever the programs are. Pure: a history in, findings out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from scenarios.history import Finding, History, Run, Way

T = TypeVar("T")

EARLIEST, LATEST = 0.05, 0.95  #: a snapshot outside of these shares of the work is not one of its middle
STEP = 0.02  #: a guest that is asked twice while it works may say less than it has done, by so much


def check_history(history: History[T]) -> tuple[Finding, ...]:
    """Whether the history tells anything at all, and whether its restored runs are what they are said to be."""
    return (
        Finding("All three ways were gone to their end.", tuple(_missing_ways(history)), f"{len(history.runs)} runs"),
        Finding(
            "Every snapshot was taken in the middle of the work.",
            tuple(_outside(history)),
            ", ".join(f"{run.samples[0].mean:.0%} done when {run.origin} was restored" for run in history.restored),
        ),
        Finding(
            "Every restored guest is the one that was saved: the same boot, as far as it had come by then.",
            tuple(fault for run in history.restored for fault in _other_guests(history.snapshotted, run)),
            ", ".join(f"{each.before.mean:.0%} done before {each.name}" for each in history.snapshotted.saved),
        ),
    )


def _missing_ways(history: History[T]) -> Iterator[str]:
    for way in Way:
        runs = [run for run in history.runs if run.way is way]
        if not runs:
            yield f"no run is {way.value}"
        for run in runs:
            for guest, done in run.samples[-1].done.items():
                if done < 1:
                    yield f"{run.title}: {guest} ended at {done:.0%}"


def _outside(history: History[T]) -> Iterator[str]:
    saved, planned = history.snapshotted.saved, history.snapshotted.planned
    if not saved or len(saved) < planned:
        yield f"{len(saved)} of {planned} snapshots were taken before the work was done"
    for each in saved:
        if each.before.mean < EARLIEST:
            yield f"{each.name} was begun at {each.before.mean:.0%}"
    for run in history.restored:
        if run.samples[0].mean > LATEST:
            yield f"{run.origin} had {run.samples[0].mean:.0%} done when it was first looked at"


def _other_guests(snapshotted: Run[T], run: Run[T]) -> Iterator[str]:
    for guest, boot in run.boots.items():
        if snapshotted.boots.get(guest) != boot:
            yield f"{run.title}: {guest} has booted anew"
    saved = next((each for each in snapshotted.saved if each.name == run.origin), None)
    if saved is None:
        yield f"{run.title}: there is no such snapshot"
        return
    first = run.samples[0].done
    for guest, before in saved.before.done.items():
        now = first.get(guest, 0.0)
        if now < before - STEP:
            yield f"{run.title}: {guest} had done {before:.0%} before the snapshot and {now:.0%} after it"
