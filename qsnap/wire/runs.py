"""Runs of RAM records, found in a buffer without an object per page.

A record that continues its predecessor's RAMBlock has a fixed size: one word and a page, or one word and a byte.
Where many of one kind follow each other, numpy looks at all their first words in one strided view. Where kinds
alternate, that would cost more than it saves, so a plain loop collects a *stretch* of both kinds. A stretch has
strictly ascending page offsets, as QEMU sends them within one iteration, and so no page is in it twice: its zero
pages and its data pages can be handed out one after the other without losing which of two was newer.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .records import RamFlag

_WORD = Struct(">Q")
WORD_BYTES = _WORD.size
PAGE_CONTINUE = int(RamFlag.PAGE | RamFlag.CONTINUE)
ZERO_CONTINUE = int(RamFlag.ZERO | RamFlag.CONTINUE)
#: Fewer equal records than this are left to the loop: about where one strided look becomes the cheaper of the two.
_WORTHWHILE = 24
#: A stretch is cut here to bound its lists, and so that the strided look gets its chance again.
_STRETCH_RECORDS = 4096


class Stretch(NamedTuple):
    """Records of both kinds from one RAMBlock, and where in the buffer they end."""

    page_offsets: list[int]
    positions: list[int]
    zero_offsets: list[int]
    end: int


def find_run(
    buffer: memoryview, position: int, end: int, used_length: int, target_page_size: int
) -> NDArray[np.uint64]:
    """Page offsets of the valid records from `position` on that are all of the first one's kind.

    Empty if they are too few to be worth while. A record with a fault ends the run, for others to complain about.
    """
    flags = buffer[position + WORD_BYTES - 1]
    stride = WORD_BYTES + (target_page_size if flags == PAGE_CONTINUE else 1)
    complete = (end - position) // stride
    taken, window = 0, _WORTHWHILE
    found: list[NDArray[np.uint64]] = []
    while taken < complete:
        count = min(window, complete - taken)
        words = _words(buffer, position + taken * stride, count, stride)
        valid = ((words & np.uint64(target_page_size - 1)) == flags) & (words < used_length)
        if flags == ZERO_CONTINUE:
            valid &= _fill_bytes(buffer, position + taken * stride, count, stride) == 0
        equal = count if valid.all() else int(valid.argmin())
        if taken + equal < _WORTHWHILE:
            break
        found.append(words[:equal] - np.uint64(flags))
        taken += equal
        if equal < count:
            break
        window *= 8
    return np.concatenate(found) if found else np.empty(0, np.uint64)


def _words(buffer: memoryview, position: int, count: int, stride: int) -> NDArray[np.uint64]:
    return np.ndarray((count,), ">u8", buffer, position, (stride,)).astype(np.uint64)


def _fill_bytes(buffer: memoryview, position: int, count: int, stride: int) -> NDArray[np.uint8]:
    return np.ndarray((count,), np.uint8, buffer, position + WORD_BYTES, (stride,))


def find_stretch(buffer: memoryview, position: int, end: int, used_length: int, target_page_size: int) -> Stretch:
    """The records at `position` that continue a RAMBlock, while their page offsets ascend within `used_length`."""
    page_offsets: list[int] = []
    positions: list[int] = []
    zero_offsets: list[int] = []
    mask = target_page_size - 1
    last_page = end - WORD_BYTES - target_page_size
    last_zero = end - WORD_BYTES - 1
    previous, equal, kind = -1, 0, 0
    unpack = _WORD.unpack_from
    while position <= last_zero and equal < _WORTHWHILE * 2 and len(zero_offsets) + len(positions) < _STRETCH_RECORDS:
        (word,) = unpack(buffer, position)
        flags = word & mask
        page_offset = word - flags
        if not previous < page_offset < used_length:
            break
        if flags == PAGE_CONTINUE and position <= last_page:
            page_offsets.append(page_offset)
            positions.append(position + WORD_BYTES)
            position += WORD_BYTES + target_page_size
        elif flags == ZERO_CONTINUE and not buffer[position + WORD_BYTES]:
            zero_offsets.append(page_offset)
            position += WORD_BYTES + 1
        else:
            break
        equal = equal + 1 if flags == kind else 1
        previous, kind = page_offset, flags
    return Stretch(page_offsets, positions, zero_offsets, position)
