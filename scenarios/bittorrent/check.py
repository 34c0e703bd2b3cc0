"""Whether what a swarm downloaded is right. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from scenarios.history import Finding, History, Run


@frozen
class Download:
    """A file that came over BitTorrent: to which guest, by which program, and what it was in the end.

    `process` names the process that fetched it: its number, and when it started, in clock ticks of the guest.
    """

    guest: str
    program: str
    process: str
    bytes: int
    sha256: str


@frozen
class Outcome:
    """What there was at the end. `sha256` and `bytes` are those of the file that the seeds had, known without them."""

    sha256: str
    bytes: int
    seeds: tuple[Download, ...]
    downloads: tuple[Download, ...]


def check(history: History[Outcome]) -> tuple[Finding, ...]:
    """The findings about all runs."""
    count = len(history.runs[0].outcome.downloads)
    return (
        Finding(
            "Every download is whole and right, by its SHA-256.",
            tuple(fault for run in history.runs for fault in _wrong(run)),
            f"{len(history.runs)} runs of {count} downloads of {history.runs[0].outcome.bytes / 1e6:.0f} MB",
        ),
        Finding(
            "All runs come to the same.",
            tuple(fault for run in history.runs[1:] for fault in _differences(history.runs[0], run)),
        ),
        Finding(
            "What was restored went on: the same processes finished the downloads.",
            tuple(fault for run in history.restored for fault in _new_processes(history.snapshotted, run)),
        ),
    )


def _wrong(run: Run[Outcome]) -> Iterator[str]:
    outcome = run.outcome
    if not outcome.downloads or not outcome.seeds:
        yield f"{run.title}: there is no download or no seed"
    for each in (*outcome.seeds, *outcome.downloads):
        if (each.bytes, each.sha256) != (outcome.bytes, outcome.sha256):
            yield f"{run.title}: {each.guest} has {each.bytes} bytes with {each.sha256}, which is not {outcome.sha256}"


def _files(run: Run[Outcome]) -> set[tuple[str, str, int, str]]:
    return {(each.guest, each.program, each.bytes, each.sha256) for each in run.outcome.downloads}


def _differences(first: Run[Outcome], run: Run[Outcome]) -> Iterator[str]:
    for guest, program, size, digest in sorted(_files(first) ^ _files(run)):
        yield f"{first.title} and {run.title} differ: {guest} with {program}, {size} bytes, {digest}"


def _new_processes(snapshotted: Run[Outcome], run: Run[Outcome]) -> Iterator[str]:
    before = {each.guest: each.process for each in snapshotted.outcome.downloads}
    for each in run.outcome.downloads:
        if before.get(each.guest) != each.process:
            yield f"{run.title}: {each.guest} finished with process {each.process}, not {before.get(each.guest)}"
