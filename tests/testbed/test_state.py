"""The judge judged: images built word by word, sound ones accepted, every altered one found out."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve, field, frozen
from hypothesis import given
from hypothesis import strategies as st

from testbed import state as judge
from testbed.state import GuestState, GuestStateError, Orphan, StreamPhase, StreamState

PAGES = 1010  # three table pages, the last one partly used
TOUCHED = 2500
TOUCHING = TOUCHED % PAGES
NONCE = 0xFEEDFACECAFEBEEF
HEADER_WORDS = 7
words64 = st.integers(0, judge.MASK)
guest_pages = st.integers(0, PAGES - 1).filter(lambda index: index != TOUCHING)


def stream(peer: int = 2, count: int = 0) -> StreamState:
    return StreamState(peer=peer, phase=StreamPhase.OPEN, bytes=count, digest_bytes=4096, digest=bytes(range(32)).hex())


def guest(id: int = 1, peers: int = 3, **changes: Any) -> GuestState:
    """A guest's state; arrays per peer and everything else can be given."""
    none = (0,) * peers
    return evolve(
        GuestState(
            id=id, peers=peers, nonce=NONCE, stamp_pages=PAGES, ready=True, ticks=1000, uptime_ms=1234,
            touched=TOUCHED, touching=TOUCHING, stamp_errors=0, send_errors=0, stream_errors=0,
            streams_completed=0, streams_matched=0, sent=none, received=none, highest=none, duplicates=none,
            reordered=none, skipped=none, stale=none, foreign=none, outgoing=stream(), incoming=stream(3),
        ),
        **changes,
    )  # fmt: skip


def stream_words(end: StreamState) -> list[int]:
    current, other = [end.digest_bytes, *struct.unpack("<4Q", bytes.fromhex(end.digest))], [7] * 5
    return [end.peer, end.phase, end.bytes, 1, *other, *current]


def state_page(state: GuestState, version: int = judge.STATE_VERSION) -> bytes:
    header = [*struct.unpack("<2Q", judge.STATE_MAGIC), version, state.nonce, state.id, state.peers]
    header.append(state.stamp_pages)
    check = 0
    for word in header:
        check = judge.mix64(check ^ word)
    words = [*header, check, *(int(getattr(state, name)) for name in judge.SCALARS)]
    words += [0] * (judge.PER_PEER_AT - len(words))
    for name in judge.PER_PEER:
        values = getattr(state, name)
        words += [*values, *[0] * (judge.MAX_PEERS - len(values))]
    words += stream_words(state.outgoing) + stream_words(state.incoming)
    return struct.pack(f"<{len(words)}Q", *words).ljust(judge.PAGE_BYTES, b"\0")


def table_page(nonce: int, index: int, generations: list[int]) -> bytes:
    head = judge.TABLE_MAGIC + struct.pack("<6Q", nonce, index, 0, 0, 0, 0)
    return (head + struct.pack(f"<{len(generations)}Q", *generations)).ljust(judge.PAGE_BYTES, b"\0")


def mix_of(nonce: int, index: int, generation: int) -> int:
    return judge.mix64(nonce ^ judge.mix64(index << 40 ^ generation))


def stamp_page(index: int, generation: int, new_words: int = 0, nonce: int = NONCE) -> bytes:
    """A page whose first `new_words` stamp words, in the order of writing, are of the next generation."""
    versions = [(g, mix_of(nonce, index, g)) * 2 for g in (generation, generation + 1)]
    head_generation, head_mix, *tail = versions[1][:new_words] + versions[0][new_words:]
    seed = judge.mix64((nonce + index) & judge.MASK)
    body = [(seed + k * judge.STEP) & judge.MASK for k in range(judge.BODY_WORDS)]
    return judge.STAMP_MAGIC + struct.pack("<510Q", nonce, index, head_generation, head_mix, *body, *tail)


def generation_of(index: int) -> int:
    """Pages are touched one after the other, over and over."""
    return TOUCHED // PAGES + (index < TOUCHED % PAGES)


@frozen
class Image:
    """A guest's RAM as a list of pages; `at(index)` is where a stamped page lies."""

    pages: list[bytes] = field(factory=list)
    first_stamp: int = 0

    def at(self, index: int) -> int:
        return self.first_stamp + index

    def replaced(self, index: int, page: bytes) -> bytes:
        pages = list(self.pages)
        pages[self.at(index)] = page
        return b"".join(pages)

    def ram(self) -> bytes:
        return b"".join(self.pages)


