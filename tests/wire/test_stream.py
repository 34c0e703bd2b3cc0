"""What a reader accepts and refuses, and where it says the fault is."""

from __future__ import annotations

from struct import pack

import pytest

from qsnap.errors import StreamError
from qsnap.wire.events import Command, PageRun, ZeroRun
from qsnap.wire.records import CommandType
from qsnap.wire.stream import StreamReader

from . import building as b
from .folding import events, fold, make_reader

BLOCKS = {"pc.ram": 16 * b.PAGE, "vga.vram": 2 * b.PAGE}
HEAD = b.header() + b.setup(BLOCKS)
A, B = b"a" * b.PAGE, b"b" * b.PAGE


def refused(data: bytes, match: str, reader: StreamReader | None = None) -> int:
    with pytest.raises(StreamError, match=match) as caught:
        fold([data], reader)
    return caught.value.stream_offset


def test_the_newest_copy_of_a_page_counts() -> None:
    first = b.part(b.data_page(0, A, "pc.ram") + b.data_page(b.PAGE, A) + b.zero_page(2 * b.PAGE))
    second = b.part(b.zero_page(0) + b.data_page(b.PAGE, B) + b.data_page(2 * b.PAGE, B))
    folded = fold([b.stream(first, second, b.end(), blocks=BLOCKS)])
    assert folded.images["pc.ram"][: 4 * b.PAGE] == bytes(b.PAGE) + B + B + bytes(b.PAGE)
    assert folded.zero == {("pc.ram", 0)}


def test_continue_reaches_across_sections() -> None:
    stream = b.stream(b.part(b.zero_page(0, "vga.vram")), b.part(b.data_page(b.PAGE, A)), blocks=BLOCKS)
    assert fold([stream]).images["vga.vram"] == bytes(b.PAGE) + A


def test_a_stretch_does_not_reorder_a_page_that_comes_twice() -> None:
    twice = b.data_page(0, A, "pc.ram") + b.data_page(b.PAGE, A) + b.zero_page(b.PAGE) + b.data_page(b.PAGE, B)
    assert fold([b.stream(b.part(twice), blocks=BLOCKS)]).images["pc.ram"][b.PAGE : 2 * b.PAGE] == B
    twice = b.zero_page(0, "pc.ram") + b.zero_page(b.PAGE) + b.data_page(b.PAGE, A) + b.zero_page(b.PAGE)
    assert not any(fold([b.stream(b.part(twice), blocks=BLOCKS)]).images["pc.ram"])


def test_hundreds_of_pages_are_one_event() -> None:
    blocks = {"pc.ram": 4096 * b.PAGE}
    pages = b.data_page(0, A, "pc.ram") + b"".join(b.data_page(i * b.PAGE, A) for i in range(1, 500))
    zeros = b"".join(b.zero_page(i * b.PAGE) for i in range(500, 4096))
    runs = [
        e
        for e in events(make_reader(), [b.stream(b.part(pages + zeros), blocks=blocks)])
        if isinstance(e, PageRun | ZeroRun)
    ]
    assert sorted(run.page_offsets.size for run in runs) == [1, 499, 3596]


def test_return_path_commands_and_flushes_are_read() -> None:
    opening = b.command(1) + b.command(2, pack(">I", 1))
    stream = b.header() + opening + b.setup(BLOCKS, flush=True) + b.part(pack(">Q", 0x200)) + b.end() + b.devices()
    assert fold([stream]).commands == [
        Command(CommandType.OPEN_RETURN_PATH, b""),
        Command(CommandType.PING, b"\0\0\0\1"),
    ]


@pytest.mark.parametrize("bits", [12, 14, 16])
def test_the_stream_may_state_its_page_size(bits: int) -> None:
    size = 1 << bits
    tail = b.devices(page_size=size)
    page = b.data_page(size, b"p" * size, "mach-virt.ram")
    stream = b.header(subsections=b.page_bits(bits)) + b.setup({"mach-virt.ram": 2 * size}) + b.part(page) + tail
    assert fold([stream]).images["mach-virt.ram"] == bytes(size) + b"p" * size


