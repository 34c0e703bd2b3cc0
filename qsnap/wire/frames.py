"""Frames between hosts: u8 kind, u32 length (big-endian), body. Messages are JSON, data are bytes as they are."""

from __future__ import annotations

from enum import Enum
from struct import Struct

from attrs import frozen

from qsnap.errors import ProtocolError

_HEAD = Struct(">BI")


class FrameKind(Enum):
    """What the body of a frame is."""

    MESSAGE = 1
    DATA = 2


LIMITS_BYTES = {FrameKind.MESSAGE: 4 << 20, FrameKind.DATA: 1 << 20}  #: the longest body of each kind


@frozen
class Frame:
    """A frame as it came."""

    kind: FrameKind
    body: bytes


def encode_frame(frame: Frame) -> bytes:
    """The bytes of a frame. ProtocolError if its body is longer than its kind may be."""
    _check_length(frame.kind, len(frame.body))
    return _HEAD.pack(frame.kind.value, len(frame.body)) + frame.body


class FrameReader:
    """Takes bytes in with `receive_data`, gives frames out with `next_frame`."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive_data(self, data: bytes | bytearray) -> None:
        """Add what has come."""
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """The next frame, or None until more has come.

        Raises:
            ProtocolError: what has come is no frame, or a longer one than its kind may be. It is raised again on every
                further call: where the next frame begins is not known.
        """
        if len(self._buffer) < _HEAD.size:
            return None
        number, length = _HEAD.unpack_from(self._buffer)
        try:
            kind = FrameKind(number)
        except ValueError:
            raise ProtocolError(f"a frame of the unknown kind {number}") from None
        _check_length(kind, length)
        end = _HEAD.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[_HEAD.size : end])
        del self._buffer[:end]
        return Frame(kind, body)


def _check_length(kind: FrameKind, length: int) -> None:
    if length > LIMITS_BYTES[kind]:
        raise ProtocolError(f"a frame of {length} bytes; {kind.name} frames have at most {LIMITS_BYTES[kind]}")
