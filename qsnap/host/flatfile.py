"""A RAMBlock as a flat sparse file, written in runs of pages."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qsnap.wire import encode
from qsnap.wire.events import PageRun, ZeroRun
from qsnap.wire.records import RAMBlock

_IOV_MAX = 1024
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01  # linux/falloc.h; os has no fallocate(2)
_libc = ctypes.CDLL(None, use_errno=True)
_CHUNK_PAGES = 256


class FlatFile:
    """The page at offset X of `block` is at file offset X. Zero pages are holes."""

    def __init__(self, block: RAMBlock, path: str, target_page_size: int) -> None:
        self.block = block
        self.path = path
        self._target_page_size = target_page_size
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, block.used_length)
        pages = block.used_length // target_page_size
        self._has_data = np.zeros(pages, np.bool_)
        self._is_zero = np.zeros(pages, np.bool_)

    @property
    def data_pages(self) -> int:
        """Pages whose newest content is not zero."""
        return int(np.count_nonzero(self._has_data))

    @property
    def zero_pages(self) -> int:
        """Pages that were sent, and are zero."""
        return int(np.count_nonzero(self._is_zero))

    def apply_pages(self, run: PageRun) -> None:
        """Write pages; neighbours in the file take one call, straight from the stream's buffer."""
        size = self._target_page_size
        indices = run.page_offsets // np.uint64(size)
        self._has_data[indices] = True
        self._is_zero[indices] = False
        for begin, end in _neighbours(indices):
            pages = [run.buffer[position : position + size] for position in run.positions[begin:end].tolist()]
            _write_all(self._fd, pages, int(run.page_offsets[begin]))

    def apply_zeros(self, run: ZeroRun) -> None:
        """Note zero pages. What was never written reads as zero already."""
        indices = run.page_offsets // np.uint64(self._target_page_size)
        self._is_zero[indices] = True
        stale = indices[self._has_data[indices]]
        self._has_data[stale] = False
        size = self._target_page_size
        for begin, end in _neighbours(stale):
            _clear(self._fd, int(stale[begin]) * size, (end - begin) * size)

    def encode_records(self) -> Iterator[bytes]:
        """All pages that were sent, as records of a stream."""
        size = self._target_page_size
        for indices in _chunks(np.flatnonzero(self._has_data)):
            content = b"".join(os.pread(self._fd, size, index * size) for index in indices.tolist())
            pages = np.frombuffer(content, np.uint8).reshape(-1, size)
            yield encode.encode_pages(self.block, indices.astype(np.uint64) * np.uint64(size), pages)
        for indices in _chunks(np.flatnonzero(self._is_zero)):
            yield encode.encode_zero_pages(self.block, indices.astype(np.uint64) * np.uint64(size))


def _chunks(indices: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (indices[begin : begin + _CHUNK_PAGES] for begin in range(0, indices.size, _CHUNK_PAGES))


def _neighbours(indices: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Slices of `indices` in which each is its predecessor plus one."""
    if not indices.size:
        return iter(())
    edges = np.flatnonzero(np.diff(indices) != 1) + 1
    return itertools.pairwise([0, *edges.tolist(), indices.size])


def _clear(fd: int, offset: int, length: int) -> None:
    """Make a part of the file zero, and a hole where the file system can."""
    if _libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length)) == 0:
        return
    number = ctypes.get_errno()
    if number != errno.EOPNOTSUPP:
        raise OSError(number, os.strerror(number))
    _write_all(fd, [memoryview(bytes(length))], offset)


def _write_all(fd: int, pieces: list[memoryview], offset: int) -> None:
    """Write `pieces` one behind the other. A full file system writes short first and fails after that."""
    while pieces:
        batch = pieces[:_IOV_MAX]
        written = os.pwritev(fd, batch, offset)
        offset += written
        if written == sum(map(len, batch)):
            pieces = pieces[_IOV_MAX:]
            continue
        done = 0
        while done < len(batch) and written >= len(batch[done]):
            written -= len(batch[done])
            done += 1
        pieces = pieces[done:]
        if written:
            pieces[0] = pieces[0][written:]