def build(state: GuestState) -> Image:
    """State in the middle, tables back to front, a page of another boot, a page of noise, zero pages."""
    generations = [generation_of(index) for index in range(PAGES)]
    tables = [
        table_page(NONCE, index, generations[index * judge.GENERATIONS :][: judge.GENERATIONS])
        for index in range(-(-PAGES // judge.GENERATIONS))
    ]
    zero = bytes(judge.PAGE_BYTES)
    noise = np.random.default_rng(1).bytes(judge.PAGE_BYTES)
    foreign = [stamp_page(5, 77, nonce=NONCE + 1), table_page(NONCE + 1, 0, [9] * 100)]
    before = [zero, noise, *tables[::-1], *foreign, zero, state_page(state), zero]
    stamps = [stamp_page(index, generations[index]) for index in range(PAGES)]
    return Image(pages=[*before, *stamps, zero], first_stamp=len(before))


SOUND = build(guest())


def test_constants_are_those_of_the_guest() -> None:
    source = (Path(judge.__file__).parent / "guest" / "state.h").read_text()
    magics = re.findall(r'#define \w+_MAGIC "(.{16})"', source)
    assert [magic.encode() for magic in magics] == [judge.STATE_MAGIC, judge.TABLE_MAGIC, judge.STAMP_MAGIC]
    for name in ("STATE_VERSION", "GENERATIONS", "MAX_PEERS"):
        assert f"{name} = {getattr(judge, name)}" in source
    phases = re.search(r"enum phase \{(.*?)\}", source, re.DOTALL)
    assert phases is not None
    assert re.findall(r"\w+", phases[1]) == [f"STREAM_{phase.name}" for phase in StreamPhase]


class TestState:
    @given(
        counters=st.fixed_dictionaries({name: words64 for name in judge.SCALARS if name != "ready"}),
        arrays=st.fixed_dictionaries({name: st.tuples(words64, words64) for name in judge.PER_PEER}),
        count=words64,
    )
    def test_every_counter_comes_back(
        self, counters: dict[str, int], arrays: dict[str, tuple[int, ...]], count: int
    ) -> None:
        state = guest(2, 2, **counters, **arrays, outgoing=stream(1, count))
        assert judge.read_state(bytes(judge.PAGE_BYTES) + state_page(state)) == state

    def test_a_file_with_holes_reads_like_a_buffer(self, tmp_path: Path) -> None:
        path = tmp_path / "ram"
        with path.open("wb") as file:
            file.seek(300 << 20)
            file.write(SOUND.ram())
            file.truncate(700 << 20)
        assert judge.read_state(path) == judge.read_state(SOUND.ram()) == guest()
        assert judge.check_stamps(path, guest()).ok

    def test_ram_in_several_files_is_one_image(self, tmp_path: Path) -> None:
        middle = len(SOUND.ram()) // 2 // judge.PAGE_BYTES * judge.PAGE_BYTES
        for index, part in enumerate((SOUND.ram()[:middle], SOUND.ram()[middle:])):
            (tmp_path / str(index)).write_bytes(part)
        paths = (tmp_path / "0", tmp_path / "1")
        assert judge.read_state(paths) == guest()
        assert judge.check_stamps(paths, guest()).ok
        assert judge.check_stamps(paths[0], guest()).missing

    @pytest.mark.parametrize("ram", [b"", bytes(3 * judge.PAGE_BYTES), SOUND.ram()[8:]])
    def test_no_state_is_an_error(self, ram: bytes, tmp_path: Path) -> None:
        path = tmp_path / "ram"
        path.write_bytes(ram)
        for image in (ram, path):
            with pytest.raises(GuestStateError, match="0 intact state blocks of 0"):
                judge.read_state(image)

    def test_two_states_are_an_error(self) -> None:
        with pytest.raises(GuestStateError, match="2 intact state blocks"):
            judge.read_state(state_page(guest()) * 2)

    @pytest.mark.parametrize("word", range(2, HEADER_WORDS + 1))
    def test_a_damaged_header_is_an_error(self, word: int) -> None:
        page = bytearray(state_page(guest()))
        page[8 * word] ^= 1
        with pytest.raises(GuestStateError, match="0 intact state blocks of 1"):
            judge.read_state(page)

    def test_another_version_is_an_error(self) -> None:
        with pytest.raises(GuestStateError, match="version 2"):
            judge.read_state(state_page(guest(), version=judge.STATE_VERSION + 1))

    def test_answers_and_images_give_the_same_state(self) -> None:
        state = guest(sent=(0, 5, 6), ready=False)
        answer = {name: getattr(state, name) for name in GuestState.__annotations__}
        answer |= {name: list(answer[name]) for name in judge.PER_PEER}
        for name in ("outgoing", "incoming"):
            end = answer[name]
            answer[name] = {key: getattr(end, key) for key in StreamState.__annotations__} | {"phase": 2}
        assert GuestState.from_json({**answer, "nonce": f"{NONCE:016x}"}) == state


class TestStamps:
    def test_a_sound_image_has_every_page(self) -> None:
        report = judge.check_stamps(SOUND.ram(), guest())
        assert report.ok
        assert (report.pages, report.in_progress) == (PAGES, None)

    @pytest.mark.parametrize("new_words", [1, 2, 3, 4])
    def test_the_page_being_written_may_be_half_new(self, new_words: int) -> None:
        page = stamp_page(TOUCHING, generation_of(TOUCHING), new_words)
        report = judge.check_stamps(SOUND.replaced(TOUCHING, page), guest())
        assert report.ok
        assert report.in_progress == TOUCHING

    @given(index=guest_pages, new_words=st.integers(1, 4))
    def test_no_other_page_may(self, index: int, new_words: int) -> None:
        page = stamp_page(index, generation_of(index), new_words)
        report = judge.check_stamps(SOUND.replaced(index, page), guest())
        assert report.wrong == (index,)

    @given(index=guest_pages, bit=st.integers(0, 8 * judge.PAGE_BYTES - 1))
    def test_no_bit_can_be_altered(self, index: int, bit: int) -> None:
        page = bytearray(SOUND.pages[SOUND.at(index)])
        page[bit // 8] ^= 1 << bit % 8
        report = judge.check_stamps(SOUND.replaced(index, bytes(page)), guest())
        assert not report.ok
        assert index in {*report.wrong, *report.missing}

    @given(index=st.integers(0, PAGES - 1), age=st.integers(1, 2))
    def test_a_stale_page_is_wrong(self, index: int, age: int) -> None:
        page = stamp_page(index, generation_of(index) - age)
        assert judge.check_stamps(SOUND.replaced(index, page), guest()).wrong == (index,)

    def test_a_lost_page_is_missing(self) -> None:
        report = judge.check_stamps(SOUND.replaced(7, bytes(judge.PAGE_BYTES)), guest())
        assert (report.missing, report.wrong, report.ok) == ((7,), (), False)

    def test_a_page_in_the_place_of_another_is_noticed(self) -> None:
        report = judge.check_stamps(SOUND.replaced(7, SOUND.pages[SOUND.at(8)]), guest())
        assert (report.missing, report.wrong) == ((7,), (8,))

    def test_a_stale_table_is_noticed(self) -> None:
        ram = SOUND.ram().replace(
            table_page(NONCE, 2, [generation_of(index) for index in range(1008, PAGES)]),
            table_page(NONCE, 2, [1] * (PAGES - 1008)),
        )
        report = judge.check_stamps(ram, guest())
        assert report.wrong == (1008, 1009)
        assert report.miscounted

    @pytest.mark.parametrize(("behind", "miscounted"), [(-1, True), (0, False), (1, False), (2, True)])
    def test_the_count_of_touches_is_at_most_one_behind(self, behind: int, miscounted: bool) -> None:
        report = judge.check_stamps(SOUND.ram(), guest(touched=TOUCHED - behind))
        assert report.miscounted is miscounted

    def test_a_guest_without_working_set_has_nothing_to_check(self) -> None:
        assert judge.check_stamps(SOUND.ram(), guest(stamp_pages=0, touched=0)).ok


class TestOrphans:
    @given(data=st.data(), peers=st.integers(1, 5))
    def test_a_consistent_cut_has_none_and_one_early_frame_is_found(self, data: st.DataObject, peers: int) -> None:
        sent = [[data.draw(st.integers(0, 99)) for _ in range(peers)] for _ in range(peers)]
        states = [
            guest(
                me + 1,
                peers,
                sent=tuple(sent[me]),
                received=tuple(data.draw(st.integers(0, sent[other][me])) for other in range(peers)),
                incoming=stream(0),
            )
            for me in range(peers)
        ]
        assert judge.find_orphans(states) == ()
        if peers > 1:
            early = tuple(sent[other][0] + (other == 1) for other in range(peers))
            states[0] = evolve(states[0], received=early)
            orphan = Orphan("datagrams", receiver=1, sender=2, received=early[1], sent=sent[1][0])
            assert judge.find_orphans(states) == (orphan,)

    def test_loss_does_not_hide_an_early_frame(self) -> None:
        states = [guest(1, received=(0, 3, 0), highest=(0, 11, 0)), guest(2, sent=(10, 0, 0))]
        assert judge.find_orphans(states) == (Orphan("sequence", 1, 2, 11, 10),)

    def test_a_stream_may_not_be_ahead_of_its_sender(self) -> None:
        states = [guest(1, incoming=stream(2, 8177)), guest(2, outgoing=stream(1, 8176))]
        assert judge.find_orphans(states) == (Orphan("stream", 1, 2, 8177, 8176),)
