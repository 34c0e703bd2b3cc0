"""Which engine captures a VM, and why: the facts of a VM in, a decision or a refusal with a way out.

The figures behind the choice are in docs/benchmarks.md. Background on huge pages pauses a VM for the shortest time.
After it a guest's first write to each page waits, and so do other VMs for what it would send: a precopy that is held
until the cut pauses a little longer, and nothing waits afterwards. But its passes before the cut need processors: with
many VMs on few of those, everything waits for that. Where QEMU cannot be held, background on huge pages is next; on
4 KiB pages every first write to a page costs a fault, so precopy loses less as long as it converges.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from attrs import frozen

from qsnap.errors import EngineRefusedError
from qsnap.model import Accelerator, Engine, version_text
from qsnap.rules.disks import INACTIVE_DISKS_REVIVED_SINCE

Version = tuple[int, int, int]

USERFAULTFD_ADVICE = (
    "Root can allow it: sysctl vm.unprivileged_userfaultfd=1 or, from QEMU 8.0 on, access to /dev/userfaultfd."
)
_BLOCKED = "No engine can save such a VM: take away what is named, and start it again."

TCG_PRECOPY_SINCE: Version = (9, 0, 0)  #: "dirty bitmap coherency with TCG memory access"; corrupt images before

HELD_SINCE: Version = (8, 2, 0)  #: switchover-ack is one older, avail-switchover-bandwidth is not
SWITCHOVER_ACK_OPTIONAL_SINCE: Version = (11, 1, 0)  #: waited for if a device asks for it; machines of before: always

TRACKING_ENDS_ON_CANCEL_SINCE: Version = (8, 1, 0)
BACKGROUND_KEEPS_PAUSED_SINCE: Version = (9, 0, 0)  #: before, a background snapshot starts a paused VM


@frozen
class Facts:
    """What the choice depends on. `*_refusal` is QEMU's own reason, found by probing; empty if it would do it."""

    vm: str
    qemu_version: Version
    accelerator: Accelerator
    hugetlb: bool
    running: bool
    background_refusal: str
    precopy_refusal: str
    ram_blocks: int = 1  #: memory backends
    copies_disks: bool = False  #: a disk is kept by a copy that goes on after the cut
    holds: bool = False  #: its QEMU can be kept from the end of a precopy
    several: bool = False  #: there are other VMs, which wait for what it sends after the cut
    crowded: bool = False  #: so many VMs share the host's processors (`is_crowded`) that what each loses of them counts
    waits: bool = False  #: a barrier cut of several VMs: it stays paused until the slowest has stopped


@frozen
class Decision:
    """The engine taken and the reason, as shown to the user."""

    engine: Engine
    reason: str


def precopy_is_safe(version: Version, accelerator: Accelerator, ram_blocks: int) -> bool:
    """Whether QEMU's dirty log can be trusted.

    Under TCG it loses writes before QEMU 9.0, and since then those to any memory backend but the first: the TLB
    entries are reset of another part of memory (physical_memory_sync_dirty_bitmap, migration/ram.c).
    """
    return accelerator is Accelerator.KVM or (version >= TCG_PRECOPY_SINCE and ram_blocks == 1)


def must_be_told_to_hold(version: Version) -> bool:
    """Whether QEMU waits for an acknowledgement of the switchover only if it is started so (hw_compat_11_0)."""
    return version >= SWITCHOVER_ACK_OPTIONAL_SINCE


def can_hold(version: Version, machine_type: str, *, told: bool) -> bool:
    """Whether QEMU can be kept from the end of a precopy, so that the VM runs until it is stopped for the cut."""
    numbers = re.search(r"-(\d+)\.(\d+)$", machine_type)
    of_before = numbers is not None and (int(numbers[1]), int(numbers[2]), 0) < SWITCHOVER_ACK_OPTIONAL_SINCE
    return version >= HELD_SINCE and (told or of_before or not must_be_told_to_hold(version))


def is_crowded(vms: int, processors: int) -> bool:
    """Whether so many VMs are saved at once that processors are what they lack."""
    return vms > 2 * processors


def keeps_paused(version: Version) -> bool:
    """Whether a VM that was paused before a background snapshot is still paused when its state has been taken."""
    return version >= BACKGROUND_KEEPS_PAUSED_SINCE


def must_read_to_end(version: Version) -> bool:
    """Whether a background snapshot, once begun, has to be read to its end even if nobody wants it any more.

    Before QEMU 8.1 one that fails or is cancelled leaves guest RAM write-protected, and the guest stands still for
    ever ("migration: stop tracking ram writes when cancelling background migration").
    """
    return version < TRACKING_ENDS_ON_CANCEL_SINCE


