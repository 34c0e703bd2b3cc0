"""A sans-I/O reader of QEMU's migration stream: bytes in, events out.

    reader = StreamReader(ram_limit_bytes=..., tail_limit_bytes=...)
    while True:
        event = reader.next_event()
        if event is None:
            count = os.readv(fd, [reader.get_buffer()])
            reader.buffer_updated(count)        # 0 is the end of the stream
        elif isinstance(event, PageRun): ...

The stream is taken for hostile. Whatever it holds, it is either read or ends in StreamError, and the reader holds
no more than its buffer and the last megabytes of the device state.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

import numpy as np

from ..errors import StreamError
from .cursor import Cursor, Incomplete
from .events import (
    Command,
    Configuration,
    DeviceBytes,
    EndOfStream,
    Event,
    PageRun,
    RamEnd,
    ZeroRun,
)
from .records import (
    RAM_IDSTR,
    SECTION_FOOTER,
    STREAM_MAGIC,
    STREAM_VERSION,
    CommandType,
    RAMBlock,
    RamFlag,
    RamSetup,
    SectionType,
)
from .runs import PAGE_CONTINUE, WORD_BYTES, ZERO_CONTINUE, find_run, find_stretch
from .tail import Tail

BUFFER_BYTES = 4 << 20  #: as much as a widened pipe holds
#: The largest thing that is parsed in one go is the list of RAMBlocks; the buffer must be able to hold it.
MINIMUM_BUFFER_BYTES = 256 << 10
_BLOCKS_LIMIT = 512
_MACHINE_NAME_LIMIT = 256
_TARGET_PAGE_BITS = range(10, 17)
_COMMANDS = frozenset(int(command) for command in CommandType)
_SUBSECTION_BYTES = {"configuration/target-page-bits": 4, "configuration/uuid": 16}


class State(Enum):
    """What comes next in the stream."""

    CONFIGURATION = auto()
    SETUP = auto()  #: commands, then the RAM section that announces the RAMBlocks
    SECTION = auto()  #: commands and RAM sections, until device state begins
    RECORDS = auto()  #: inside a RAM section
    DEVICES = auto()
    ENDED = auto()


class StreamReader:
    """Reads one stream. Drain `next_event` until it returns None before giving the reader more data."""

    def __init__(
        self,
        *,
        ram_limit_bytes: int,
        tail_limit_bytes: int,
        target_page_size: int = 4096,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self._buffer = memoryview(bytearray(max(buffer_bytes, MINIMUM_BUFFER_BYTES)))
        self._position = 0
        self._end = 0
        self._discarded = 0  # bytes of the stream before the buffer's first
        self._at_eof = False
        self._ram_limit_bytes = ram_limit_bytes
        self._tail_limit_bytes = tail_limit_bytes
        self.target_page_size = target_page_size
        self._ram: RamSetup | None = None
        self._blocks: dict[str, RAMBlock] = {}
        self._block: RAMBlock | None = None
        self._section_type = SectionType.START
        self._queued: Event | None = None
        self._tail = Tail(target_page_size)
        self._tail_begin = 0
        self.state = State.CONFIGURATION
        self.sections = 0  #: of RAM, that were read to their end; not counting the first, which announces it
        self._readers: dict[State, Callable[[Cursor], Event | None]] = {
            State.CONFIGURATION: self._read_configuration,
            State.SETUP: self._read_setup,
            State.SECTION: self._read_section,
            State.RECORDS: self._read_records,
            State.DEVICES: self._read_devices,
        }

    def __repr__(self) -> str:
        return f"<StreamReader {self.state.name} at {self.stream_offset}>"

    @property
    def stream_offset(self) -> int:
        """Bytes from the start of the stream to what is read next."""
        return self._discarded + self._position

    @property
    def received_bytes(self) -> int:
        """Bytes from the start of the stream to what comes into the buffer next."""
        return self._discarded + self._end

    def get_buffer(self) -> memoryview:
        """Where to put more of the stream. Events handed out before are void from here on."""
        left = self._end - self._position
        # What is left is less than a record. Starting over at the front keeps the buffer's hot part in the cache.
        self._buffer[:left] = self._buffer[self._position : self._end]
        self._discarded += self._position
        self._position, self._end = 0, left
        return self._buffer[left:]

    def buffer_updated(self, count: int) -> None:
        """Say that `count` bytes were put into the buffer; 0 means that the stream has ended."""
        self._end += count
        self._at_eof = count == 0

    def next_event(self) -> Event | None:
        """The next event, or None if it needs more data.

        Raises:
            StreamError: the stream is malformed, truncated or beyond the limits given.
        """
        event: Event | None
        if self._queued:
            event, self._queued = self._queued, None
            return event
        while self.state is not State.ENDED:
            cursor = Cursor(self._buffer, self._position, self._end)
            try:
                event = self._readers[self.state](cursor)
            except Incomplete:
                if self._at_eof:
                    raise self._error("the stream is truncated", self._end) from None
                return None
            self._position = cursor.position
            if event is not None:
                return event
        return None

    def _error(self, message: str, position: int, advice: str = "") -> StreamError:
        return StreamError(message, stream_offset=self._discarded + position, advice=advice)

    # -- before RAM ----------------------------------------------------------------------------------------------

    def _read_configuration(self, cursor: Cursor) -> Configuration:
        begin = cursor.position
        if cursor.u32() != STREAM_MAGIC:
            raise self._error("this is not a migration stream", begin)
        if (version := cursor.u32()) != STREAM_VERSION:
            raise self._error(f"migration stream of version {version}, not {STREAM_VERSION}", begin)
        if cursor.u8() != SectionType.CONFIGURATION:
            raise self._error("the stream does not name its machine type", begin)
        length = cursor.u32()
        if not 0 < length <= _MACHINE_NAME_LIMIT:
            raise self._error(f"a machine type's name of {length} bytes", begin)
        machine = self._text(cursor.take(length), begin)
        while cursor.peek() == SectionType.SUBSECTION:
            self._read_subsection(cursor)
        self.state = State.SETUP
        self._tail = Tail(self.target_page_size)
        return Configuration(machine, self.target_page_size, bytes(self._buffer[begin : cursor.position]))

    def _read_subsection(self, cursor: Cursor) -> None:
        begin = cursor.skip(1)
        name = self._text(cursor.counted(), begin)
        cursor.u32()  # version
        if name not in _SUBSECTION_BYTES:
            # "configuration/capabilities" is sent only if one of them changes the stream's format.
            raise self._error(f"the stream has a subsection {name!r}, which is not supported", begin)
        content = cursor.take(_SUBSECTION_BYTES[name])
        if name == "configuration/target-page-bits":
            bits = int.from_bytes(content)
            if bits not in _TARGET_PAGE_BITS:
                raise self._error(f"target pages of 2**{bits} bytes", begin)
            self.target_page_size = 1 << bits

    def _read_setup(self, cursor: Cursor) -> Event:
        begin = cursor.position
        kind = cursor.u8()
        if kind == SectionType.COMMAND:
            return self._read_command(cursor)
        if kind not in (SectionType.START, SectionType.FULL):
            raise self._error(f"section type {kind:#x} before RAM was announced", begin)
        section_id = cursor.u32()
        idstr = self._text(cursor.counted(), begin)
        if kind == SectionType.FULL or idstr != RAM_IDSTR:
            raise self._foreign(idstr, begin)
        ram = RamSetup(section_id, cursor.u32(), cursor.u32(), self._read_blocks(cursor))
        self._read_end_of_setup(cursor, section_id)
        self._ram = ram
        self._blocks = {block.idstr: block for block in ram.blocks}
        self.state = State.SECTION
        return ram

    def _read_blocks(self, cursor: Cursor) -> tuple[RAMBlock, ...]:
        begin = cursor.position
        word = cursor.u64()
        left = word & ~(self.target_page_size - 1)
        if word - left != RamFlag.MEM_SIZE:
            raise self._error("the RAM section does not announce its RAMBlocks", begin)
        if left > self._ram_limit_bytes:
            raise self._error(f"{left} bytes of RAM, where {self._ram_limit_bytes} are allowed", begin)
        blocks: dict[str, RAMBlock] = {}
        while left:
            begin = cursor.position
            block = RAMBlock(self._text(cursor.counted(), begin), cursor.u64())
            if block.used_length % self.target_page_size or not 0 < block.used_length <= left:
                raise self._error(f"RAMBlock {block.idstr!r} of {block.used_length} bytes", begin)
            if block.idstr in blocks or len(blocks) == _BLOCKS_LIMIT:
                raise self._error(f"one RAMBlock too many: {block.idstr!r}", begin)
            blocks[block.idstr] = block
            left -= block.used_length
        return tuple(blocks.values())

    def _read_end_of_setup(self, cursor: Cursor, section_id: int) -> None:
        begin = cursor.position
        while (word := cursor.u64()) == RamFlag.MULTIFD_FLUSH:
            begin = cursor.position
        if word != RamFlag.EOS:
            raise self._error(f"record {word:#x} where the RAMBlocks' list should end", begin)
        self._read_footer(cursor, section_id)

    # -- sections ------------------------------------------------------------------------------------------------

    def _read_section(self, cursor: Cursor) -> Event | None:
        begin = cursor.position
        kind = cursor.u8()
        assert self._ram is not None
        if kind == SectionType.COMMAND:
            return self._read_command(cursor)
        if kind in (SectionType.FULL, SectionType.EOF):
            return self._begin_devices(cursor, SectionType(kind), begin)
        section_id = cursor.u32()
        if kind == SectionType.START:
            raise self._foreign(self._text(cursor.counted(), begin), begin)
        if kind not in (SectionType.PART, SectionType.END):
            raise self._error(f"unknown section type {kind:#x}", begin)
        if section_id != self._ram.section_id or self._section_type is SectionType.END:
            raise self._error(f"section {section_id} where only RAM may go on", begin)
        self._section_type = SectionType(kind)
        self.state = State.RECORDS
        return None

    def _begin_devices(self, cursor: Cursor, kind: SectionType, begin: int) -> RamEnd:
        idstr = ""
        if kind is SectionType.FULL:
            cursor.u32()
            idstr = self._text(cursor.counted(), begin)
        # A background snapshot has no RAM END: its device state follows the last PART.
        if self._section_type is SectionType.START:
            raise self._foreign(idstr, begin)
        cursor.position = begin
        self._tail_begin = self._discarded + begin
        self.state = State.DEVICES
        return RamEnd(idstr, self._tail_begin)

    def _foreign(self, idstr: str, position: int) -> StreamError:
        return self._error(
            f"{idstr or 'the end of the stream'!r} comes before the end of RAM",
            position,
            "Sections of such devices carry no length and cannot be told from RAM: remove the device from the VM.",
        )

    def _read_command(self, cursor: Cursor) -> Command:
        begin = cursor.position
        number = cursor.u16()
        if number not in _COMMANDS:
            raise self._error(f"command {number} has no place in a snapshot", begin)
        return Command(CommandType(number), cursor.take(cursor.u16()))

    def _read_footer(self, cursor: Cursor, section_id: int) -> None:
        begin = cursor.position
        if cursor.u8() != SECTION_FOOTER or cursor.u32() != section_id:
            raise self._error(f"section {section_id} lacks its footer", begin)

    # -- RAM records ---------------------------------------------------------------------------------------------

    def _read_records(self, cursor: Cursor) -> Event | None:
        if self._block is not None and cursor.left >= WORD_BYTES:
            flags = self._buffer[cursor.position + WORD_BYTES - 1]
            if flags in (PAGE_CONTINUE, ZERO_CONTINUE):
                event = self._read_run(cursor, self._block, flags) or self._read_stretch(cursor, self._block)
                if event:
                    return event
        return self._read_record(cursor)

    def _read_run(self, cursor: Cursor, block: RAMBlock, flags: int) -> Event | None:
        begin = cursor.position
        offsets = find_run(self._buffer, begin, self._end, block.used_length, self.target_page_size)
        if not offsets.size:
            return None
        stride = WORD_BYTES + (self.target_page_size if flags == PAGE_CONTINUE else 1)
        cursor.skip(offsets.size * stride)
        if flags == ZERO_CONTINUE:
            return ZeroRun(block, offsets)
        positions = np.arange(begin + WORD_BYTES, cursor.position, stride, dtype=np.int64)
        return PageRun(block, offsets, positions, self._buffer)

    def _read_stretch(self, cursor: Cursor, block: RAMBlock) -> Event | None:
        stretch = find_stretch(self._buffer, cursor.position, self._end, block.used_length, self.target_page_size)
        cursor.position = stretch.end
        zeros = pages = None
        if stretch.zero_offsets:
            zeros = ZeroRun(block, np.array(stretch.zero_offsets, np.uint64))
        if stretch.page_offsets:
            pages = self._page_run(block, stretch.page_offsets, stretch.positions)
        self._queued = pages if zeros else None
        return zeros or pages

    def _page_run(self, block: RAMBlock, page_offsets: list[int], positions: list[int]) -> PageRun:
        return PageRun(block, np.array(page_offsets, np.uint64), np.array(positions, np.int64), self._buffer)

    def _read_record(self, cursor: Cursor) -> Event | None:
        begin = cursor.position
        word = cursor.u64()
        flags = RamFlag(word & (self.target_page_size - 1))
        if word == RamFlag.MULTIFD_FLUSH:
            return None
        if word == RamFlag.EOS:
            assert self._ram is not None
            self._read_footer(cursor, self._ram.section_id)
            self.state = State.SECTION
            self.sections += 1
            return None
        if flags & ~RamFlag.CONTINUE not in (RamFlag.PAGE, RamFlag.ZERO):
            raise self._error(f"RAM record with flags {flags!r}, which are not supported", begin)
        block = self._record_block(cursor, flags, begin)
        page_offset = word - flags
        if page_offset >= block.used_length:
            raise self._error(f"page {page_offset:#x} lies outside RAMBlock {block.idstr!r}", begin)
        event: Event
        if flags & RamFlag.PAGE:
            event = self._page_run(block, [page_offset], [cursor.skip(self.target_page_size)])
        else:
            if fill := cursor.u8():
                raise self._error(f"a page filled with {fill:#x}, where only zero is expected", begin)
            event = ZeroRun(block, np.array([page_offset], np.uint64))
        self._block = block
        return event

    def _record_block(self, cursor: Cursor, flags: RamFlag, begin: int) -> RAMBlock:
        if flags & RamFlag.CONTINUE:
            if self._block is None:
                raise self._error("the first RAM record names no RAMBlock", begin)
            return self._block
        idstr = self._text(cursor.counted(), begin)
        if idstr not in self._blocks:
            raise self._error(f"unknown RAMBlock {idstr!r}", begin)
        return self._blocks[idstr]

    # -- after RAM -----------------------------------------------------------------------------------------------

    def _read_devices(self, cursor: Cursor) -> Event:
        if cursor.left:
            return self._device_bytes(cursor)
        if not self._at_eof:
            raise Incomplete
        self._tail.check_complete(self.stream_offset)
        self.state = State.ENDED
        return EndOfStream(self.stream_offset)

    def _device_bytes(self, cursor: Cursor) -> DeviceBytes:
        if self._discarded + self._end - self._tail_begin > self._tail_limit_bytes:
            raise self._error(f"more than {self._tail_limit_bytes} bytes of device state", cursor.position)
        begin = cursor.skip(cursor.left)
        data = self._buffer[begin : cursor.position]
        self._tail.feed(data)
        return DeviceBytes(data)

    def _text(self, raw: bytes, position: int) -> str:
        text = raw.decode("latin-1")
        if not (text.isascii() and text.isprintable()):
            raise self._error(f"unprintable name {raw!r}", position)
        return text
