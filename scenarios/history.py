"""What happened in a scenario: values that checks judge, and that the result page and the JSON show. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Generic, TypeVar

from attrs import frozen

T = TypeVar("T")


class Way(Enum):
    """How the work of a run went."""

    UNINTERRUPTED = "uninterrupted"
    SNAPSHOTTED = "snapshotted"
    RESTORED = "restored"


@frozen
class Sample:
    """How far each guest had come: `done`, by guest, is a share of its work from 0 to 1."""

    at_s: float  #: since the work began; in a restored run, since the restore
    done: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The share of the whole work."""
        return sum(self.done.values()) / len(self.done)


@frozen
class Saved:
    """A snapshot that was taken while the guests worked, and what it cost.

    `before` is from right before it, `after` from when it was done: its cut is between them, nearer to the first.
    `verdict` is what the scenario read out of its images, if it does.
    """

    name: str
    engine: str
    cut: str
    before: Sample
    after: Sample
    downtime_ms: float  #: the longest of a VM
    discrepancy_ms: float
    total_ms: float  #: until the last byte of the last VM
    image_bytes: int
    verdict: Any = None


@frozen
class Run(Generic[T]):
    """One run of the work to its end. `boots` has the number that each guest's kernel makes up once."""

    way: Way
    outcome: T
    boots: Mapping[str, str]
    samples: tuple[Sample, ...]
    saved: tuple[Saved, ...] = ()
    planned: int = 0  #: how many snapshots were to be taken
    origin: str = ""  #: the snapshot that a restored run started from
    ready_ms: float = 0.0  #: how long its restore took

    @property
    def title(self) -> str:
        """What people call it."""
        return f"restored from {self.origin}" if self.way is Way.RESTORED else self.way.value


@frozen
class History(Generic[T]):
    """All runs of a scenario: first the uninterrupted one, then the one with snapshots, then those restored."""

    runs: tuple[Run[T], ...]

    @property
    def snapshotted(self) -> Run[T]:
        """The run that was saved in its middle."""
        return next(run for run in self.runs if run.way is Way.SNAPSHOTTED)

    @property
    def restored(self) -> tuple[Run[T], ...]:
        """The runs that began with a restore."""
        return tuple(run for run in self.runs if run.way is Way.RESTORED)


@frozen
class Finding:
    """A claim, and what speaks against it: it holds if there is nothing."""

    claim: str
    faults: tuple[str, ...]
    evidence: str = ""

    @property
    def held(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.faults
