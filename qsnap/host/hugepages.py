"""Huge pages of the host: how many are free, reserving more, giving them back (2 MiB pages)."""

from __future__ import annotations

from pathlib import Path

from qsnap.errors import HostError

HUGE_PAGE_BYTES = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def pages_for(size_bytes: int) -> int:
    """Huge pages needed for RAM of this size; it must be a multiple of a huge page."""
    return size_bytes // HUGE_PAGE_BYTES


def free_pages() -> int:
    """Huge pages that are neither used nor promised to anybody. 0 where the kernel has none."""
    try:
        return _read("free_hugepages") - _read("resv_hugepages")
    except OSError:
        return 0


def reserve_pages(pages: int) -> int:
    """Make sure that so many pages are free, and return how many were added to the pool for it.

    Raises HostError, with the pool as it was, if the host cannot spare them.
    """
    missing = pages - free_pages()
    if missing <= 0:
        return 0
    try:
        before = _read("nr_hugepages")
        _write_pool(before + missing)
    except OSError as error:
        raise _refusal(pages, error.strerror or str(error)) from error
    if free_pages() < pages:
        _write_pool(before)
        raise _refusal(pages, "memory is too full or too fragmented")
    return missing


def give_back_pages(pages: int) -> None:
    """Take so many pages out of the pool again."""
    if pages:
        _write_pool(max(0, _read("nr_hugepages") - pages))


def _refusal(pages: int, reason: str) -> HostError:
    return HostError(
        f"cannot reserve {pages} huge pages: {reason}",
        where=str(_POOL / "nr_hugepages"),
        advice='Set backing = "anonymous", or free memory and reserve them: sysctl vm.nr_hugepages=N',
    )


def _read(name: str) -> int:
    return int((_POOL / name).read_text())


def _write_pool(pages: int) -> None:
    (_POOL / "nr_hugepages").write_text(str(pages))
