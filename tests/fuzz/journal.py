"""Journals of operations that were cut short: read, or HostError."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qsnap.errors import HostError
from qsnap.host.journal import Journal


def check(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        journal = Journal(Path(root, "lab.journal"))
        journal.path.write_bytes(data)
        try:
            journal.read()
        except HostError:
            return
