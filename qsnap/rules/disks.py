"""How each disk of a VM is kept, and why: the facts of a disk in, a decision or a refusal with a way out.

An overlay costs nothing, but the VM then writes to another file than before: that is for disks whose top file qsnap
has made. A file or volume of the user's stays in use. It is cloned where the file system can do that, or LVM, and
copied elsewhere.
"""

from __future__ import annotations

from attrs import frozen

from qsnap.errors import EngineRefusedError
from qsnap.model import DiskEngine

Version = tuple[int, int, int]

LONGEST_CHAIN = 8  #: layers of a disk in the store; one that has so many is merged into one before the next cut
INACTIVE_DISKS_REVIVED_SINCE: Version = (10, 0, 0)  #: blockdev-set-active
COPY_GIVES_WAY_SINCE: Version = (10, 1, 0)  #: on-cbw-error of blockdev-backup; before, a guest's write fails with it


@frozen
class DiskFacts:
    """What the choice depends on. `owned`: qsnap made the top file. `*_refusal`: why not; empty if it would work."""

    where: str
    owned: bool
    reflink_refusal: str
    lvm_refusal: str
    copy_refusal: str


@frozen
class DiskDecision:
    """The engine taken for a disk and the reason, as shown to the user."""

    engine: DiskEngine
    reason: str


def choose_disk_engine(wish: DiskEngine, facts: DiskFacts) -> DiskDecision:
    """The engine for one disk. Raises EngineRefusedError with the reason and a remedy."""
    if wish is not DiskEngine.AUTO:
        refusal = _refusal(wish, facts)
        if refusal:
            raise EngineRefusedError(f"{wish.value}: {refusal}", where=facts.where, advice=_ADVICE[wish])
        return DiskDecision(wish, "asked for")
    if facts.owned:
        return DiskDecision(DiskEngine.OVERLAY, "qsnap made the file that the VM writes to")
    if not facts.reflink_refusal:
        return DiskDecision(DiskEngine.REFLINK, "the file is the user's, and its file system can clone it")
    if not facts.lvm_refusal:
        return DiskDecision(DiskEngine.LVM, "the disk is a thin volume of the user's")
    if not facts.copy_refusal:
        return DiskDecision(DiskEngine.COPY, f"the file is the user's, and no clone of it: {facts.reflink_refusal}")
    raise EngineRefusedError(
        f"no way to keep it. reflink: {facts.reflink_refusal}; lvm: {facts.lvm_refusal}; copy: {facts.copy_refusal}",
        where=facts.where,
        advice=f"{_ADVICE[DiskEngine.COPY]} Or: {_ADVICE[DiskEngine.REFLINK]}",
    )


def _refusal(engine: DiskEngine, facts: DiskFacts) -> str:
    if engine is DiskEngine.REFLINK:
        return facts.reflink_refusal
    if engine is DiskEngine.LVM:
        return facts.lvm_refusal
    if engine is DiskEngine.COPY:
        return facts.copy_refusal
    return "" if facts.owned else "the VM must go on writing to this file, which is the user's"


_ADVICE = {
    DiskEngine.OVERLAY: "Take --disks reflink or copy.",
    DiskEngine.REFLINK: "Keep image and store on one btrfs or XFS, or take --disks copy.",
    DiskEngine.LVM: "Keep it on a thin volume (lvmthin(7)), or take --disks copy.",
    DiskEngine.COPY: "Make room in the store, remove old snapshots, or take --disks reflink.",
}
