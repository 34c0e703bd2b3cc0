"""Whether what guests keep count of adds up, in the images of snapshots and in the end. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from scenarios.history import Finding, History, Run, Saved
from testbed.state import GuestState


@frozen
class Verdict:
    """What the images of one snapshot say."""

    sent: int  #: datagrams, by all guests to all others
    orphans: int  #: counts of what was received that are above what was sent
    wrong_pages: int  #: of the working sets: altered, stale, missing, or there twice


Outcome = tuple[GuestState, ...]


def check(history: History[Outcome]) -> tuple[Finding, ...]:
    """The findings about all snapshots, and about the ends of all runs."""
    saved = history.snapshotted.saved
    sent = [each.verdict.sent for each in saved if each.verdict is not None]
    pages = sum(state.stamp_pages for state in history.runs[0].outcome)
    return (
        Finding(
            "In no snapshot something was received that was not sent in it.",
            tuple(_orphans(saved)),
            f"{len(saved)} snapshots; {max(sent, default=0) - min(sent, default=0)} datagrams were sent meanwhile",
        ),
        Finding(
            "In every snapshot each page of memory is of the one moment.",
            tuple(f"{each.name}: {each.verdict.wrong_pages} pages" for each in saved if each.verdict.wrong_pages),
            f"{pages} pages of every snapshot, each by its stamp",
        ),
        Finding(
            "All streams ended with the right digest, and nothing was delivered twice.",
            tuple(fault for run in history.runs for fault in _wrong(run)),
            f"{sum(state.streams_matched for run in history.runs for state in run.outcome)} ends of streams",
        ),
    )


def _orphans(saved: tuple[Saved, ...]) -> Iterator[str]:
    before = 0
    for each in saved:
        if each.verdict.orphans:
            yield f"{each.name}: {each.verdict.orphans}"
        if each.verdict.sent <= before:
            yield f"{each.name}: nothing was sent since the snapshot before it"
        before = each.verdict.sent


def _wrong(run: Run[Outcome]) -> Iterator[str]:
    for state in run.outcome:
        for what, count in (
            ("pages of its memory are wrong", state.stamp_errors),
            ("datagrams came twice", sum(state.duplicates)),
            ("streams failed", state.stream_errors + state.streams_completed - state.streams_matched),
        ):
            if count:
                yield f"{run.title}: guest {state.id}: {count} {what}"
        if not state.streams_matched:
            yield f"{run.title}: guest {state.id}: no stream came to its end"
