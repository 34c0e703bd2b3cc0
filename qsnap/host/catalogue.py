"""Looking at what is saved, checking it, and throwing it away."""

from __future__ import annotations

from qsnap.host.journal import Kind, Operation
from qsnap.host.place import Place, Progress, no_progress
from qsnap.host.recovery import exclusive
from qsnap.host.store import Store
from qsnap.model import Snapshot
from qsnap.rules.manifest import files_in


async def snapshots(vne: str | None = None, *, place: Place | None = None) -> tuple[Snapshot, ...]:
    """Every snapshot in the store, of one VNE or of all; of each VNE the oldest first."""
    return await _store(place).list(vne)


async def show(vne: str, name: str, *, place: Place | None = None) -> Snapshot:
    """What one snapshot holds. Raises StateError if there is none of that name, IntegrityError if it is damaged."""
    return await _store(place).load(vne, name)


async def verify(vne: str, name: str, *, place: Place | None = None, progress: Progress = no_progress) -> Snapshot:
    """Read every file of a snapshot. Raises IntegrityError naming the first that is not what was stored."""
    store = _store(place)
    total = sum(file.size_bytes for file in files_in(await store.load(vne, name)))
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress("verify", vne, done, total)

    return await store.verify(vne, name, count)


async def remove(vne: str, name: str, *, place: Place | None = None) -> tuple[str, ...]:
    """Remove a snapshot, and the files that no other snapshot and no running VM needs; returns their paths."""
    place = place or Place()
    runtime = place.runtime()
    async with exclusive(runtime, vne) as journal:
        in_use = runtime.load(vne).files_in_use() if vne in runtime.names() else ()
        journal.begin(Operation(Kind.REMOVE, name, str(place.store)))
        return await place.snapshots().remove(vne, name, in_use)


def _store(place: Place | None) -> Store:
    return (place or Place()).snapshots()
