"""What a demonstration may claim of a snapshot and a restore, each claim with the evidence that it rests on.

The guests' own counters are judged, as found in stored RAM images (`read_cut`) or as told over their consoles. Where a
claim does not hold, `DisprovedError` is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from qsnap.model import VMSnapshot
from testbed.state import GuestState, StreamPhase, check_stamps, find_orphans, read_state

MIB = 1 << 20


class DisprovedError(Exception):
    """A claim does not hold; the message is what was found instead."""


@frozen
class Proof:
    """A claim that held, and why, in lines."""

    claim: str
    evidence: tuple[str, ...]


@frozen
class Cut:
    """What the stored RAM image of one VM says of its guest; `pages` were checked in full."""

    state: GuestState
    pages: int


def read_cut(vm: VMSnapshot, directory: Path) -> Cut:
    """Judge the RAM image of one VM; `directory` is the VNE's in the store. Takes time: every page is read."""
    return read_image(tuple(directory / block.file.path for block in vm.ram))


def read_image(image: tuple[Path, ...]) -> Cut:
    """The same, by the parts of the RAM image."""
    state = read_state(image)
    report = check_stamps(image, state)
    require(report.ok, f"the working set of guest {state.id} is damaged in {image}: {report}")
    return Cut(state, report.pages)


def prove_all(
    cuts: Sequence[Cut], killed: Sequence[GuestState], restored: Sequence[GuestState], end: Sequence[GuestState]
) -> tuple[Proof, ...]:
    """All, of a snapshot and what the guests said when they were killed, right after the restore, and at last."""
    return (
        prove_consistent(cuts),
        prove_memory(cuts),
        prove_went_back(cuts, killed, restored),
        prove_network(cuts, end),
        prove_streams(cuts, end),
    )


def prove_memory(cuts: Sequence[Cut]) -> Proof:
    """Every page is what its guest last wrote there; `read_cut` has raised where it is not."""
    pages = sum(cut.pages for cut in cuts)
    return Proof("No page of the saved memory is stale or torn.", (f"{pages:,} stamped pages read back and right",))


def prove_consistent(cuts: Sequence[Cut]) -> Proof:
    """Nothing was received in the snapshot that was not sent in it."""
    states = [cut.state for cut in cuts]
    orphans = find_orphans(states)
    require(not orphans, f"received, but never sent: {orphans}")
    received = sum(sum(state.received) for state in states)
    streamed = sum(state.incoming.bytes for state in states)
    return Proof(
        "The saved states are one: no guest has received what none had sent.",
        (f"{received:,} datagrams and {streamed / MIB:.1f} MiB of TCP, 0 orphans",),
    )


def prove_went_back(cuts: Sequence[Cut], killed: Sequence[GuestState], restored: Sequence[GuestState]) -> Proof:
    """The restored guests are those of the snapshot: the same boot, at or just after the cut, before the kill."""
    for cut, late, now in zip(cuts, killed, restored, strict=True):
        then = cut.state
        require(now.nonce == then.nonce, f"guest {then.id} has booted anew")
        require(
            then.ticks <= now.ticks < late.ticks and _sent_since(then, now) >= 0,
            f"guest {then.id} is at tick {now.ticks}, was saved at {then.ticks} and killed at {late.ticks}",
        )
    ticks = tuple(
        f"guest {now.id}: saved at tick {cut.state.ticks:,}, killed at {late.ticks:,}, restored it says {now.ticks:,}"
        for cut, late, now in zip(cuts, killed, restored, strict=True)
    )
    return Proof("What came back is the cut: no new boot, and nothing from after it.", ticks)


def prove_network(cuts: Sequence[Cut], end: Sequence[GuestState]) -> Proof:
    """After the restore datagrams flow again, each at most once, in order and from the same boot of its sender."""
    for cut, now in zip(cuts, end, strict=True):
        then = cut.state
        for counter in ("duplicates", "reordered", "stale", "foreign"):
            before, after = getattr(then, counter), getattr(now, counter)
            require(before == after, f"guest {now.id}: {counter} went from {before} to {after}")
        require(all(_grew(then, now)), f"guest {now.id} hears no datagrams of a peer")
    arrived = sum(sum(now.received) - sum(cut.state.received) for cut, now in zip(cuts, end, strict=True))
    return Proof(
        "Datagrams flow again: none twice, none out of order, none from another life of its sender.",
        (f"{arrived:,} received since the restore",),
    )


def prove_streams(cuts: Sequence[Cut], end: Sequence[GuestState]) -> Proof:
    """The TCP connections of before the snapshot went on, and were right from the first byte to the last."""
    for now in end:
        sender = end[now.incoming.peer - 1]
        phases = (now.incoming.phase, sender.outgoing.phase)
        require(phases == (StreamPhase.MATCHED, StreamPhase.MATCHED), f"stream to guest {now.id}: {phases}")
        require(now.stream_errors == now.stamp_errors == 0, f"guest {now.id} found errors: {now}")
    then = sum(cut.state.incoming.bytes for cut in cuts)
    total = sum(now.incoming.bytes for now in end)
    require(total > then, "no stream went on")
    return Proof(
        "Every TCP connection went on where it was saved, and ended with the right SHA-256.",
        (f"{len(end)} streams, {then / MIB:.1f} MiB before the cut, {(total - then) / MIB:.1f} MiB after",),
    )


def require(holds: bool, otherwise: str) -> None:
    """Raise DisprovedError unless `holds`."""
    if not holds:
        raise DisprovedError(otherwise)


def _sent_since(then: GuestState, now: GuestState) -> int:
    return min(after - before for before, after in zip(then.sent, now.sent, strict=True))


def _grew(then: GuestState, now: GuestState) -> list[bool]:
    """Whether more came from each peer."""
    return [now.received[peer] > then.received[peer] for peer in range(now.peers) if peer + 1 != now.id]
