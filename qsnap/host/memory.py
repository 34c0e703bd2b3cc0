"""Memory and the files that are made of it."""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path


def is_memory_file(path: Path) -> bool:
    """Whether the file is on tmpfs, whose pages can be write-protected."""
    device = path.stat().st_dev
    mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return any(
        fields[2] == f"{os.major(device)}:{os.minor(device)}" and fields[fields.index("-") + 1] == "tmpfs"
        for fields in mounts
    )


def resident_bytes(pid: int) -> int:
    """Memory that a process has, in pages of any size; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(size) << 10 for size in re.findall(r"^(?:VmRSS|HugetlbPages):\s*(\d+) kB$", status, re.MULTILINE))


def spare_bytes(directory: Path) -> int:
    """Memory that there is for files in a directory on tmpfs."""
    available = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    memory = int(available[1]) << 10 if available else 0
    room = os.statvfs(directory)
    return min(memory, room.f_bavail * room.f_frsize) if room.f_blocks else memory  # 0 blocks: any number of them


def make_memory(size_bytes: int) -> tuple[int, mmap.mmap]:
    """A memfd of this size, mapped: in huge pages where enough of them are free, which only mapping it tells."""
    try:
        return _map_memfd(size_bytes, os.MFD_HUGETLB)
    except OSError:
        return _map_memfd(size_bytes, 0)


def _map_memfd(size_bytes: int, flags: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("qsnap-ram", os.MFD_CLOEXEC | flags)
    try:
        os.ftruncate(fd, size_bytes)
        return fd, mmap.mmap(fd, size_bytes)
    except OSError:
        os.close(fd)
        raise


def fill_memory(memory: mmap.mmap, path: Path) -> None:
    """Copy the data of a sparse flat file to the same offsets in memory; holes stay zero."""
    with path.open("rb") as file:
        for start, end in data_extents(file.fileno(), len(memory)):
            file.seek(start)
            file.readinto(memoryview(memory)[start:end])  # huge pages take no write(2)


def data_extents(fd: int, size_bytes: int, end: int = 0) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of a sparse file, from `end` on, that are not holes."""
    try:
        while end < size_bytes:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, end
    except OSError as error:
        if error.errno == errno.EINVAL:  # a block device has no holes
            yield end, size_bytes
        elif error.errno != errno.ENXIO:  # no data up to the end
            raise