def test_page_size_as_argument() -> None:
    stream = b.header() + b.setup({"ram": 1 << 16}) + b.part(b.zero_page(0, "ram")) + b.devices(page_size=1 << 16)
    reader = StreamReader(ram_limit_bytes=1 << 20, tail_limit_bytes=1 << 20, target_page_size=1 << 16)
    assert fold([stream], reader).sent == {("ram", 0)}


def test_a_machine_without_devices_ends_its_ram_with_the_stream() -> None:
    stream = HEAD + b.end() + b.devices()[-len(b.devices()) + b.devices().index(b"\0\6") :]
    ram_end = fold([stream]).ram_end
    assert ram_end is not None
    assert ram_end.idstr == ""


def test_device_state_beyond_its_limit() -> None:
    stream = b.stream(b.end(), blocks=BLOCKS, tail=b.devices(content=bytes(1 << 20)))
    refused(stream, "device state", make_reader(tail_limit_bytes=1 << 20))
    fold([stream], make_reader(tail_limit_bytes=2 << 20))


def test_more_ram_than_allowed() -> None:
    refused(HEAD, "bytes of RAM", make_reader(ram_limit_bytes=18 * b.PAGE - 1))


def test_repr_says_where_it_is() -> None:
    assert repr(make_reader()) == "<StreamReader CONFIGURATION at 0>"


SETUP_FAULTS = {
    "empty": (b"", "truncated"),
    "no magic": (b"RIFF" + bytes(100), "not a migration stream"),
    "version": (pack(">II", 0x5145564D, 2), "version 2"),
    "no configuration": (pack(">IIB", 0x5145564D, 3, 1), "machine type"),
    "long name": (pack(">IIBI", 0x5145564D, 3, 7, 1 << 31), "name of"),
    "capabilities": (b.header(subsections=b"\5" + b.counted("configuration/capabilities") + bytes(8)), "subsection"),
    "page size": (b.header(subsections=b.page_bits(30)), "target pages"),
    "unprintable": (b.header() + b.start("\0", b""), "unprintable"),
    "early device": (b.header() + pack(">BI", 4, 1) + b.counted("virtio-mem") + bytes(8), "'virtio-mem' comes before"),
    "bitmaps": (b.header() + b.start("dirty-bitmap", bytes(20)), "'dirty-bitmap' comes before"),
    "second iterable": (HEAD + b.start("dirty-bitmap", bytes(20)), "'dirty-bitmap' comes before"),
    "early end": (b.header() + b"\0\6", "before RAM was announced"),
    "postcopy": (b.header() + b.command(3, bytes(16)), "command 3"),
    "no list": (b.header() + b.start("ram", b.eos()), "announce"),
    "short list": (
        b.header() + b.start("ram", pack(">Q", 8192 | 4) + b.counted("a") + pack(">Q", 16384)),
        "RAMBlock 'a'",
    ),
    "odd length": (b.header() + b.setup({"a": 4095, "b": 1}), "RAMBlock 'a'"),
    "no length": (b.header() + b.start("ram", pack(">Q", 8192 | 4) + b.counted("a") + pack(">Q", 0)), "RAMBlock 'a'"),
    "too many": (b.header() + b.setup({f"m{i}": 4096 for i in range(600)}), "too many"),
    "list's end": (b.header() + b.setup(BLOCKS)[:-13] + pack(">Q", 8) + b.footer(), "list should end"),
    "footer": (b.header() + b.setup(BLOCKS)[:-5] + b.footer(9), "footer"),
}


@pytest.mark.parametrize(("data", "match"), SETUP_FAULTS.values(), ids=SETUP_FAULTS.keys())
def test_faults_before_ram(data: bytes, match: str) -> None:
    refused(data + bytes(64) if data else data, match)


def test_a_block_announced_twice() -> None:
    one = b.counted("a") + pack(">Q", 4096)
    refused(b.header() + b.start("ram", pack(">Q", 8192 | 4) + one + one), "too many: 'a'")


