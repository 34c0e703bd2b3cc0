"""Big-endian fields out of a buffer that may not hold all of them yet."""

from __future__ import annotations

from struct import Struct

_U16 = Struct(">H")
_U32 = Struct(">I")
_U64 = Struct(">Q")


class Incomplete(Exception):
    """The buffer ends inside what is being parsed: try again from its start when there is more."""


class Cursor:
    """Reads forward from `position` and never beyond `end`."""

    def __init__(self, buffer: memoryview, position: int, end: int) -> None:
        self._buffer = buffer
        self.position = position
        self._end = end

    @property
    def left(self) -> int:
        """Bytes between here and the end."""
        return self._end - self.position

    def peek(self) -> int:
        """The next byte, which stays the next."""
        if not self.left:
            raise Incomplete
        return self._buffer[self.position]

    def skip(self, size: int) -> int:
        """Step over `size` bytes; the position they begin at."""
        begin = self.position
        if begin + size > self._end:
            raise Incomplete
        self.position = begin + size
        return begin

    def u8(self) -> int:
        """One byte."""
        return self._buffer[self.skip(1)]

    def u16(self) -> int:
        """Two bytes."""
        return int(_U16.unpack_from(self._buffer, self.skip(2))[0])

    def u32(self) -> int:
        """Four bytes."""
        return int(_U32.unpack_from(self._buffer, self.skip(4))[0])

    def u64(self) -> int:
        """Eight bytes."""
        return int(_U64.unpack_from(self._buffer, self.skip(8))[0])

    def take(self, size: int) -> bytes:
        """`size` bytes, copied."""
        begin = self.skip(size)
        return bytes(self._buffer[begin : begin + size])

    def counted(self) -> bytes:
        """A string behind its length in one byte."""
        return self.take(self.u8())
