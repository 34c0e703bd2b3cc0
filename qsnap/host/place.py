"""Where qsnap keeps things on this host, and how it tells of its progress."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from attrs import field, frozen

from qsnap.host.runtime import USUAL_ROOT, Runtime
from qsnap.host.store import Store

Progress = Callable[[str, str, int, int], None]
"""Called as `progress(stage, vm, done, total)`, in bytes or in steps; `total` is 0 where it is not known."""


def no_progress(stage: str, vm: str, done: int, total: int) -> None:
    """Tell nobody."""


def default_run_dir() -> Path:
    """`/run/qsnap` for root, else in the session's runtime directory, or below /tmp where there is none."""
    if os.geteuid() == 0:
        return USUAL_ROOT
    session = os.environ.get("XDG_RUNTIME_DIR")
    return Path(session, "qsnap") if session else Path(f"/tmp/qsnap-{os.geteuid()}")


def default_store_dir() -> Path:
    """`/var/lib/qsnap` for root, else below the user's data directory."""
    if os.geteuid() == 0:
        return Path("/var/lib/qsnap")
    return Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share")) / "qsnap"


def default_identity() -> Path:
    """`/etc/qsnap/identity.pem` for root, else below the user's configuration directory."""
    if os.geteuid() == 0:
        return Path("/etc/qsnap/identity.pem")
    return Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "qsnap/identity.pem"


def _absolute(path: str | Path) -> Path:
    """The path as it is from any working directory. Symbolic links stay, which somebody may turn meanwhile."""
    return Path(os.path.abspath(path))


@frozen
class Place:
    """The directory of running VNEs and the directory of snapshots. A running VNE keeps the store it came up with.

    `identity` is the file by which other hosts know this one.
    """

    run: Path = field(factory=default_run_dir, converter=_absolute)
    store: Path = field(factory=default_store_dir, converter=_absolute)
    identity: Path = field(factory=default_identity, converter=Path)

    def runtime(self) -> Runtime:
        """What runs here."""
        return Runtime(self.run)

    def snapshots(self) -> Store:
        """What was saved here."""
        return Store(self.store)
