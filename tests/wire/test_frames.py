"""Frames: whole, byte by byte and with more behind them; and what is no frame."""

from __future__ import annotations

import random
from collections.abc import Iterable
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnap.errors import ProtocolError
from qsnap.wire.frames import (
    LIMITS_BYTES,
    MESSAGE_LIMIT_BYTES,
    Frame,
    FrameKind,
    FrameReader,
    PartJoiner,
    encode_frame,
    split_message,
)

MESSAGE, DATA, PART = FrameKind.MESSAGE, FrameKind.DATA, FrameKind.PART
PART_BYTES = LIMITS_BYTES[PART]
FRAMES = [
    (Frame(MESSAGE, b"{}"), b"\1\0\0\0\2{}"),
    (Frame(DATA, b""), b"\2\0\0\0\0"),
    (Frame(DATA, b"\1\0\0\0\2{}"), b"\2\0\0\0\7\1\0\0\0\2{}"),
    (Frame(DATA, bytes(1 << 20)), b"\2\0\x10\0\0" + bytes(1 << 20)),
    (Frame(MESSAGE, bytes(4 << 20)), b"\1\0\x40\0\0" + bytes(4 << 20)),
]
SHORT = FRAMES[:3]
ids = ["message", "empty", "nested", "longest-data", "longest-message"]


def read(pieces: Iterable[bytes]) -> list[Frame]:
    reader = FrameReader()
    found = []
    for piece in pieces:
        reader.receive_data(piece)
        while frame := reader.next_frame():
            found.append(frame)
    return found


@pytest.mark.parametrize(("frame", "data"), FRAMES, ids=ids)
def test_whole(frame: Frame, data: bytes) -> None:
    assert encode_frame(frame) == data
    assert read([data]) == [frame]


@pytest.mark.parametrize(("frame", "data"), SHORT, ids=ids[:3])
def test_byte_by_byte(frame: Frame, data: bytes) -> None:
    pieces = [data[i : i + 1] for i in range(len(data))]
    assert read(pieces[:-1]) == []
    assert read(pieces) == [frame]


@pytest.mark.parametrize(("frame", "data"), SHORT, ids=ids[:3])
def test_with_more_behind_it(frame: Frame, data: bytes) -> None:
    for _, other in SHORT:
        for end in range(len(other)):
            assert read([data + other[:end]]) == [frame]
    assert read([data * 3]) == [frame] * 3


@pytest.mark.parametrize("kind", [0, 4, 22, 0x47, 255])
def test_an_unknown_kind(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"a frame of the unknown kind {kind}"):
        read([pack(">BI", kind, 0)])


@pytest.mark.parametrize("kind", FrameKind)
def test_a_frame_that_is_too_long_is_refused_by_its_head(kind: FrameKind) -> None:
    length = LIMITS_BYTES[kind] + 1
    reader = FrameReader()
    reader.receive_data(pack(">BI", kind.value, length))
    for _ in range(2):  # it stays so
        with pytest.raises(ProtocolError, match=f"a frame of {length} bytes"):
            reader.next_frame()
    with pytest.raises(ProtocolError, match=f"a frame of {length} bytes"):
        encode_frame(Frame(kind, bytes(length)))


def test_frames_before_a_fault_are_read() -> None:
    reader = FrameReader()
    reader.receive_data(FRAMES[0][1] + b"GET / HTTP/1.1\r\n")
    assert reader.next_frame() == FRAMES[0][0]
    with pytest.raises(ProtocolError):
        reader.next_frame()


@pytest.mark.parametrize(
    ("length", "kinds"),
    [
        (0, [MESSAGE]),
        (PART_BYTES, [MESSAGE]),
        (PART_BYTES + 1, [PART, MESSAGE]),
        (2 * PART_BYTES, [PART, MESSAGE]),
        (2 * PART_BYTES + 5, [PART, PART, MESSAGE]),
    ],
)
def test_a_long_message_in_parts(length: int, kinds: list[FrameKind]) -> None:
    body = random.Random(length).randbytes(length)
    sent = split_message(body)
    assert [frame.kind for frame in sent] == kinds
    joiner = PartJoiner()
    for _ in range(2):
        *parts, whole = map(joiner.join, read([b"".join(map(encode_frame, sent))]))
        assert parts == [None] * (len(kinds) - 1)
        assert whole == Frame(MESSAGE, body)
        assert joiner.join(Frame(DATA, b"x")) == Frame(DATA, b"x")


def test_data_in_the_middle_of_a_message() -> None:
    joiner = PartJoiner()
    joiner.join(Frame(PART, b"{"))
    with pytest.raises(ProtocolError, match="data came in the middle of a message"):
        joiner.join(Frame(DATA, b"x"))


def test_a_message_that_is_too_long() -> None:
    with pytest.raises(ProtocolError, match=f"a message of {MESSAGE_LIMIT_BYTES + 1} bytes"):
        split_message(bytes(MESSAGE_LIMIT_BYTES + 1))
    joiner, part = PartJoiner(), Frame(PART, bytes(PART_BYTES))
    for _ in range(MESSAGE_LIMIT_BYTES // PART_BYTES):
        assert joiner.join(part) is None
    with pytest.raises(ProtocolError, match=f"they have at most {MESSAGE_LIMIT_BYTES}"):
        joiner.join(part)


frames = st.builds(Frame, st.sampled_from(FrameKind), st.binary(max_size=40))


@given(st.lists(frames, max_size=6), st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_any_frames_in_any_pieces(sent: list[Frame], sizes: list[int]) -> None:
    data = b"".join(map(encode_frame, sent))
    pieces: list[bytes] = []
    while data:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[:size])
        data = data[size:]
    assert read(pieces) == sent


@given(st.binary(max_size=200))
def test_anything_is_frames_or_a_protocol_error(data: bytes) -> None:
    try:
        found = read([data])
    except ProtocolError:
        return
    assert data.startswith(b"".join(map(encode_frame, found)))
