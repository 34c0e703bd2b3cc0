"""The numbers of QEMU's migration stream, and the few values that a reader and a writer of it share.

Source: QEMU's migration/savevm.c (sections, commands), migration/ram.c (records), migration/migration.c (return
path). They have been stable from 7.2 to 11.1. Everything in the stream is big-endian.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

STREAM_MAGIC = 0x5145564D  #: "QEVM"
STREAM_VERSION = 3
SECTION_FOOTER = 0x7E  #: QEMU_VM_SECTION_FOOTER
RAM_IDSTR = "ram"


class SectionType(IntEnum):
    """First byte of whatever follows the stream's header."""

    EOF = 0x00  #: QEMU_VM_EOF: the device state ends; the VMDESC follows
    START = 0x01  #: QEMU_VM_SECTION_START
    PART = 0x02  #: QEMU_VM_SECTION_PART
    END = 0x03  #: QEMU_VM_SECTION_END
    FULL = 0x04  #: QEMU_VM_SECTION_FULL: a device that does not iterate
    SUBSECTION = 0x05  #: QEMU_VM_SUBSECTION
    VMDESC = 0x06  #: QEMU_VM_VMDESCRIPTION: JSON, the last thing in a stream
    CONFIGURATION = 0x07  #: QEMU_VM_CONFIGURATION
    COMMAND = 0x08  #: QEMU_VM_COMMAND


class RamFlag(IntFlag):
    """Low bits of a RAM record's first word. The other bits are the offset of a page in its RAMBlock."""

    ZERO = 0x02  #: RAM_SAVE_FLAG_ZERO: the page is filled with the one byte that follows
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10  #: end of this section's records
    CONTINUE = 0x20  #: same RAMBlock as the record before, so no name follows
    XBZRLE = 0x40
    HOOK = 0x80  #: RDMA
    COMPRESS = 0x100
    MULTIFD_FLUSH = 0x200  #: means nothing without multifd, yet may be sent


class CommandType(IntEnum):
    """Commands that a snapshot's stream may hold (enum qemu_vm_cmd)."""

    OPEN_RETURN_PATH = 1
    PING = 2
    SWITCHOVER_START = 11  #: sent by machine types from 10.0 on, right before the last RAM section


class RAMBlock(NamedTuple):
    """One piece of guest memory, as the stream announces it."""

    idstr: str
    used_length: int


class RamSetup(NamedTuple):
    """The RAM section that opens the stream's iterations: what later sections are known by, and the RAMBlocks."""

    section_id: int
    instance_id: int
    version_id: int
    blocks: tuple[RAMBlock, ...]
