"""Setting a guest free whose memory QEMU left write-protected.

Before 8.1 a QEMU whose background snapshot breaks off does not lift the protection: the guest stands still at its next
write to a page that was not saved, and nobody ever answers its fault (decision 0007). The kernel lifts the protection
for whoever holds the userfaultfd that it was made with, so a copy of QEMU's is taken and used in its place.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from struct import pack

import trio

from qsnap.errors import HostError
from qsnap.host.qemu import Process, open_pidfd

AGAIN_S = 0.2
LOOKS = 10
_PIDFD_GETFD = 438  # asm-generic/unistd.h; os has no pidfd_getfd(2)
_USERFAULTFD = "anon_inode:[userfaultfd]"
_UFFDIO_WRITEPROTECT = 0xC018AA06  # linux/userfaultfd.h
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WAKE = 0x8010AA02
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
_libc = ctypes.CDLL(None, use_errno=True)


async def release_memory(process: Process) -> int:
    """Lift all write protection by userfaultfd from a QEMU's memory; the number of ranges that had any.

    For a QEMU without a background snapshot, or with one that nobody wants: it would store a state that never was. A
    healthy VM has no such range, and nothing happens. Raises HostError where the kernel forbids it.
    """
    with open_pidfd(process) as pidfd:
        if pidfd is None:
            return 0
        try:
            return await trio.to_thread.run_sync(_release, process.pid, pidfd)
        except OSError as error:
            raise HostError(
                f"cannot lift the write protection from its memory: {error.strerror}",
                where=f"QEMU, process {process.pid}",
                advice="Run qsnap as root. The guest stands still until it is ended: qsnap down",
            ) from error


async def keep_releasing(process: Process) -> None:
    """Lift it again and again, of a QEMU that may protect its memory in a moment, and stand still then."""
    while True:
        await release_memory(process)
        await trio.sleep(AGAIN_S)


def _release(pid: int, pidfd: int) -> int:
    released = 0
    for _ in range(LOOKS):  # QEMU may be at it just now: what it protects after one look is found by the next
        protected = list(_protected_ranges(pid))
        if not protected:
            return released
        _release_ranges(pid, pidfd, protected)
        released += len(protected)
    begin, length = protected[0]
    raise OSError(0, f"{length} bytes at {begin:#x} are still protected")


def _release_ranges(pid: int, pidfd: int, protected: list[tuple[int, int]]) -> None:
    with ExitStack() as stack:
        copies = []
        for number in _userfaultfds(pid):
            copies.append(_take_descriptor(pidfd, number))
            stack.callback(os.close, copies[-1])
        for begin, length in protected:
            whole = pack("QQ", begin, length)
            _for_all(copies, _UFFDIO_WRITEPROTECT, pack("QQQ", begin, length, 0))
            _for_all(copies, _UFFDIO_UNREGISTER, whole)  # or the next background snapshot could not register it
            _for_all(copies, _UFFDIO_WAKE, whole)


def _for_all(userfaultfds: list[int], request: int, argument: bytes) -> None:
    for fd in userfaultfds:
        with suppress(OSError):  # the range belongs to another: one that was set free before stays open in QEMU
            fcntl.ioctl(fd, request, argument)


def _protected_ranges(pid: int) -> Iterator[tuple[int, int]]:
    """Address and length of the mappings with the flag `uw` (proc(5), smaps)."""
    begin = end = 0
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        if mapping := _MAPPING.match(line):
            begin, end = (int(address, 16) for address in mapping.groups())
        elif line.startswith("VmFlags:") and "uw" in line.split():
            yield begin, end - begin


def _userfaultfds(pid: int) -> Iterator[int]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(entry) == _USERFAULTFD:
                yield int(entry.name)


def _take_descriptor(pidfd: int, number: int) -> int:
    fd: int = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return fd
