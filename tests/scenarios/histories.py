"""Good histories, for tests that make something wrong in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from attrs import evolve

from scenarios.bittorrent.check import Download, Outcome
from scenarios.history import Finding, History, Run, Sample, Saved, Way
from scenarios.processes import Worker

T = TypeVar("T")

GOOD, BAD = "aa" * 32, "bb" * 32
NAMES = ("background-colour-1", "precopy-barrier-2")


def sample(at_s: float, first: float, second: float) -> Sample:
    return Sample(at_s, {"tracker": first, "client-1": second})


def saved(name: str, at_s: float, first: float, second: float) -> Saved:
    return Saved(
        name, "background", "colour", sample(at_s, first, second), sample(at_s + 1, 0.9, 0.9), 2.0, 1.0, 900.0, 1
    )


def outcome(boot: int, digest: str = GOOD) -> Outcome:
    return Outcome(
        GOOD,
        1000,
        (Download("seed-1", "aria2", f"100:{boot}", 1000, GOOD),),
        (
            Download("tracker", "aria2", f"101:{boot}", 1000, GOOD),
            Download("client-1", "transmission", f"102:{boot}", 1000, digest),
        ),
    )


def good_history() -> History[Outcome]:
    boots = [{"tracker": f"{life}-1", "client-1": f"{life}-2"} for life in ("first", "second")]
    first = Run(Way.UNINTERRUPTED, outcome(1), boots[0], (sample(0, 0, 0), sample(9, 1, 1)))
    second = Run(
        Way.SNAPSHOTTED,
        outcome(2),
        boots[1],
        (sample(0, 0, 0), sample(3, 0.4, 0.2), sample(6, 0.8, 0.6), sample(9, 1, 1)),
        (saved(NAMES[0], 3, 0.4, 0.2), saved(NAMES[1], 6, 0.8, 0.6)),
    )
    third = Run(Way.RESTORED, outcome(2), boots[1], (sample(0, 0.5, 0.3), sample(5, 1, 1)), origin=NAMES[0])
    fourth = evolve(third, samples=(sample(0, 1, 0.6), sample(3, 1, 1)), origin=NAMES[1])
    return History((first, second, third, fourth))


WORKERS = (Worker("node-1", ("100:7",), "100:7"), Worker("node-2", ("90:8",), "90:8"))
OTHER_WORKERS = (Worker("node-1", ("100:6",), "100:6"), Worker("node-2", ("90:7",), "90:7"))


def history_of(uninterrupted: T, snapshotted: T, restored: T) -> History[T]:
    """Three runs that came to this."""
    samples = (sample(0, 0.5, 0.5), sample(1, 1, 1))
    first = Run(Way.UNINTERRUPTED, uninterrupted, {}, samples)
    second = Run(Way.SNAPSHOTTED, snapshotted, {}, samples)
    return History((first, second, Run(Way.RESTORED, restored, {}, samples, origin="one")))


def refuted_by(check: Callable[[History[T]], Sequence[Finding]], history: History[T]) -> list[str]:
    """The first three words of each claim that does not hold."""
    return [" ".join(finding.claim.split()[:3]) for finding in check(history) if not finding.held]
