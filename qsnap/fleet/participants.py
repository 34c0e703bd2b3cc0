"""What takes part in an operation: this host in the process itself, or another one through its agent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Protocol

from attrs import frozen

from qsnap.host.keeping import Keeper, Keeping
from qsnap.host.lifecycle import Up, open_up
from qsnap.host.place import Place, Progress
from qsnap.host.restoring import Restoring, open_restoring
from qsnap.host.saving import Saving, open_saving
from qsnap.model import Cut, Outcome, RestoreOrder, SnapshotOrder, UpOrder
from qsnap.rules.commit import CUTS, SNAPSHOT_BARRIER, SNAPSHOT_COLOUR, START, Phase

Order = UpOrder | SnapshotOrder | RestoreOrder


class Participant(Protocol):
    """One host's part of an operation. What `perform` and `commit` return depends on the operation."""

    @property
    def round_trip_s(self) -> float:
        """What a message and its answer may take."""

    async def perform(self, phase: Phase, at_s: float = 0.0) -> Any:
        """Do all that a phase asks of this host; a cut not before `at_s`, on the clock of `qsnap.host.clock`."""

    async def commit(self, outcome: Outcome) -> Any:
        """Make it last. The last phase is done."""

    async def undo(self) -> None:
        """Take all of it back."""

    async def inquire(self) -> Outcome | None:
        """What became of a commit that was not answered; None if it was undone."""


Open = Callable[[Order, Place, Progress], AbstractAsyncContextManager[Participant]]  #: begins this host's part


def vne_of(order: Order) -> str:
    """The name of the VNE that it is about."""
    return order.vne.name if isinstance(order, UpOrder) else order.vne


def phases_of(order: Order) -> tuple[Phase, ...]:
    """The phases that an operation has, in their order."""
    if not isinstance(order, SnapshotOrder):
        return START
    return SNAPSHOT_BARRIER if order.cut is Cut.BARRIER else SNAPSHOT_COLOUR


@frozen
class Local:
    """This host's part, in this process."""

    work: Saving | Up | Restoring
    round_trip_s: float = 0.0

    @property
    def keeping(self) -> Keeping | None:
        """What this host keeps for others, where others' VMs are saved."""
        return self.work.keeping if isinstance(self.work, Saving) else None

    async def perform(self, phase: Phase, at_s: float = 0.0) -> Any:
        """`tuple[VMSnapshot, ...]` for COLLECT; else nothing."""
        step = getattr(self.work, phase.value)
        return await (step(at_s) if phase in CUTS else step())

    async def commit(self, outcome: Outcome) -> Any:
        """A Snapshot, a VNEStatus or a RestoreReport."""
        if isinstance(self.work, Saving):
            return await self.work.commit(outcome)
        return await self.work.commit()

    async def undo(self) -> None:
        """Take all of it back."""
        await self.work.undo()

    async def inquire(self) -> Outcome | None:
        """It was undone, or will be: nothing is between, and what fails here is not committed."""
        return None


@asynccontextmanager
async def open_local(order: Order, place: Place, progress: Progress) -> AsyncIterator[Local]:
    """This host's part of an operation, which is undone if the block is left without a commit."""
    match order:
        case SnapshotOrder():
            opened: Any = open_saving(order, place.runtime(), progress, partial(_open_keeper, place))
        case UpOrder():
            opened = open_up(order, place, progress)
        case RestoreOrder():
            opened = open_restoring(order, place, progress)
    async with opened as work:
        yield Local(work)


def _open_keeper(place: Place, *args: Any, **options: Any) -> AbstractAsyncContextManager[tuple[Keeper, int]]:
    from qsnap.fleet.keeping import open_keeper  # TLS and certificates take a while to import, and few need them

    return open_keeper(place, *args, **options)
