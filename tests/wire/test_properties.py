"""Any order of records, in any pieces, gives the RAM that a plain model of it gives; anything else is StreamError."""

from __future__ import annotations

from attrs import frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qsnap.errors import StreamError

from . import building as b
from .folding import RECORDED, Folded, chunked, fold, make_reader, read_recorded

PAGES = 64
BLOCKS = {"pc.ram": PAGES * b.PAGE, "/rom@etc/acpi/tables": PAGES * b.PAGE}
CONTENTS = [bytes(b.PAGE), *(bytes([i]) * b.PAGE for i in (1, 0x22, 0x28, 0xFF))]


@frozen
class Burst:
    """Pages sent one after the other; `pattern` is what each holds, over and over; 0 is a zero page."""

    idstr: str
    first: int
    count: int
    pattern: tuple[int, ...]
    descending: bool
    new_section: bool
    names_again: bool

    def pages(self) -> list[tuple[int, int]]:
        indices = range(self.first, min(self.first + self.count, PAGES))
        listed = [(index, self.pattern[i % len(self.pattern)]) for i, index in enumerate(indices)]
        return listed[::-1] if self.descending else listed


bursts = st.lists(
    st.builds(
        Burst,
        idstr=st.sampled_from(sorted(BLOCKS)),
        first=st.integers(0, PAGES - 1),
        count=st.integers(1, PAGES),
        pattern=st.one_of(
            st.tuples(st.integers(0, len(CONTENTS) - 1)),
            st.lists(st.integers(0, len(CONTENTS) - 1), min_size=1, max_size=12).map(tuple),
        ),
        descending=st.booleans(),
        new_section=st.booleans(),
        names_again=st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


def build(plan: list[Burst]) -> tuple[bytes, dict[str, bytearray]]:
    """The stream, and what RAM holds in the end."""
    images = {idstr: bytearray(length) for idstr, length in BLOCKS.items()}
    sections, previous = [b""], ""
    for burst in plan:
        if burst.new_section:
            sections.append(b"")
        for index, content in burst.pages():
            name = "" if previous == burst.idstr and not burst.names_again else burst.idstr
            previous, offset = burst.idstr, index * b.PAGE
            page = CONTENTS[content]
            sections[-1] += b.data_page(offset, page, name) if content else b.zero_page(offset, name)
            images[burst.idstr][offset : offset + b.PAGE] = page
    return b.stream(*map(b.part, sections), b.end(), blocks=BLOCKS), images


pieces = st.lists(st.integers(1, 40_000), max_size=40)


@given(bursts, pieces)
@settings(max_examples=150)
def test_ram_is_what_the_model_says(plan: list[Burst], sizes: list[int]) -> None:
    stream, images = build(plan)
    folded = fold(chunked(stream, sizes))
    assert folded.images == images
    assert folded.sent == {(x.idstr, index * b.PAGE) for x in plan for index, _ in x.pages()}
    assert folded.devices == b.devices()


@given(bursts, st.data())
@settings(max_examples=150)
def test_a_changed_stream_is_read_or_refused(plan: list[Burst], data: st.DataObject) -> None:
    stream = bytearray(build(plan)[0])
    # Most bytes are page contents; aim at the others, where it matters, at least half of the time.
    changes = st.tuples(st.one_of(st.integers(0, 400), st.integers(0, len(stream) - 1)), st.integers(0, 255))
    for position, value in data.draw(st.lists(changes, min_size=1, max_size=4)):
        stream[min(position, len(stream) - 1)] = value
    read_or_refused(bytes(stream), data.draw(pieces))


@given(bursts, st.integers(0, 1 << 20))
@settings(max_examples=100)
def test_a_shortened_stream_is_refused(plan: list[Burst], cut: int) -> None:
    stream = build(plan)[0]
    assert read_or_refused(stream[: cut % len(stream)], []) is None


@given(st.binary(max_size=2000), st.sampled_from([b"", b.header(), b.header() + b.setup(BLOCKS)]))
@example(b"\x08\x00\x02\xff\xff", b.header())
@settings(max_examples=300)
def test_garbage_is_refused(garbage: bytes, head: bytes) -> None:
    assert read_or_refused(head + garbage, []) is None


@given(st.sampled_from(RECORDED), st.data())
@settings(max_examples=60)
def test_a_changed_recorded_stream_is_read_or_refused(name: str, data: st.DataObject) -> None:
    stream = bytearray(read_recorded(name))
    position = data.draw(st.one_of(st.integers(0, 300), st.integers(0, len(stream) - 1)))
    stream[position] ^= data.draw(st.integers(1, 255))
    read_or_refused(bytes(stream), [])


def read_or_refused(stream: bytes, sizes: list[int]) -> Folded | None:
    reader = make_reader(ram_limit_bytes=1 << 24)
    try:
        return fold(chunked(stream, sizes), reader)
    except StreamError as error:
        refused = error
    assert 0 <= refused.stream_offset <= len(stream)
    return None
