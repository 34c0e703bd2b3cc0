"""Huge pages of the host: how many are free, reserving more, giving them back (2 MiB pages)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import evolve, field, frozen
from cattrs.preconf.json import make_converter

from qsnap.errors import HostError

HUGE_PAGE_BYTES = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_converter = make_converter()


def pages_for(size_bytes: int) -> int:
    """Huge pages needed for RAM of this size; it must be a multiple of a huge page."""
    return size_bytes // HUGE_PAGE_BYTES


def free_pages() -> int:
    """Huge pages that are neither used nor promised to anybody. 0 where the kernel has none."""
    try:
        return _read("free_hugepages") - _read("resv_hugepages")
    except OSError:
        return 0


@frozen
class Change:
    """A change of the pool's size that is under way, in the name of a VNE."""

    vne: str
    before: int
    after: int


@frozen
class Ledger:
    """Pages added to the kernel's pool, by the VNE they were added for.

    After a crash in the middle of a change the pool's size tells whether it is still to be made.
    """

    added: dict[str, int] = field(factory=dict)
    change: Change | None = None


@frozen
class HugePages:
    """The kernel's pool of huge pages, and the ledger (a file) of what was added to it."""

    ledger: Path

    def reserve(self, vne: str, pages: int) -> None:
        """Make sure that so many pages are free, adding to the pool what is missing, in the name of a VNE.

        Raises HostError, with the pool as it was, if the host cannot spare them.
        """
        with _locked():
            missing = pages - free_pages()
            if missing <= 0:
                return
            if not os.access(_POOL / "nr_hugepages", os.W_OK):
                raise _refusal(pages, "only root may")
            try:
                self._resize(vne, missing + _read("surplus_hugepages"))
            except OSError as error:
                raise _refusal(pages, error.strerror or str(error)) from error
            if free_pages() < pages:
                self._resize(vne, 0)
                raise _refusal(pages, "memory is too full or too fragmented")

    def give_back(self, vne: str) -> None:
        """Take the pages that were added for a VNE out of the pool again. Nothing happens the second time."""
        if self.ledger.exists():
            with _locked():
                self._resize(vne, 0)

    def _resize(self, vne: str, pages: int) -> None:
        ledger = self._settled()
        missing = pages - ledger.added.get(vne, 0)
        if missing:
            size = _size()
            self._save(evolve(ledger, change=Change(vne, size, max(0, size + missing))))
            self._settled()

    def _settled(self) -> Ledger:
        """The ledger with its change carried out, if there is one, as far as the kernel had pages for it."""
        ledger = self._load()
        if ledger.change is None:
            return ledger
        vne, before, after = ledger.change.vne, ledger.change.before, ledger.change.after
        if _size() == before:
            (_POOL / "nr_hugepages").write_text(str(after))
        left = ledger.added.get(vne, 0) + _size() - before
        others = {each: count for each, count in ledger.added.items() if each != vne}
        ledger = Ledger({**others, vne: left} if left > 0 else others)
        self._save(ledger)
        return ledger

    def _load(self) -> Ledger:
        try:
            return _converter.loads(self.ledger.read_bytes(), Ledger)
        except FileNotFoundError:
            return Ledger()

    def _save(self, ledger: Ledger) -> None:
        if ledger == Ledger():
            self.ledger.unlink(missing_ok=True)
            return
        fresh = self.ledger.with_suffix(".new")
        fresh.write_text(_converter.dumps(ledger))
        fresh.replace(self.ledger)


@contextmanager
def _locked() -> Iterator[None]:
    """Keep every other qsnap on this host from changing the pool, whatever its ledger."""
    try:
        fd = os.open(_POOL / "nr_hugepages", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        advice = 'Set backing = "anonymous".'
        raise HostError("the kernel has no huge pages of 2 MiB", where=str(_POOL), advice=advice) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _refusal(pages: int, reason: str) -> HostError:
    return HostError(
        f"cannot reserve {pages} huge pages: {reason}",
        where=str(_POOL / "nr_hugepages"),
        advice='Set backing = "anonymous", or free memory and have root reserve them: sysctl vm.nr_hugepages=N',
    )


def _size() -> int:
    """Pages the kernel keeps. Those it gives up as soon as their user lets go, its surplus, are not among them."""
    return _read("nr_hugepages") - _read("surplus_hugepages")


def _read(name: str) -> int:
    return int((_POOL / name).read_text())
