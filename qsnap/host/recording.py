"""Recording a migration stream: copied into one file as it comes, and looked at only once it has ended."""

from __future__ import annotations

import os
from collections.abc import Callable

from qsnap.errors import HostError
from qsnap.wire.events import Configuration
from qsnap.wire.records import RamSetup
from qsnap.wire.stream import StreamReader
from qsnap.wire.tail import TAIL_BYTES, Tail

_PIECE_BYTES = 4 << 20  #: as much as a widened pipe holds


def record(stream_fd: int, fd: int, limit_bytes: int, wait: Callable[[], None], report: Callable[[int], None]) -> int:
    """Move the pipe `stream_fd` into the file `fd` until it ends; how many bytes that were.

    `wait` returns when the pipe has something, `report` is told how much has come. Raises HostError once there is
    more than `limit_bytes`.
    """
    done = 0
    while True:
        wait()
        count = os.splice(stream_fd, fd, min(_PIECE_BYTES, limit_bytes + 1 - done))
        if not count:
            return done
        done += count
        if done > limit_bytes:
            raise HostError(
                f"the recorded stream would grow beyond its limit of {limit_bytes} bytes: "
                "memory changes about as fast as it is sent",
                advice="Take the engine precopy, whose image is never larger than the memory.",
            )
        report(done)


def check_ends(fd: int, size_bytes: int, ram_limit_bytes: int, target_page_size: int) -> tuple[Configuration, RamSetup]:
    """What a recorded stream says of its machine and RAM, if it begins and ends as a whole stream does.

    Raises StreamError. What lies between is not read: QEMU wrote it, and said that it has written everything.
    """
    reader = StreamReader(ram_limit_bytes=ram_limit_bytes, tail_limit_bytes=0, target_page_size=target_page_size)
    reader.buffer_updated(os.preadv(fd, [reader.get_buffer()], 0))
    reader.buffer_updated(0)
    configuration = reader.next_event()
    assert isinstance(configuration, Configuration)
    while not isinstance(ram := reader.next_event(), RamSetup):
        pass  # commands; the end of what was given is an error
    tail = Tail(configuration.target_page_size)
    tail.feed(memoryview(os.pread(fd, TAIL_BYTES, max(0, size_bytes - TAIL_BYTES))))
    tail.check_complete(size_bytes)
    return configuration, ram
