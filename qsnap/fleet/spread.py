"""Which hosts a VNE is spread over: kept in the store of whoever started it, or has named its description since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cattrs.preconf.json import make_converter

from qsnap.errors import HostError, InDoubtError
from qsnap.host.place import Place
from qsnap.host.store.files import make_directories, write_durably
from qsnap.model import VNE
from qsnap.rules.manifest import check_names

SPREAD = "spread.json"
_converter = make_converter()


def remember(vne: VNE, place: Place) -> None:
    """Let whatever names the VNE find its hosts from now on. One without hosts is forgotten."""
    path = _path(vne.name, place)
    if vne.hosts:
        make_directories(place.store, vne.name)
        write_durably(path, _converter.dumps(vne, indent=1).encode())
    else:
        path.unlink(missing_ok=True)


@contextmanager
def remembered(vne: VNE, place: Place) -> Iterator[None]:
    """The same for the block, and from then on if it ends well; else what was known before is.

    Where nobody knows how it has ended, the hosts may still be asked.
    """
    path = _path(vne.name, place)
    before = path.read_bytes() if path.exists() else None
    remember(vne, place)
    try:
        yield
    except InDoubtError:
        raise
    except BaseException:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            write_durably(path, before)
        raise


def known_before(vne: VNE, place: Place) -> VNE | None:
    """What is remembered of a VNE of this name, if it can be read."""
    with suppress(HostError):
        return spread_of(vne.name, place)
    return None


def spread_of(vne: str, place: Place) -> VNE | None:
    """The whole VNE, if it is spread over hosts. Raises HostError if what is remembered of it is damaged."""
    path = _path(vne, place)
    try:
        return _converter.loads(path.read_bytes(), VNE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # see Runtime.load
        advice = "Name the description in place of the VNE: qsnap ps LAB.toml"
        raise HostError("this file is damaged", where=str(path), advice=advice) from error


def spreads(place: Place) -> tuple[VNE, ...]:
    """All VNEs that are spread over hosts, as far as is known here."""
    names = sorted(path.parent.name for path in place.store.glob(f"*/{SPREAD}"))
    return tuple(vne for name in names if (vne := spread_of(name, place)))


def _path(vne: str, place: Place) -> Path:
    check_names(vne)
    return place.store / vne / SPREAD
