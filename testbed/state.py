"""The test guest's own account of itself, read out of a RAM image: the judge of every snapshot.

`testbed/guest/state.h` states the layout and the order in which the guest updates it; what may differ at a
cut follows from that order, and nothing more is forgiven here. An image is a buffer or flat file of guest
RAM, or one file for each part of it, pages at their own offsets; where a page lies is unknown, so every page-aligned
offset is looked at.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from attrs import frozen

from qsnap.errors import QsnapError

PAGE_BYTES = 4096
PAGE_WORDS = PAGE_BYTES // 8
MAX_PEERS = 16
STATE_VERSION = 2
GENERATIONS = 504  #: entries of one table page
BODY_WORDS = PAGE_WORDS - 8
STATE_MAGIC = b"QSNAP guest stat"
TABLE_MAGIC = b"QSNAP guest tabl"
STAMP_MAGIC = b"QSNAP guest page"
MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15
CHUNK_PAGES = 1 << 14

Words: TypeAlias = npt.NDArray[np.uint64]
FilePath: TypeAlias = str | os.PathLike[str]
Image: TypeAlias = FilePath | tuple[FilePath, ...] | bytes | bytearray | memoryview  #: files: the parts of one RAM

SCALARS = (
    "ready", "ticks", "uptime_ms", "touched", "touching", "stamp_errors", "send_errors",
    "stream_errors", "streams_completed", "streams_matched", "worked", "timeouts",
)  # fmt: skip
PER_PEER = ("sent", "received", "highest", "duplicates", "reordered", "skipped", "stale", "foreign")
SCALARS_AT, PER_PEER_AT = 8, 24
STREAMS_AT = PER_PEER_AT + len(PER_PEER) * MAX_PEERS
STREAM_WORDS = 14


class GuestStateError(QsnapError):
    """An image holds no intact state of a test guest, or more than one."""


class StreamPhase(IntEnum):
    """What has become of a TCP stream; names and numbers of `enum phase`."""

    NONE = 0
    OPENING = 1
    OPEN = 2
    ENDING = 3
    MATCHED = 4
    MISMATCHED = 5
    BROKEN = 6


@frozen
class StreamState:
    """One end of a TCP stream. `digest` is the SHA-256 (hex) of its first `digest_bytes` bytes."""

    peer: int
    phase: StreamPhase
    bytes: int
    digest_bytes: int
    digest: str


@frozen
class GuestState:
    """Every counter of a guest, from an image or from its `status` answer.

    What is kept per peer is a tuple of `peers` numbers: that of guest `j` is at index `j - 1`.
    """

    id: int
    peers: int
    nonce: int
    stamp_pages: int
    ready: bool
    ticks: int
    uptime_ms: int
    touched: int
    touching: int
    stamp_errors: int
    send_errors: int
    stream_errors: int
    streams_completed: int
    streams_matched: int
    sent: tuple[int, ...]
    received: tuple[int, ...]
    highest: tuple[int, ...]
    duplicates: tuple[int, ...]
    reordered: tuple[int, ...]
    skipped: tuple[int, ...]
    stale: tuple[int, ...]
    foreign: tuple[int, ...]
    outgoing: StreamState
    incoming: StreamState
    worked: int = 0  #: only in an image, as the next
    timeouts: int = 0  #: retransmissions of TCP for want of an answer in time

    @classmethod
    def from_json(cls, answer: dict[str, Any]) -> GuestState:
        """The state in a guest's `status` or `finished` answer."""
        fields = dict(answer)
        for name in ("outgoing", "incoming"):
            fields[name] = StreamState(**{**answer[name], "phase": StreamPhase(answer[name]["phase"])})
        for name in PER_PEER:
            fields[name] = tuple(answer[name])
        return cls(**{**fields, "nonce": int(answer["nonce"], 16)})


@frozen
class StampReport:
    """What became of the working set.

    Attributes:
        pages: stamped pages found intact.
        in_progress: the page that the cut caught half rewritten, as it may be.
        missing: indices that no page of the image has.
        wrong: indices whose page is altered, stale, or there more than once.
        miscounted: the table's generations do not add up to the number of touches.
    """

    pages: int
    in_progress: int | None
    missing: tuple[int, ...]
    wrong: tuple[int, ...]
    miscounted: bool

    @property
    def ok(self) -> bool:
        """Whether the working set is what the guest believes it to be."""
        return not (self.missing or self.wrong or self.miscounted)


