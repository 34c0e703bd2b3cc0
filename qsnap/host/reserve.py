"""Memory that a receiver takes before the cut, and gives back piece by piece as it needs it for the store.

Memory that nobody has used lately may be slow to get. A host that is itself a virtual machine has to ask the machine
below: milliseconds for 2 MiB, against 0.1. A guest that is saved by `background` would wait for that whenever it writes
to memory that is not saved yet. What was given back last is what the kernel hands out first (mm/page_alloc.c).
"""

from __future__ import annotations

import errno
import mmap
import os
import time

PIECE_BYTES = 2 << 20  #: a huge page, which is taken and given back as a whole


class Reserve:
    """An unlinked file in `directory`, on tmpfs, of `wanted_bytes`, or of what could be written in `time_s`."""

    def __init__(self, directory: str, wanted_bytes: int, time_s: float) -> None:
        self._fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._needed_bytes = 0  # so far
        self.size_bytes = 0  #: that it holds
        ends_at = time.monotonic() + time_s
        try:
            with mmap.mmap(-1, PIECE_BYTES, mmap.MAP_PRIVATE) as zeros:
                while self.size_bytes < wanted_bytes and time.monotonic() < ends_at:
                    self.size_bytes += os.pwrite(self._fd, zeros, self.size_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            os.ftruncate(self._fd, 0)  # others need the room
            self.size_bytes = 0
        self._taken_bytes = self.size_bytes

    def give_back(self, count: int) -> None:
        """Make room for so many more bytes."""
        self._needed_bytes += count
        left = max(0, self._taken_bytes - self._needed_bytes) // PIECE_BYTES * PIECE_BYTES
        if left < self.size_bytes:
            os.ftruncate(self._fd, left)
            self.size_bytes = left

    def close(self) -> None:
        """Give back what is left."""
        os.close(self._fd)
