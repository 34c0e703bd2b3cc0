"""When a precopy has converged, from what comes of it: how many pages each section of RAM has, and which.

QEMU writes a section for each pass over the dirty pages, or several of 50 ms each (`ram_save_iterate`,
migration/ram.c). In each, pages come in the order of their addresses.
"""

from __future__ import annotations

from attrs import define

SHORT_PAGES = 256  #: a pass of no more leaves as little for a pause
LONG_PAGES = 2048  #: and of no more, where memory changes fast
LONG_SECTIONS = 20  #: that may go by until then, and
LONG_SECTIONS_IN_ALL = 400  #: 20 s
PATIENCE = 4.0  #: times the RAM that may be sent again

Key = tuple[int, int]  #: the number of a RAMBlock, and an offset in it


@define
class Convergence:
    """The passes of one precopy. `add` what comes, and say where a section ends."""

    ram_pages: int
    patience: float = PATIENCE
    all_sent: bool = False  #: each page was, once
    sent_again: int = 0  #: pages, since then
    long: int = 0  #: sections, since then
    _short: int = 0  # sections in a row
    _pages: int = 0
    _first: Key | None = None  # page of this section
    _last: Key = (0, 0)
    _before: Key = (-1, 0)  # the last page of the section before

    def add(self, block: int, lowest: int, highest: int, pages: int) -> None:
        """So many pages of a block have come, with offsets from `lowest` to `highest`."""
        self._first = min(self._first or (block, lowest), (block, lowest))
        self._last = max(self._last, (block, highest)) if self._pages else (block, highest)
        self._pages += pages

    def end_section(self) -> None:
        """What comes next belongs to another section."""
        if self._first is None or self._first <= self._before:
            self.all_sent = True
        if self.all_sent:
            self.sent_again += self._pages
            fast = self.long > LONG_SECTIONS or self.sent_again > self.ram_pages / 2
            if self._pages <= (LONG_PAGES if fast else SHORT_PAGES):
                self._short += 1
            else:
                self._short = 0
                self.long += 1
        if self._first is not None:
            self._before = self._last
        self._pages, self._first = 0, None

    def resume(self) -> None:
        """QEMU had to wait: what it is in the midst of tells nothing."""
        self._short = -1

    @property
    def converged(self) -> bool:
        """Whether a whole pass was short: two sections in a row were, as one may be the rest of a long pass."""
        return self._short >= 2

    @property
    def hopeless(self) -> bool:
        """Whether it goes on for too long."""
        return self.sent_again > self.patience * self.ram_pages or self.long > LONG_SECTIONS_IN_ALL
