"""Reports: what snapshots cost, as a page and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import trio
from attrs import frozen

from qsnap.errors import HostError, StateError
from qsnap.model import Snapshot


@frozen
class Report:
    """The files that a report was written to, and the snapshots in it. `png` is empty if there is none."""

    snapshots: tuple[Snapshot, ...]
    page: str
    png: str


async def write_report(
    vne: str, found: Sequence[Snapshot], page: str | os.PathLike[str], png: str | os.PathLike[str]
) -> Report:
    """Draw snapshots of a VNE into these files, of which `png` may be empty."""
    if not found:
        raise StateError(f"{vne} has no snapshots", advice="See `qsnap ls`.")
    ordered = tuple(sorted(found, key=lambda each: each.created_s))
    await trio.to_thread.run_sync(_write, ordered, page, png)
    return Report(ordered, os.fspath(page), os.fspath(png))


def _write(snapshots: tuple[Snapshot, ...], page: str | os.PathLike[str], png: str | os.PathLike[str]) -> None:
    try:
        from qsnap.drawing.charts import draw_png
        from qsnap.drawing.page import make_page
    except ModuleNotFoundError as error:
        missing, _, _ = (error.name or "").partition(".")
        message = f"reports are drawn with {missing}, which is not installed"
        raise HostError(message, advice="pip install 'qsnap[report]'") from error
    _write_file(Path(page), make_page(snapshots).encode())
    if png:
        _write_file(Path(png), draw_png(snapshots))


def _write_file(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        advice = "Name a file that can be written."
        raise HostError(error.strerror or str(error), where=str(path), advice=advice) from error
