"""Frames and the messages in them: the same however they are cut, encoded to the same again, or ProtocolError."""

from __future__ import annotations

from qsnap.errors import ProtocolError
from qsnap.wire.frames import Frame, FrameKind, FrameReader, encode_frame
from qsnap.wire.messages import Refused, decode_message, encode_message


def check(data: bytes) -> None:
    """`data` are frames; its lines are messages too, so that the mutations of JSON reach them."""
    frames, fault = read(data, len(data) or 1)
    assert read(data, 7) == (frames, fault)
    assert data.startswith(b"".join(map(encode_frame, frames)))
    for body in (*data.split(b"\n"), *(frame.body for frame in frames if frame.kind is FrameKind.MESSAGE)):
        check_message(body)


def read(data: bytes, step: int) -> tuple[list[Frame], str]:
    """The frames, and what is wrong with the rest."""
    reader = FrameReader()
    frames: list[Frame] = []
    try:
        for start in range(0, len(data), step):
            reader.receive_data(data[start : start + step])
            while frame := reader.next_frame():
                frames.append(frame)
    except ProtocolError as error:
        return frames, error.message
    return frames, ""


def check_message(body: bytes) -> None:
    try:
        message = decode_message(body)
    except ProtocolError:
        return
    assert decode_message(encode_message(message)) == message
    if isinstance(message, Refused):
        error = message.error()
        assert str(Refused.of(error).error()) == str(error)
