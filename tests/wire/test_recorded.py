"""Streams of real QEMUs, read in pieces of every size."""

from __future__ import annotations

import random

import pytest

from qsnap.errors import StreamError
from qsnap.wire.records import CommandType

from .folding import RECORDED, Folded, chunked, fold, read_recorded


def test_every_version_machine_and_engine_is_recorded() -> None:
    assert len(RECORDED) == 8


@pytest.mark.parametrize("name", RECORDED)
def test_whole(name: str) -> None:
    data = read_recorded(name)
    folded = fold([data])
    assert folded.configuration is not None
    assert folded.ram is not None
    assert folded.ram_end is not None
    assert folded.end is not None
    assert folded.configuration.machine.startswith("pc-q35-" if "q35" in name else "pc-i440fx-")
    assert folded.ram.blocks[0] == ("pc.ram", 4 << 20)
    assert {"pc.bios", "/rom@etc/acpi/tables"} <= set(folded.images)
    assert any(idstr.endswith("/vga.vram") for idstr in folded.images)
    assert len(folded.sent) == sum(block.used_length for block in folded.ram.blocks) // 4096
    assert any(folded.images["pc.bios"])
    assert folded.devices == data[folded.ram_end.stream_offset :]
    assert folded.end.stream_bytes == len(data)


@pytest.mark.parametrize("name", RECORDED)
def test_switchover_start_comes_from_new_machine_types_in_precopy(name: str) -> None:
    commands = [command.command for command in fold([read_recorded(name)]).commands]
    expected = [CommandType.SWITCHOVER_START] if "11.1" in name and "precopy" in name else []
    assert commands == expected


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("largest", [100, 4096, 70_000])
def test_random_pieces(name: str, largest: int) -> None:
    data = read_recorded(name)
    chance = random.Random(largest)
    sizes = [chance.randint(1, largest) for _ in range(2 * len(data) // largest)]
    assert fold(chunked(data, sizes)) == fold([data])


def test_byte_by_byte() -> None:
    data = read_recorded("qemu-11.1-pc-precopy.mig.xz")
    assert fold(data[i : i + 1] for i in range(len(data))) == fold([data])


@pytest.mark.parametrize("name", RECORDED)
def test_no_shorter_stream_is_taken_for_whole(name: str) -> None:
    data = read_recorded(name)
    cuts = {*range(400), *range(len(data) - 300, len(data)), *random.Random(name).sample(range(len(data)), 150)}
    for cut in sorted(cuts):
        with pytest.raises(StreamError, match="truncated") as caught:
            fold([data[:cut]])
        assert caught.value.stream_offset == cut


@pytest.mark.parametrize("name", RECORDED)
def test_anything_after_the_end_is_an_error(name: str) -> None:
    with pytest.raises(StreamError, match="truncated"):
        fold([read_recorded(name) + b" "])


def test_folding_tells_streams_apart() -> None:
    assert fold([read_recorded(RECORDED[0])]) != Folded()
    assert fold([read_recorded(RECORDED[0])]) != fold([read_recorded(RECORDED[2])])
