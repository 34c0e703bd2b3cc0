"""When a precopy is said to have converged, for passes as QEMU makes them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnap.rules.convergence import LONG_PAGES, LONG_SECTIONS, LONG_SECTIONS_IN_ALL, PATIENCE, SHORT_PAGES, Convergence

PAGE = 4096
RAM_PAGES = 65536
BLOCKS = (RAM_PAGES - 1000, 1000)  #: of the two RAMBlocks, in pages


def send(convergence: Convergence, pages: list[int]) -> None:
    """A section of these pages, counted through both blocks."""
    for block, first in enumerate((0, BLOCKS[0])):
        inside = [page - first for page in pages if first <= page < first + BLOCKS[block]]
        if inside:
            convergence.add(block, min(inside) * PAGE, max(inside) * PAGE, len(inside))
    convergence.end_section()


def send_all(convergence: Convergence, section: int) -> None:
    """The first pass, in sections of so many pages."""
    for first, after in pairwise([*range(0, RAM_PAGES, section), RAM_PAGES]):
        send(convergence, list(range(first, after)))


@given(st.integers(1, 3 * RAM_PAGES))
def test_the_first_pass_does_not_count_however_short_its_sections(section: int) -> None:
    convergence = Convergence(RAM_PAGES)
    send_all(convergence, section if RAM_PAGES / section < 1000 else 100)
    assert not convergence.converged
    assert not convergence.sent_again


@pytest.mark.parametrize("dirty", [[], [0], [RAM_PAGES - 1], list(range(SHORT_PAGES))])
def test_two_short_sections_after_it_do(dirty: list[int]) -> None:
    convergence = Convergence(RAM_PAGES)
    send_all(convergence, 20000)
    send(convergence, dirty)
    assert not convergence.converged, "what is left of a long pass may be short"
    send(convergence, dirty)
    assert convergence.converged


def test_a_long_pass_between_them() -> None:
    convergence = Convergence(RAM_PAGES)
    send_all(convergence, 20000)
    for dirty in ([1], list(range(SHORT_PAGES + 1)), [1]):
        send(convergence, dirty)
        assert not convergence.converged
    send(convergence, [1])
    assert convergence.converged


@pytest.mark.parametrize("dirty", [LONG_PAGES, SHORT_PAGES + 1])
def test_more_is_put_up_with_where_memory_changes_fast(dirty: int) -> None:
    convergence = Convergence(RAM_PAGES)
    send_all(convergence, 20000)
    sections = 0
    while not convergence.converged:
        send(convergence, list(range(dirty)))
        sections += 1
    assert sections * dirty >= RAM_PAGES / 2 or sections > LONG_SECTIONS
    assert not convergence.hopeless


def test_what_takes_too_long_is_hopeless_even_if_it_is_not_much() -> None:
    convergence = Convergence(1 << 24)
    send(convergence, [])
    for _ in range(LONG_SECTIONS_IN_ALL + 1):
        assert not convergence.hopeless
        send(convergence, list(range(LONG_PAGES + 1)))
    assert convergence.hopeless
    assert not convergence.converged


def test_what_never_becomes_less_is_hopeless() -> None:
    convergence = Convergence(RAM_PAGES)
    send_all(convergence, 20000)
    passes = 0
    while not convergence.hopeless:
        send_all(convergence, 20000)
        passes += 1
        assert not convergence.converged
    assert passes == PATIENCE + 1


def test_what_was_under_way_when_qemu_had_to_wait_tells_nothing() -> None:
    convergence = Convergence(RAM_PAGES)
    send_all(convergence, 20000)
    for _ in range(2):
        send(convergence, [7])
    convergence.resume()
    for _ in range(2):
        send(convergence, [7])
        assert not convergence.converged
    send(convergence, [7])
    assert convergence.converged


def test_short_passes_are_never_hopeless_however_many_they_are() -> None:
    """A QEMU that nobody holds yet makes thousands while its receiver waits for a processor."""
    convergence = Convergence(RAM_PAGES)
    send_all(convergence, 20000)
    for _ in range(10 * LONG_SECTIONS_IN_ALL):
        send(convergence, [])
    assert convergence.converged
    convergence.resume()
    assert not convergence.hopeless
