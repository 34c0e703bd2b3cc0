"""The receiver of a precopy that is held: QEMU makes passes until little is left, and then waits for the cut.

It waits because nobody reads, and sends next to nothing meanwhile; now and then it makes another few passes, so that
not much is left. All of this is done beside the stream, as the parent and its event loop would be too slow: a QEMU that
waits for no reader makes up to 20,000 passes a second.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from qsnap.host.streams import narrow_socket, widen_socket
from qsnap.rules.convergence import Convergence
from qsnap.wire.events import Event, PageRun, ZeroRun
from qsnap.wire.records import RamSetup
from qsnap.wire.stream import StreamReader

FIRST_S, SHORTEST_S, LONGEST_S = 0.1, 0.01, 1.0  #: QEMU waits for so long between two times of catching up
#: Until 10.0, QEMU looks for what is dirty only after the first 100 ms (BUFFER_DELAY, migration/migration.c).
BEGIN_S = 0.12
LEFT_PAGES = 512  #: more than these are not to be left for the pause


class Hold:
    """Holds the QEMU that has `qemu_fd` from the time when it has converged until `released` says so."""

    def __init__(
        self,
        qemu_fd: int,
        released: Callable[[float], bool],
        queued: Callable[[], int],
        tell: Callable[[str], None],
        patience: float,
    ) -> None:
        self._theirs = socket.socket(fileno=qemu_fd)  # while this is open, the stream does not end
        self._released = released  # waits for so many seconds
        self._queued = queued  # bytes of the stream that were sent and not yet read
        self._tell = tell
        self._patience = patience
        self._convergence = Convergence(0)
        self._blocks: dict[str, int] = {}
        self._sections = 0
        self._told = False
        self._begun_s = 0.0
        self._wait_s = FIRST_S
        self._sent_before = 0
        self._old = 0  # the stream's offset up to which it was sent before the last wait was over
        self.over = False

    def follow(self, event: Event | None, reader: StreamReader) -> None:
        """Look at what has come, and wait if it is time to."""
        self._end_sections(reader)
        match event:
            case RamSetup(blocks=blocks):
                page_bytes = reader.target_page_size
                ram_pages = sum(block.used_length for block in blocks) // page_bytes
                self._convergence = Convergence(ram_pages, self._patience)
                self._begun_s = time.monotonic()
                self._blocks = {block.idstr: number for number, block in enumerate(blocks)}
            case PageRun(block, page_offsets) | ZeroRun(block, page_offsets):
                number = self._blocks[block.idstr]
                self._convergence.add(number, int(page_offsets.min()), int(page_offsets.max()), page_offsets.size)

    def _end_sections(self, reader: StreamReader) -> None:
        for _ in range(self._sections, reader.sections):
            self._convergence.end_section()
        self._sections = reader.sections
        if reader.stream_offset < self._old:  # hundreds of short passes may lie there, and a long one behind them
            self._convergence.resume()
        if self._convergence.converged:
            self._wait(reader)
        elif self._convergence.hopeless:
            self._say("diverged")

    def _say(self, word: str) -> None:
        if not self._told:
            self._told = True
            self._tell(word)

    def _wait(self, reader: StreamReader) -> None:
        narrow_socket(self._theirs)
        early_s = self._begun_s + BEGIN_S - time.monotonic()
        if early_s <= 0:
            self._say("settled")
        released = self._released(early_s if early_s > 0 else self._wait_s)
        self._old = reader.received_bytes + self._queued()
        widen_socket(self._theirs)
        if released:
            self.end()
            return
        much = self._convergence.sent_again - self._sent_before > LEFT_PAGES
        self._wait_s = max(self._wait_s / 2, SHORTEST_S) if much else min(2 * self._wait_s, LONGEST_S)
        self._sent_before = self._convergence.sent_again
        self._convergence.resume()

    def end(self) -> None:
        """It is released, while QEMU waited or not."""
        self.over = True
        self._theirs.close()
