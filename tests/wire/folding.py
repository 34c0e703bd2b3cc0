"""What a stream comes to, whatever pieces it arrived in."""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

from attrs import define, field

from qsnap.wire.events import (
    Command,
    Configuration,
    DeviceBytes,
    EndOfStream,
    Event,
    PageRun,
    RamEnd,
    ZeroRun,
)
from qsnap.wire.records import RamSetup
from qsnap.wire.stream import StreamReader

DATA = Path(__file__).parent.parent / "data"
RECORDED = sorted(path.name for path in DATA.glob("*.mig.xz"))
LIMIT = 1 << 26


@define
class Folded:
    """The sum of a reader's events."""

    configuration: Configuration | None = None
    ram: RamSetup | None = None
    commands: list[Command] = field(factory=list)
    images: dict[str, bytearray] = field(factory=dict)
    sent: set[tuple[str, int]] = field(factory=set)
    zero: set[tuple[str, int]] = field(factory=set)
    ram_end: RamEnd | None = None
    devices: bytearray = field(factory=bytearray)
    end: EndOfStream | None = None

    def add(self, event: Event) -> None:
        match event:
            case PageRun():
                self._add_pages(event)
            case ZeroRun():
                self._add_zeros(event)
            case RamSetup():
                self.ram = event
                self.images = {block.idstr: bytearray(block.used_length) for block in event.blocks}
            case Command():
                self.commands.append(event)
            case DeviceBytes():
                self.devices += event.data
            case Configuration():
                self.configuration = event
            case RamEnd():
                self.ram_end = event
            case EndOfStream():
                self.end = event

    def _add_pages(self, run: PageRun) -> None:
        assert self.configuration is not None
        size = self.configuration.target_page_size
        for offset, position in zip(run.page_offsets.tolist(), run.positions.tolist(), strict=True):
            self.images[run.block.idstr][offset : offset + size] = run.buffer[position : position + size]
            self.sent.add((run.block.idstr, offset))
            self.zero.discard((run.block.idstr, offset))

    def _add_zeros(self, run: ZeroRun) -> None:
        assert self.configuration is not None
        size = self.configuration.target_page_size
        for offset in run.page_offsets.tolist():
            self.images[run.block.idstr][offset : offset + size] = bytes(size)
            self.sent.add((run.block.idstr, offset))
            self.zero.add((run.block.idstr, offset))


def read_recorded(name: str) -> bytes:
    return lzma.decompress((DATA / name).read_bytes())


def chunked(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    begin = 0
    for size in sizes:
        yield data[begin : begin + size]
        begin += size
    yield data[begin:]


def drain(reader: StreamReader) -> Iterator[Event]:
    """What the reader makes of the data it has."""
    while (event := reader.next_event()) is not None:
        yield event


def events(reader: StreamReader, chunks: Iterable[bytes]) -> Iterator[Event]:
    """Feed a reader and hand out its events while their buffers are valid."""
    for chunk in chunks:
        rest = chunk
        while rest:
            buffer = reader.get_buffer()
            size = min(len(buffer), len(rest))
            buffer[:size] = rest[:size]
            reader.buffer_updated(size)
            rest = rest[size:]
            yield from drain(reader)
    reader.get_buffer()
    reader.buffer_updated(0)
    yield from drain(reader)


def make_reader(ram_limit_bytes: int = LIMIT, tail_limit_bytes: int = LIMIT) -> StreamReader:
    return StreamReader(ram_limit_bytes=ram_limit_bytes, tail_limit_bytes=tail_limit_bytes)


def fold(chunks: Iterable[bytes], reader: StreamReader | None = None) -> Folded:
    folded = Folded()
    for event in events(reader or make_reader(), chunks):
        folded.add(event)
    return folded
