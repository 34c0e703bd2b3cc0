"""Migration streams: read or refused with StreamError, the same in whatever pieces they come; and what was read is
what the snapshot's files hold."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qsnap.errors import StreamError
from qsnap.host.receiver import Snapshot
from qsnap.wire.stream import StreamReader
from tests.wire.folding import Folded, chunked, events, fold

RAM_LIMIT = 1 << 20
BACKED = ("pc.ram",)


def check(data: bytes) -> None:
    whole = outcome([data])
    pieces = range(1, len(data) + 1, 1 + len(data) // 16)
    assert outcome(chunked(data, pieces)) == whole
    with tempfile.TemporaryDirectory() as directory, closing_all():
        if apply(data, directory):
            assert isinstance(whole, Folded)
            check_files(whole, Path(directory))


def small_reader() -> StreamReader:
    return StreamReader(ram_limit_bytes=RAM_LIMIT, tail_limit_bytes=RAM_LIMIT, buffer_bytes=0)


def outcome(chunks: Iterable[bytes]) -> Folded | str:
    """What the stream comes to, or why it is refused."""
    try:
        return fold(chunks, small_reader())
    except StreamError as error:
        return str(error)


def apply(data: bytes, directory: str) -> bool:
    """Make a snapshot's files of the stream; whether it was accepted."""
    snapshot = Snapshot(directory, BACKED, None)
    try:
        for event in events(small_reader(), [data]):
            snapshot.apply(event)
    except StreamError:
        return False
    snapshot.finish()
    return True


def check_files(whole: Folded, directory: Path) -> None:
    assert whole.ram is not None
    for idstr in BACKED:
        assert (directory / f"{idstr}.ram").read_bytes() == whole.images[idstr]
    rest = fold([(directory / "device.stream").read_bytes()], small_reader())
    assert rest.ram is not None
    assert rest.ram.blocks == whole.ram.blocks
    assert rest.devices == whole.devices
    assert rest.sent == {page for page in whole.sent if page[0] not in BACKED}
    for idstr in whole.images.keys() - set(BACKED):
        assert rest.images[idstr] == whole.images[idstr]


@contextmanager
def closing_all() -> Iterator[None]:
    """Close what is opened inside: a receiver leaves that to the end of its process."""
    before = set(os.listdir("/proc/self/fd"))
    try:
        yield
    finally:
        for fd in set(os.listdir("/proc/self/fd")) - before:
            with suppress(OSError):  # the listing's own
                os.close(int(fd))
