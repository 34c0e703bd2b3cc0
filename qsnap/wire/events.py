"""What a stream reader hands out.

Runs and device bytes borrow the reader's buffer: they are valid until the reader is given more data.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .records import CommandType, RAMBlock, RamSetup


class Configuration(NamedTuple):
    """The stream's beginning. `raw` is all of it, header and subsections included, for the writer."""

    machine: str
    target_page_size: int
    raw: bytes


class Command(NamedTuple):
    """A command between sections."""

    command: CommandType
    data: bytes


class PageRun(NamedTuple):
    """Pages with content: `buffer[positions[i]:]` holds the page whose place in `block` is `page_offsets[i]`.

    Should a page occur twice in one run, the later one counts.
    """

    block: RAMBlock
    page_offsets: NDArray[np.uint64]
    positions: NDArray[np.int64]
    buffer: memoryview


class ZeroRun(NamedTuple):
    """Pages that are all zero."""

    block: RAMBlock
    page_offsets: NDArray[np.uint64]


class RamEnd(NamedTuple):
    """RAM is complete and device state begins, with the section of `idstr` (empty if there is no device)."""

    idstr: str
    stream_offset: int


class DeviceBytes(NamedTuple):
    """The next piece of the device state, which is opaque: sections after RAM carry no length."""

    data: memoryview


class EndOfStream(NamedTuple):
    """The stream was complete: it ended as QEMU ends one."""

    stream_bytes: int


Event: TypeAlias = Configuration | Command | RamSetup | PageRun | ZeroRun | RamEnd | DeviceBytes | EndOfStream
