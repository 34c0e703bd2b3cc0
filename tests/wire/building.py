"""Migration streams put together by hand, independently of qsnap's own writer."""

from __future__ import annotations

import json
from struct import pack

PAGE = 4096
SECTION_ID = 2


def counted(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def header(machine: str = "pc-i440fx-9.9", subsections: bytes = b"") -> bytes:
    return pack(">IIBI", 0x5145564D, 3, 7, len(machine)) + machine.encode() + subsections


def page_bits(bits: int) -> bytes:
    return b"\x05" + counted("configuration/target-page-bits") + pack(">II", 1, bits)


def command(number: int, data: bytes = b"") -> bytes:
    return pack(">BHH", 8, number, len(data)) + data


def footer(section_id: int = SECTION_ID) -> bytes:
    return pack(">BI", 0x7E, section_id)


def start(idstr: str, payload: bytes) -> bytes:
    return pack(">BI", 1, SECTION_ID) + counted(idstr) + pack(">II", 0, 4) + payload


def setup(blocks: dict[str, int], flush: bool = False) -> bytes:
    listed = b"".join(counted(idstr) + pack(">Q", length) for idstr, length in blocks.items())
    before_end = pack(">Q", 0x200) if flush else b""
    return start("ram", pack(">Q", sum(blocks.values()) | 4) + listed + before_end + eos())


def eos(section_id: int = SECTION_ID) -> bytes:
    return pack(">Q", 0x10) + footer(section_id)


def data_page(offset: int, content: bytes, name: str = "") -> bytes:
    """A page's record; without a name it continues the RAMBlock before."""
    return _record(offset | 0x08, name) + content


def zero_page(offset: int, name: str = "", fill: int = 0) -> bytes:
    return _record(offset | 0x02, name) + bytes([fill])


def _record(word: int, name: str) -> bytes:
    return pack(">Q", word) + counted(name) if name else pack(">Q", word | 0x20)


def part(records: bytes) -> bytes:
    return pack(">BI", 2, SECTION_ID) + records + eos()


def end(records: bytes = b"") -> bytes:
    return pack(">BI", 3, SECTION_ID) + records + eos()


def devices(content: bytes = b"\1\2\3", page_size: int = PAGE, padding: int = 0) -> bytes:
    """Device state, as a background snapshot or the end of precopy appends it."""
    section = pack(">BI", 4, 77) + counted("timer") + pack(">II", 0, 2) + content + footer(77)
    vmdesc = json.dumps({"page_size": page_size, "devices": ["x" * padding]}).encode()
    return section + pack(">BBI", 0, 6, len(vmdesc)) + vmdesc


def stream(*parts: bytes, blocks: dict[str, int], tail: bytes | None = None) -> bytes:
    return b"".join([header(), setup(blocks), *parts, devices() if tail is None else tail])
