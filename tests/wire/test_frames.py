"""Frames: whole, byte by byte and with more behind them; and what is no frame."""

from __future__ import annotations

from collections.abc import Iterable
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnap.errors import ProtocolError
from qsnap.wire.frames import LIMITS_BYTES, Frame, FrameKind, FrameReader, encode_frame

MESSAGE, DATA = FrameKind.MESSAGE, FrameKind.DATA
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


@pytest.mark.parametrize("kind", [0, 3, 22, 0x47, 255])
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