def choose_engine(wish: Engine, facts: Facts) -> Decision:
    """The engine for one VM. Raises EngineRefusedError with QEMU's reason and a remedy."""
    background, precopy = _refusal(_check_background, facts), _refusal(_check_precopy, facts)
    if wish is Engine.AUTO:
        return _choose(facts, background, precopy)
    refused, otherwise = (background, precopy) if wish is Engine.BACKGROUND else (precopy, background)
    if refused is None:
        return Decision(wish, "asked for")
    if otherwise is None:
        refused.advice += " Or take precopy." if wish is Engine.BACKGROUND else " Or take background."
    raise refused


def _choose(facts: Facts, background: EngineRefusedError | None, precopy: EngineRefusedError | None) -> Decision:
    if not facts.running:
        by_background = background is None and keeps_paused(facts.qemu_version)
        if by_background or precopy is None:
            return Decision(Engine.BACKGROUND if by_background else Engine.PRECOPY, "it is paused, and stays so")
    if background is None and facts.hugetlb and (facts.crowded or not facts.several):
        return Decision(Engine.BACKGROUND, "RAM in huge pages: the shortest pause at any dirty rate")
    if precopy is None and facts.holds:
        return Decision(Engine.PRECOPY, "QEMU saves the RAM before the cut, and then only what was just written")
    if background is None and facts.hugetlb:
        return Decision(Engine.BACKGROUND, "RAM in huge pages: the shortest pause at any dirty rate")
    if background is None and facts.waits:
        return Decision(Engine.BACKGROUND, "a barrier cut: all VMs stop at once, and none waits for convergence")
    if precopy is None:
        why = "RAM in 4 KiB pages" if background is None else f"background refused: {background.message}"
        return Decision(Engine.PRECOPY, f"{why}; precopy loses less guest work while it converges")
    if background is None:
        return Decision(Engine.BACKGROUND, f"precopy refused: {precopy.message}")
    if background.message == precopy.message:
        raise precopy
    raise EngineRefusedError(
        f"no engine can capture it. background: {background.message}; precopy: {precopy.message}",
        where=f"VM {facts.vm}",
        advice=f"For background: {background.advice} For precopy: {precopy.advice}",
    )


def after_divergence() -> Decision:
    """What follows on a precopy that did not converge within its bounds, where background is possible too."""
    return Decision(Engine.BACKGROUND, "precopy did not converge: memory changes faster than it is saved")


def _refusal(check: Callable[[Facts], None], facts: Facts) -> EngineRefusedError | None:
    try:
        check(facts)
    except EngineRefusedError as refusal:
        return refusal
    return None


def _check_background(facts: Facts) -> None:
    if facts.background_refusal:
        of_any = facts.background_refusal == facts.precopy_refusal
        advice = _BLOCKED if of_any else _background_advice(facts.background_refusal)
        raise EngineRefusedError(facts.background_refusal, where=f"VM {facts.vm}", advice=advice)


def _background_advice(reason: str) -> str:
    if "memory" in reason.lower():
        return (
            "Its RAM cannot be write-protected (a file on disk, mapped at restore): restore with --ram eager, which "
            "copies the RAM into memory of the VM's own."
        )
    if "support" in reason.lower():
        return f"QEMU may not use the kernel's userfaultfd. {USERFAULTFD_ADVICE}"
    return "Take the device away that QEMU names."


def _check_precopy(facts: Facts) -> None:
    if facts.running and not precopy_is_safe(facts.qemu_version, facts.accelerator, facts.ram_blocks):
        raise _unsafe_precopy(facts)
    if facts.copies_disks and facts.qemu_version < INACTIVE_DISKS_REVIVED_SINCE:
        raise EngineRefusedError(
            "precopy cannot begin copies of disks before QEMU 10.0",
            where=f"VM {facts.vm}",
            advice="Take --disks overlay or reflink.",
        )
    if facts.precopy_refusal:
        raise EngineRefusedError(
            facts.precopy_refusal,
            where=f"VM {facts.vm}",
            advice=_BLOCKED,
        )


def _unsafe_precopy(facts: Facts) -> EngineRefusedError:
    if facts.qemu_version < TCG_PRECOPY_SINCE:
        return EngineRefusedError(
            f"precopy under TCG loses writes before QEMU 9.0, and this is {version_text(facts.qemu_version)}",
            where=f"VM {facts.vm}",
            advice="Start the VM with QEMU 9.0 or newer (scripts/qemu-alongside fetches one).",
        )
    return EngineRefusedError(
        f"precopy under TCG loses writes to memory in several pieces, and this VM's is in {facts.ram_blocks}",
        where=f"VM {facts.vm}",
        advice="Give the VM neither `numa` nor `dimms`.",
    )
