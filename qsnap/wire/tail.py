"""Where a migration stream ends.

Device state carries no lengths and a QEMU that dies mid-stream closes its end just like one that has finished. But
the last thing QEMU sends, whichever engine is used, is QEMU_VM_EOF and then a VMDESC: its length and as many bytes
of JSON. A stream that ends exactly there is whole. (Source: migration/savevm.c,
qemu_savevm_state_complete_precopy_non_iterable.)
"""

from __future__ import annotations

import json
from struct import Struct

from ..errors import StreamError
from .records import SectionType

_HEADER = Struct(">BBI")
#: Described are fields, not content: about 100 kB for a PC, so this is room for dozens of times as many devices.
_VMDESC_LIMIT_BYTES = 4 << 20
TAIL_BYTES = _HEADER.size + _VMDESC_LIMIT_BYTES  #: of a stream's end, all that is looked at


class Tail:
    """Remembers the last bytes of a stream and tells whether it may end there."""

    def __init__(self, target_page_size: int) -> None:
        self._target_page_size = target_page_size
        self._recent = bytearray()

    def feed(self, data: memoryview) -> None:
        """Take note of device state."""
        self._recent += data[-TAIL_BYTES:]
        del self._recent[:-TAIL_BYTES]

    def check_complete(self, stream_offset: int) -> None:
        """Raise StreamError, about this offset, unless the stream may end here."""
        if not self.is_complete():
            raise StreamError(
                "the stream is truncated: no description of the devices (VMDESC) ends it",
                stream_offset=stream_offset,
                advice="QEMU or its host may have failed. A machine with suppress-vmdesc=on cannot be told from that.",
            )

    def is_complete(self) -> bool:
        """Whether a VMDESC ends exactly at the last byte fed."""
        # JSON holds no NUL, so the last one belongs to the six bytes before it.
        last_nul = self._recent.rfind(0)
        return any(self._ends_after(begin) for begin in range(max(0, last_nul - _HEADER.size + 1), last_nul + 1))

    def _ends_after(self, begin: int) -> bool:
        body = begin + _HEADER.size
        if body > len(self._recent):
            return False
        header = _HEADER.unpack_from(self._recent, begin)
        return header == (SectionType.EOF, SectionType.VMDESC, len(self._recent) - body) and self._is_vmdesc(body)

    def _is_vmdesc(self, begin: int) -> bool:
        try:
            vmdesc = json.loads(self._recent[begin:])
        except (ValueError, RecursionError):
            return False
        return (
            isinstance(vmdesc, dict)
            and "devices" in vmdesc
            and vmdesc.get("page_size", self._target_page_size) == self._target_page_size
        )
