"""The writer: what it writes is read again, carries no page that has a file, and agrees with QEMU byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qsnap.wire import encode
from qsnap.wire.events import Command
from qsnap.wire.records import CommandType, RAMBlock, RamSetup

from . import building as b
from .folding import RECORDED, Folded, fold, read_recorded

RAM = RamSetup(b.SECTION_ID, 0, 4, (RAMBlock("pc.ram", 8 * b.PAGE), RAMBlock("pc.bios", 4 * b.PAGE)))


def offsets(*pages: int) -> NDArray[np.uint64]:
    return np.array(pages, np.uint64) * np.uint64(b.PAGE)


def page_less(folded: Folded, backed: str) -> bytes:
    """The device stream of what was read, put together as the receiver does it."""
    assert folded.configuration is not None
    assert folded.ram is not None
    records = []
    for block in folded.ram.blocks:
        sent = sorted(offset for idstr, offset in folded.sent if idstr == block.idstr != backed)
        zero = [offset for offset in sent if (block.idstr, offset) in folded.zero]
        data = [offset for offset in sent if (block.idstr, offset) not in folded.zero]
        content = np.frombuffer(b"".join(folded.images[block.idstr][o : o + b.PAGE] for o in data), np.uint8)
        records.append(encode.encode_pages(block, np.array(data, np.uint64), content.reshape(-1, b.PAGE)))
        records.append(encode.encode_zero_pages(block, np.array(zero, np.uint64)))
    commands = map(encode.encode_command, folded.commands)
    head = [folded.configuration.raw, encode.encode_ram_setup(folded.ram), *commands, encode.encode_ram_end(folded.ram)]
    return b"".join([*head, *records, encode.encode_section_end(folded.ram), folded.devices])


@pytest.mark.parametrize("name", RECORDED)
def test_a_page_less_stream_keeps_everything_but_the_backed_pages(name: str) -> None:
    original = fold([read_recorded(name)])
    again = fold([page_less(original, "pc.ram")])
    assert not [idstr for idstr, _ in again.sent if idstr == "pc.ram"]
    assert again.sent == {key for key in original.sent if key[0] != "pc.ram"}
    assert again.zero == {key for key in original.zero if key[0] != "pc.ram"}
    assert (again.configuration, again.ram, again.commands) == (original.configuration, original.ram, original.commands)
    assert again.devices == original.devices
    for idstr in set(original.images) - {"pc.ram"}:
        assert again.images[idstr] == original.images[idstr]


@pytest.mark.parametrize("name", RECORDED)
def test_without_a_backed_block_nothing_is_lost(name: str) -> None:
    original = fold([read_recorded(name)])
    assert fold([page_less(original, "")]).images == original.images


@pytest.mark.parametrize("name", RECORDED)
def test_the_head_is_as_qemu_wrote_it(name: str) -> None:
    data = read_recorded(name)
    folded = fold([data])
    assert folded.configuration is not None
    assert folded.ram is not None
    head = folded.configuration.raw + encode.encode_ram_setup(folded.ram)
    assert data.startswith(head)


def test_records_are_as_built_by_hand() -> None:
    pages = np.stack([np.full(b.PAGE, value, np.uint8) for value in (7, 8)])
    expected = b.data_page(0, bytes([7]) * b.PAGE, "pc.bios") + b.data_page(3 * b.PAGE, bytes([8]) * b.PAGE)
    assert encode.encode_pages(RAM.blocks[1], offsets(0, 3), pages) == expected
    expected = b.zero_page(b.PAGE, "pc.bios") + b.zero_page(2 * b.PAGE)
    assert encode.encode_zero_pages(RAM.blocks[1], offsets(1, 2)) == expected
    assert encode.encode_zero_pages(RAM.blocks[1], offsets()) == b""


def test_sections_are_as_built_by_hand() -> None:
    assert encode.encode_ram_setup(RAM) == b.setup({block.idstr: block.used_length for block in RAM.blocks})
    assert encode.encode_ram_end(RAM) + encode.encode_section_end(RAM) == b.end()
    assert encode.encode_command(Command(CommandType.PING, b"1234")) == b.command(2, b"1234")
