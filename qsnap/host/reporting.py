"""Reports: what snapshots cost, as a page and as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import trio
from attrs import frozen

from qsnap.errors import HostError, StateError
from qsnap.host.catalogue import show, snapshots
from qsnap.host.place import Place
from qsnap.model import Snapshot


@frozen
class Report:
    """The files that a report was written to, and the snapshots in it. `png` is empty if there is none."""

    snapshots: tuple[Snapshot, ...]
    page: str
    png: str


async def report(
    vne: str,
    names: Iterable[str] = (),
    *,
    page: str | os.PathLike[str] = "report.html",
    png: str | os.PathLike[str] = "",
    place: Place | None = None,
) -> Report:
    """Draw these snapshots of a VNE, or all of them: a timeline each, and how they compare.

    `page` becomes a self-contained HTML file, `png` (optional) the same drawings as a picture; files that are there are
    replaced. Needs the extra `qsnap[report]`.

    Raises:
        StateError: there is no such snapshot.
        HostError: the extra is missing, or a file cannot be written.
    """
    found = [await show(vne, name, place=place) for name in dict.fromkeys(names)] or await snapshots(vne, place=place)
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
