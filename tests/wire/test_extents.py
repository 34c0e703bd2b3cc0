"""Parts of files: what is sent is what is written, and nothing else can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnap.errors import ProtocolError
from qsnap.wire.extents import decode_extents, encode_extent

PIECES = st.lists(st.tuples(st.integers(0, 99), st.binary(min_size=1, max_size=9)), max_size=5)


@given(PIECES, st.integers(0, 9))
def test_extents_arrive_as_they_were(pieces: list[tuple[int, bytes]], more: int) -> None:
    extents, end = [], 0
    for hole, data in pieces:
        extents.append((end + hole, data))
        end += hole + len(data)
    body = b"".join(encode_extent(*extent) for extent in extents)
    start = extents[0][0] if extents else 0
    assert [(offset, bytes(data)) for offset, data in decode_extents(body, start, end + more)] == extents


@pytest.mark.parametrize(
    "body",
    [
        b"short",
        encode_extent(3, b"before"),
        encode_extent(8, b"beyond"),
        encode_extent(5, b""),
        encode_extent(5, b"cut")[:-1],
        encode_extent(5, b"one") + encode_extent(7, b"in"),
        encode_extent(5, b"one") + b"short",
    ],
)
def test_what_would_lie_elsewhere_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="a part of a file"):
        list(decode_extents(body, 4, 12))


@given(st.binary(max_size=60))
def test_any_bytes_are_extents_or_a_protocol_error(body: bytes) -> None:
    try:
        found = list(decode_extents(body, 1, 1000))
    except ProtocolError:
        return
    assert b"".join(encode_extent(offset, bytes(data)) for offset, data in found) == body