RECORD_FAULTS = {
    "xbzrle": (pack(">Q", 0x40), "XBZRLE"),
    "compressed": (pack(">Q", 0x100), "COMPRESS"),
    "hook": (pack(">Q", 0x80), "HOOK"),
    "sizes again": (pack(">Q", 0x04), "MEM_SIZE"),
    "both kinds": (pack(">Q", 0x0A) + b.counted("pc.ram"), "flags"),
    "unaligned": (pack(">Q", 4096 + 1 + 8), "flags"),
    "no block": (b.zero_page(0), "names no RAMBlock"),
    "unknown block": (b.zero_page(0, "pc.rom"), "unknown RAMBlock 'pc.rom'"),
    "outside": (b.zero_page(2 * b.PAGE, "vga.vram"), "outside RAMBlock 'vga.vram'"),
    "far outside": (b.data_page((1 << 64) - b.PAGE, A, "pc.ram"), "outside"),
    "filled": (b.zero_page(0, "pc.ram", fill=255), "filled"),
    "footer": (pack(">Q", 0x10) + b.footer(1), "footer"),
}


@pytest.mark.parametrize(("record", "match"), RECORD_FAULTS.values(), ids=RECORD_FAULTS.keys())
def test_faults_in_records(record: bytes, match: str) -> None:
    offset = refused(HEAD + pack(">BI", 2, b.SECTION_ID) + record, match)
    assert offset == len(HEAD) + 5 + (8 if match == "footer" else 0)


@pytest.mark.parametrize("good", [1, 40])
@pytest.mark.parametrize("fault", [b.zero_page(64 * b.PAGE), b.zero_page(0, fill=1), b.data_page(64 * b.PAGE, A)])
def test_a_fault_behind_a_run_is_found_where_it_is(good: int, fault: bytes) -> None:
    blocks = {"pc.ram": 64 * b.PAGE}
    head = b.header() + b.setup(blocks) + pack(">BI", 2, b.SECTION_ID)
    records = b.zero_page(0, "pc.ram") + b"".join(b.zero_page(i * b.PAGE) for i in range(1, good))
    assert refused(head + records + fault + bytes(99), "outside|filled") == len(head + records)


SECTION_FAULTS = {
    "other section": (pack(">BI", 2, 9), "section 9"),
    "after the end": (b.end() + b.part(b""), "section 2"),
    "unknown type": (pack(">BI", 9, 1), "section type 0x9"),
    "device before any RAM": (b.devices(), "'timer' comes before"),
    "end before any RAM": (b"\0\6", "'the end of the stream' comes before"),
}


@pytest.mark.parametrize(("data", "match"), SECTION_FAULTS.values(), ids=SECTION_FAULTS.keys())
def test_faults_between_sections(data: bytes, match: str) -> None:
    refused(HEAD + data, match)


TAIL_FAULTS = {
    "no description": b.devices().split(b"\0\6")[0],
    "not JSON": b.devices()[:-1] + b"!",
    "not an object": pack(">BBI", 0, 6, 2) + b"[]",
    "too deep": pack(">BBI", 0, 6, 200_000) + b"[" * 200_000,
    "other page size": b.devices(page_size=8192),
    "one byte short": b.devices()[:-1],
    "one byte more": b.devices() + b"}",
}


@pytest.mark.parametrize("tail", TAIL_FAULTS.values(), ids=TAIL_FAULTS.keys())
def test_a_stream_must_end_with_its_description(tail: bytes) -> None:
    refused(b.stream(b.end(), blocks=BLOCKS, tail=tail), "VMDESC")


@pytest.mark.parametrize("length", [0x0006_0000, 0x0006_0006, 0x0100, 0x0600])
def test_lengths_that_look_like_a_description(length: int) -> None:
    tail = b.devices(padding=length - len(b.devices().split(b"\0\6")[1]) + 4)
    assert pack(">BBI", 0, 6, length) in tail
    assert fold([b.stream(b.end(), blocks=BLOCKS, tail=tail)]).devices == tail
