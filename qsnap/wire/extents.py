"""Parts of a sparse file: each u64 offset, u32 length (big-endian), and that many bytes; holes are left out.

As many as fit go into one frame of data. They ascend, so that what has arrived of a file is all that is before its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from qsnap.errors import ProtocolError
from qsnap.wire.frames import LIMITS_BYTES, FrameKind

HEAD = Struct(">QI")
LIMIT_BYTES = LIMITS_BYTES[FrameKind.DATA]  #: of extents that are sent together


def encode_extent(offset: int, data: bytes) -> bytes:
    """One extent."""
    return HEAD.pack(offset, len(data)) + data


def decode_extents(body: bytes, start: int, size_bytes: int) -> Iterator[tuple[int, memoryview]]:
    """(offset, data) of extents that lie one behind the other between `start` and the end of a file of this size.

    Raises ProtocolError for anything else.
    """
    rest = memoryview(body)
    while rest:
        if len(rest) < HEAD.size:
            raise ProtocolError("a part of a file has no beginning")
        offset, length = HEAD.unpack_from(rest)
        data, rest = rest[HEAD.size : HEAD.size + length], rest[HEAD.size + length :]
        end = offset + length
        if not (length == len(data) > 0 and start <= offset and end <= size_bytes):
            raise ProtocolError(f"a part of a file is at {offset} to {end}, not between {start} and {size_bytes}")
        yield offset, data
        start = end