@frozen
class Orphan:
    """Something `receiver` had from `sender` that, at its own cut, `sender` had not sent.

    `kind` is "datagrams" (counts), "sequence" (the highest number seen) or "stream" (bytes of TCP).
    """

    kind: str
    receiver: int
    sender: int
    received: int
    sent: int


def mix64(value: int) -> int:
    """The guest's mixing function: splitmix64's step and output."""
    value = (value + STEP) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def mix64_all(values: Words) -> Words:
    """`mix64` of every element."""
    values = values + np.uint64(STEP)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def stamp_mix(nonce: int, indices: Words, generations: Words) -> Words:
    """The word that ties a page's index and generation to this boot."""
    return mix64_all(np.uint64(nonce) ^ mix64_all(indices << np.uint64(40) ^ generations))


# ---- finding pages ----


def _data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are not holes, widened to whole pages; all of it where holes are not told."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA) // PAGE_BYTES * PAGE_BYTES
            end = -(-os.lseek(fd, start, os.SEEK_HOLE) // PAGE_BYTES) * PAGE_BYTES
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: only a hole is left
                yield end, size
            return
        yield start, min(end, size)


def _file_chunks(path: str) -> Iterator[Words]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size // PAGE_BYTES * PAGE_BYTES
        if not size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            for start, end in _data_extents(file.fileno(), size):
                for at in range(start, end, CHUNK_PAGES * PAGE_BYTES):
                    # A copy, so that no view keeps the mapping alive.
                    part = image[at : min(at + CHUNK_PAGES * PAGE_BYTES, end)]
                    yield np.frombuffer(part, "<u8").reshape(-1, PAGE_WORDS)


def _chunks(image: Image) -> Iterator[Words]:
    """The image as arrays of (pages, 512) words, holes left out."""
    if isinstance(image, bytes | bytearray | memoryview):
        whole = len(image) // PAGE_BYTES * PAGE_BYTES
        yield np.frombuffer(memoryview(image)[:whole], "<u8").reshape(-1, PAGE_WORDS)
    elif isinstance(image, tuple):
        for path in image:
            yield from _file_chunks(os.fspath(path))
    else:
        yield from _file_chunks(os.fspath(image))


def _pages_with(magic: bytes, chunk: Words) -> Words:
    low, high = struct.unpack("<2Q", magic)
    found: Words = chunk[(chunk[:, 0] == low) & (chunk[:, 1] == high)]
    return found


# ---- the state block ----


def _header_is_intact(page: Words) -> bool:
    check = 0
    for word in page[:7].tolist():
        check = mix64(check ^ word)
    return check == int(page[7])


def _decode_stream(words: list[int]) -> StreamState:
    peer, phase, count, current = words[:4]
    digest_bytes, *digest = words[4 + 5 * (current & 1) :][:5]
    return StreamState(
        peer=peer,
        phase=StreamPhase(phase),
        bytes=count,
        digest_bytes=digest_bytes,
        digest=struct.pack("<4Q", *digest).hex(),
    )


def parse_state(page: Words) -> GuestState:
    """Decode one state page of 512 words whose header is intact."""
    words = page.tolist()
    version, nonce, guest, peers, stamp_pages = words[2:7]
    if version != STATE_VERSION or not 1 <= guest <= MAX_PEERS or not 1 <= peers <= MAX_PEERS:
        raise GuestStateError(
            f"state of version {version}, guest {guest} of {peers}: version {STATE_VERSION} is known",
            advice="rebuild the guest with scripts/guest",
        )
    counters: dict[str, Any] = dict(zip(SCALARS, words[SCALARS_AT:], strict=False))
    for k, name in enumerate(PER_PEER):
        start = PER_PEER_AT + k * MAX_PEERS
        counters[name] = tuple(words[start : start + peers])
    return GuestState(
        id=guest,
        peers=peers,
        nonce=nonce,
        stamp_pages=stamp_pages,
        ready=bool(counters.pop("ready")),
        outgoing=_decode_stream(words[STREAMS_AT:]),
        incoming=_decode_stream(words[STREAMS_AT + STREAM_WORDS :]),
        **counters,
    )


def read_state(image: Image) -> GuestState:
    """Find the one state block in an image of a guest's RAM and decode it."""
    pages = [page for chunk in _chunks(image) for page in _pages_with(STATE_MAGIC, chunk)]
    intact = [page for page in pages if _header_is_intact(page)]
    if len(intact) != 1:
        raise GuestStateError(
            f"{len(intact)} intact state blocks of {len(pages)} found, expected one",
            where="buffer" if isinstance(image, bytes | bytearray | memoryview) else str(image),
            advice="was the image taken before the guest said ready, or is it not the guest's main RAM?",
        )
    return parse_state(intact[0])


# ---- the working set ----


def _own_pages(image: Image, state: GuestState) -> tuple[Words, list[Words]]:
    """(generation table, stamp pages chunk by chunk) of this boot. A missing table page reads as all ones."""
    table = np.full(-(-state.stamp_pages // GENERATIONS) * GENERATIONS, MASK, np.uint64)
    stamps = []
    for chunk in _chunks(image):
        for page in _pages_with(TABLE_MAGIC, chunk):
            index = int(page[3])
            if page[2] == state.nonce and index * GENERATIONS < len(table):
                table[index * GENERATIONS : (index + 1) * GENERATIONS] = page[8:]
        pages = _pages_with(STAMP_MAGIC, chunk)
        stamps.append(pages[(pages[:, 2] == state.nonce) & (pages[:, 3] < state.stamp_pages)])
    return table[: state.stamp_pages], stamps


def _good_bodies(pages: Words, nonce: int) -> npt.NDArray[np.bool_]:
    seeds = mix64_all(np.uint64(nonce) + pages[:, 3])
    steps = np.arange(BODY_WORDS, dtype=np.uint64) * np.uint64(STEP)
    good: npt.NDArray[np.bool_] = (pages[:, 6:-2] == seeds[:, None] + steps).all(axis=1)
    return good


def _new_words(pages: Words, nonce: int, generations: Words) -> npt.NDArray[np.int64]:
    """How many of a page's four stamp words, in the order of writing, are one newer than the table.

    -1 where they are anything else than some new words followed by old ones.
    """
    indices, found = pages[:, 3], pages[:, [4, 5, -2, -1]]
    result = np.full(len(pages), -1, np.int64)
    versions = []
    for generation in (generations, generations + np.uint64(1)):
        mixes = stamp_mix(nonce, indices, generation)
        versions.append(np.stack([generation, mixes, generation, mixes], axis=1))
    old, new = versions
    for count in range(4, -1, -1):
        expected = np.concatenate([new[:, :count], old[:, count:]], axis=1)
        result[(found == expected).all(axis=1)] = count
    return result


def check_stamps(image: Image, state: GuestState) -> StampReport:
    """Verify every stamped page of an image against the guest's own table, all 4 KiB of it."""
    table, stamps = _own_pages(image, state)
    copies = np.zeros(state.stamp_pages, np.int64)
    wrong: set[int] = set()
    in_progress: int | None = None
    for pages in stamps:
        indices = pages[:, 3]
        np.add.at(copies, indices.astype(np.int64), 1)
        new = _new_words(pages, state.nonce, table[indices])
        bad = (new < 0) | (new > 0) & (indices != state.touching) | ~_good_bodies(pages, state.nonce)
        wrong.update(indices[bad].tolist())
        if (new > 0).any() and state.touching not in wrong:
            in_progress = state.touching
    wrong.update(np.flatnonzero(copies > 1).tolist())
    missing = tuple(np.flatnonzero(copies == 0).tolist())
    generations = sum(table.tolist())
    return StampReport(
        pages=state.stamp_pages - len(wrong) - len(missing),
        in_progress=in_progress,
        missing=missing,
        wrong=tuple(sorted(wrong)),
        miscounted=generations - state.touched not in (0, 1),  # the table comes before the count
    )


# ---- between guests ----


def _orphans_of_pair(receiver: GuestState, sender: GuestState) -> Iterator[Orphan]:
    sent = sender.sent[receiver.id - 1]
    pairs = [
        ("datagrams", receiver.received[sender.id - 1], sent),
        ("sequence", receiver.highest[sender.id - 1], sent),
    ]
    if receiver.incoming.peer == sender.id:
        pairs.append(("stream", receiver.incoming.bytes, sender.outgoing.bytes))
    for kind, received, available in pairs:
        if received > available:
            yield Orphan(kind, receiver.id, sender.id, received, available)


def find_orphans(states: Sequence[GuestState]) -> tuple[Orphan, ...]:
    """All that was received in these states and not sent in them: empty if they are one consistent cut."""
    return tuple(
        orphan
        for receiver in states
        for sender in states
        if receiver.id != sender.id
        for orphan in _orphans_of_pair(receiver, sender)
    )
