"""Looking into a running guest from outside: its counters are read out of QEMU's memory, so it is not disturbed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
from attrs import frozen

from qsnap.host.qmp import open_loop, open_qmp
from testbed.state import PAGE_BYTES, PAGE_WORDS, STATE_MAGIC, GuestState, GuestStateError, parse_state, read_state

PAGEMAP_ENTRY_BYTES = 8
PRESENT = np.uint64(1 << 63)  #: in /proc/PID/pagemap
CHUNK_PAGES = 1024
READ_AT_ONCE_S = 0.0005  #: a sample that takes longer was interrupted, and its time is not known well enough


@frozen
class Sample:
    """What a guest had done by an instant of `time.perf_counter`: touches of pages, and other work of that size."""

    instant_s: float
    work: int


class Probe:
    """The state page of one test guest: at `offset` in its RAM, which begins at `base` in the file at `path`."""

    def __init__(self, path: str, base: int, offset: int) -> None:
        self.path = path
        self.offset = offset
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._address = base + offset

    def close(self) -> None:
        """The guest does not notice this either."""
        os.close(self._fd)

    def state(self) -> GuestState:
        """All counters."""
        return parse_state(np.frombuffer(os.pread(self._fd, PAGE_BYTES, self._address), "<u8"))

    def word(self, index: int) -> int:
        """One 8-byte word of the state page."""
        return int.from_bytes(os.pread(self._fd, 8, self._address + 8 * index), "little")

    def place(self, index: int) -> tuple[str, int]:
        """The file that such a word is in, and where."""
        return self.path, self._address + 8 * index

    def sample(self) -> Sample:
        """The guest's progress and the instant of it."""
        while True:
            before = time.perf_counter()
            state = self.state()
            after = time.perf_counter()
            if after - before < READ_AT_ONCE_S:
                return Sample((before + after) / 2, state.touched + state.worked)


async def open_probe(pid: int, monitor_path: str, memory_bytes: int) -> Probe:
    """Find the state page of the guest that runs in this QEMU."""
    base = await find_ram(monitor_path)
    return Probe(memory_path(pid), base, _find_state(pid, base, memory_bytes))


def memory_path(pid: int) -> str:
    """The memory of a process, as a file."""
    return f"/proc/{pid}/mem"


async def find_ram(monitor_path: str) -> int:
    """Where guest RAM begins in QEMU's memory."""
    async with open_loop(), open_qmp(monitor_path, vm="probe") as qmp:
        answer = await qmp.execute("human-monitor-command", {"command-line": "gpa2hva 0"})
    found = re.search(r"is (0x[0-9a-f]+)", answer)
    if not found:
        raise RuntimeError(f"QEMU does not tell where guest RAM is: {answer}")
    return int(found[1], 16)


def _find_state(pid: int, base: int, memory_bytes: int) -> int:
    with open(memory_path(pid), "rb", buffering=0) as memory:
        for start, count in _present_chunks(pid, base, memory_bytes // PAGE_BYTES):
            content = os.pread(memory.fileno(), count * PAGE_BYTES, base + start * PAGE_BYTES)
            pages = np.frombuffer(content, "<u8").reshape(-1, PAGE_WORDS)
            for index in np.flatnonzero(pages[:, 0] == np.frombuffer(STATE_MAGIC, "<u8")[0]).tolist():
                with suppress(GuestStateError):
                    read_state(pages[index].tobytes())
                    return int((start + index) * PAGE_BYTES)
    raise GuestStateError("this QEMU runs no test guest", where=f"process {pid}", advice="Has it come up?")


def _present_chunks(pid: int, base: int, pages: int) -> Iterator[tuple[int, int]]:
    """(first page, pages) of the parts of guest RAM that hold anything: reading the others would populate them."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for start in range(0, pages, CHUNK_PAGES):
            count = min(CHUNK_PAGES, pages - start)
            at = (base // PAGE_BYTES + start) * PAGEMAP_ENTRY_BYTES
            entries = np.frombuffer(os.pread(pagemap.fileno(), count * PAGEMAP_ENTRY_BYTES, at), "<u8")
            if (entries & PRESENT).any():
                yield start, count
