"""Seals: how a large file is known to be unaltered without reading it.

A restore must be instant whatever the size of the RAM images, and yet refuse an altered one. So a file's
digest is remembered together with what the kernel says of the file: device, inode, size, and the times of
its last change. Of these, user space cannot set `ctime`. While all of them are as they were, the content is
what was hashed; when they are not, because the file was copied, touched or altered, it is hashed again.

A change within one tick of the kernel's clock after another leaves no trace in `ctime`. Therefore a file is
read only once its `ctime` is older than a tick (`_wait_until_settled`): whatever changes it from then on
has a later time, and so does not match the seal. That holds when the clock is set forward, too.

What seals cannot notice, a full verification does: decay of the medium, writes to the device below the file
system, a clock that root has set back, and, on tmpfs, writes through a shared memory mapping.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable

import trio
from attrs import asdict, frozen

from qsnap.errors import IntegrityError

Progress = Callable[[int], None]  #: is told, in the trio thread, the bytes dealt with since it was last told
Report = Callable[[int], None]  #: the same, called in a worker thread

_PIECE_BYTES = 4 << 20
_ZEROS = memoryview(bytes(_PIECE_BYTES))
_TICK_NS = 20_000_000  #: the kernel's clock tick is 10 ms at most
_COARSE_TICK_NS = 2_000_000_000  #: for file systems that keep whole seconds, or every other one


@frozen
class Seal:
    """What the kernel said of a file when its content had the digest `sha256`."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    sha256: str


Seals = dict[str, Seal]  #: by path, relative to the VNE's directory


def seal_of(status: os.stat_result, sha256: str) -> Seal:
    """The seal of a file of that `status`, if it has that digest."""
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return Seal(status.st_dev, status.st_ino, status.st_size, *times, sha256)


def take_seal(fd: int, file: str, report: Report) -> Seal:
    """Hash the open file `fd`, called `file` in messages, and seal it.

    Raises:
        IntegrityError: it changed while it was read.
    """
    _wait_until_settled(fd)
    before = os.fstat(fd)
    sha256 = _digest(fd, os.lseek(fd, 0, os.SEEK_END), report)
    seal = seal_of(before, sha256)
    if seal != seal_of(os.fstat(fd), sha256):
        raise IntegrityError("the file changed while it was read", file=file, advice="Find out what writes to it.")
    return seal


def encode_seals(seals: Seals) -> bytes:
    """The content of a seals file."""
    return json.dumps({path: asdict(seal) for path, seal in seals.items()}, indent=1).encode() + b"\n"


def parse_seals(data: bytes) -> Seals:
    """What a seals file holds. Anything wrong with it costs time only: without a seal a file is hashed."""
    try:
        return {path: Seal(**fields) for path, fields in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def reporter(progress: Progress | None) -> Report:
    """Carries `progress` from a worker thread to the trio thread, and cancellation the other way."""

    def report(done_bytes: int) -> None:
        trio.from_thread.check_cancelled()
        if progress is not None:
            trio.from_thread.run_sync(progress, done_bytes)

    return report


def _wait_until_settled(fd: int) -> None:
    ctime_ns = os.fstat(fd).st_ctime_ns
    tick_ns = _TICK_NS if ctime_ns % 1_000_000_000 else _COARSE_TICK_NS
    age_ns = time.time_ns() - ctime_ns
    if age_ns < tick_ns:
        time.sleep(min(tick_ns - age_ns, tick_ns) / 1e9)


def _digest(fd: int, size_bytes: int, report: Report) -> str:
    """The SHA-256 of the first `size_bytes`; leading holes of each piece are not read."""
    sha256 = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    offset = 0
    while offset < size_bytes:
        hole_bytes = min(_next_data(fd, offset, size_bytes) - offset, _PIECE_BYTES)
        if hole_bytes:
            piece = _ZEROS[:hole_bytes]
        else:
            wanted_bytes = min(size_bytes - offset, _PIECE_BYTES)
            piece = buffer[: os.preadv(fd, [buffer[:wanted_bytes]], offset)]
        if not piece:
            break  # the file was cut short meanwhile, which its status will tell
        sha256.update(piece)
        offset += len(piece)
        report(len(piece))
    return sha256.hexdigest()


def _next_data(fd: int, offset: int, size_bytes: int) -> int:
    """The first offset from `offset` on that is not in a hole; `size_bytes` if there is none."""
    try:
        return min(os.lseek(fd, offset, os.SEEK_DATA), size_bytes)
    except OSError as error:
        if error.errno == errno.EINVAL:  # a block device has no holes
            return offset
        if error.errno != errno.ENXIO:
            raise
        return size_bytes
