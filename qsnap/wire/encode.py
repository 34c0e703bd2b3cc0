"""A writer of page-less migration streams: stock QEMU loads them beside RAM that it maps from files.

Such a stream announces every RAMBlock but carries pages of only those that have no file: video memory, firmware,
ACPI tables. Their zero pages must be sent too, since a fresh QEMU has its own firmware in those places.

    configuration.raw | encode_ram_setup | encode_command... | encode_ram_end | encode_pages, encode_zero_pages...
    | encode_section_end | device state as it was
"""

from __future__ import annotations

from struct import Struct

import numpy as np
from numpy.typing import NDArray

from .events import Command
from .records import (
    RAM_IDSTR,
    SECTION_FOOTER,
    STREAM_MAGIC,
    STREAM_VERSION,
    RAMBlock,
    RamFlag,
    RamSetup,
    SectionType,
)
from .runs import WORD_BYTES

_U64 = Struct(">Q")
_HEADER = Struct(">IIBI")
_SECTION = Struct(">BI")
_COMMAND = Struct(">BHH")


def _counted(text: str) -> bytes:
    raw = text.encode("ascii")
    return bytes([len(raw)]) + raw


def encode_configuration(machine: str) -> bytes:
    """How a stream of this machine type begins."""
    name = machine.encode("ascii")
    return _HEADER.pack(STREAM_MAGIC, STREAM_VERSION, SectionType.CONFIGURATION, len(name)) + name


def encode_ram_setup(ram: RamSetup) -> bytes:
    """The section that announces the RAMBlocks."""
    total = sum(block.used_length for block in ram.blocks)
    return b"".join(
        [
            _SECTION.pack(SectionType.START, ram.section_id),
            _counted(RAM_IDSTR),
            ram.instance_id.to_bytes(4),
            ram.version_id.to_bytes(4),
            _U64.pack(total | RamFlag.MEM_SIZE),
            *(_counted(block.idstr) + _U64.pack(block.used_length) for block in ram.blocks),
            encode_section_end(ram),
        ]
    )


def encode_command(command: Command) -> bytes:
    """A command between sections."""
    return _COMMAND.pack(SectionType.COMMAND, command.command, len(command.data)) + command.data


def encode_ram_end(ram: RamSetup) -> bytes:
    """The beginning of the last RAM section; records and `encode_section_end` follow."""
    return _SECTION.pack(SectionType.END, ram.section_id)


def encode_section_end(ram: RamSetup) -> bytes:
    """The end of a RAM section."""
    return _U64.pack(RamFlag.EOS) + _SECTION.pack(SECTION_FOOTER, ram.section_id)


def encode_pages(block: RAMBlock, page_offsets: NDArray[np.uint64], pages: NDArray[np.uint8]) -> bytes:
    """Records of pages with content; `pages` has one row per offset."""
    return _records(block, page_offsets, pages, RamFlag.PAGE)


def encode_zero_pages(block: RAMBlock, page_offsets: NDArray[np.uint64]) -> bytes:
    """Records of pages that are all zero."""
    return _records(block, page_offsets, np.zeros((page_offsets.size, 1), np.uint8), RamFlag.ZERO)


def _records(block: RAMBlock, page_offsets: NDArray[np.uint64], payloads: NDArray[np.uint8], flag: RamFlag) -> bytes:
    """Only the first record names its RAMBlock, so it is put together by itself."""
    if not page_offsets.size:
        return b""
    first = _U64.pack(int(page_offsets[0]) | flag) + _counted(block.idstr) + payloads[0].tobytes()
    words = (page_offsets[1:] | np.uint64(flag | RamFlag.CONTINUE)).astype(">u8")
    records = np.empty((words.size, WORD_BYTES + payloads.shape[1]), np.uint8)
    records[:, :WORD_BYTES] = words.view(np.uint8).reshape(-1, WORD_BYTES)
    records[:, WORD_BYTES:] = payloads[1:]
    return b"".join([first, records.tobytes()])
