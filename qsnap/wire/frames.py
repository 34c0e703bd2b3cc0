"""Frames between hosts: u8 kind, u32 length (big-endian), body. Messages are JSON, data are bytes as they are.

A long message is several frames: parts of it, and the last part as a frame of the kind MESSAGE.
"""

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
    PART = 3


#: the longest body of each kind
LIMITS_BYTES = {FrameKind.MESSAGE: 4 << 20, FrameKind.DATA: 1 << 20, FrameKind.PART: 4 << 20}
MESSAGE_LIMIT_BYTES = 64 << 20  #: the longest message, all its parts together


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


def split_message(body: bytes) -> list[Frame]:
    """The frames of a message. ProtocolError if it is longer than messages may be."""
    _check_message(len(body))
    size = LIMITS_BYTES[FrameKind.PART]
    ends = range(size, len(body), size)
    parts = [Frame(FrameKind.PART, body[end - size : end]) for end in ends]
    return [*parts, Frame(FrameKind.MESSAGE, body[len(parts) * size :])]


class PartJoiner:
    """Puts long messages together again."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def join(self, frame: Frame) -> Frame | None:
        """A frame of data or of a whole message; None for a part of one. Raises ProtocolError where they do not fit."""
        if frame.kind is FrameKind.DATA:
            if self._parts:
                raise ProtocolError("data came in the middle of a message")
            return frame
        self._parts.append(frame.body)
        _check_message(sum(map(len, self._parts)))
        if frame.kind is FrameKind.PART:
            return None
        body, self._parts = b"".join(self._parts), []
        return Frame(FrameKind.MESSAGE, body)


def _check_message(length: int) -> None:
    if length > MESSAGE_LIMIT_BYTES:
        raise ProtocolError(f"a message of {length} bytes; they have at most {MESSAGE_LIMIT_BYTES}")


def _check_length(kind: FrameKind, length: int) -> None:
    if length > LIMITS_BYTES[kind]:
        raise ProtocolError(f"a frame of {length} bytes; {kind.name} frames have at most {LIMITS_BYTES[kind]}")
