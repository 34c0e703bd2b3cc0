"""Processes that are being started while the one that starts them is killed.

Between fork and exec a process has the command line of its parent, and for a moment none at all: nothing tells yet
what it will be, and no search by command line finds it. So whoever starts one that a failure must not leave behind
holds a lock, which the new process inherits; and whoever ends such processes waits until nobody has that lock.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def starting(directory: str) -> Iterator[int]:
    """A descriptor to be inherited by the process that is started in this block, for whatever `directory` is about.

    It stays open in that process, and means nothing once the block has ended. If ours is killed inside, it means
    `being_started` until the new process ends. The file system may be one without flock(2): there nothing is known.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_SH)
        yield fd
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # for all who have inherited it
    finally:
        os.close(fd)


def being_started(directory: str) -> bool:
    """Whether a process is being started for this directory, or was when its parent was killed and has not ended."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False
