"""State files of running VNEs: a state that is saved as the same again, or HostError."""

from __future__ import annotations

import tempfile
from pathlib import Path

from attrs import evolve

from qsnap.errors import HostError
from qsnap.host.runtime import Runtime


def check(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        runtime = Runtime(Path(root))
        directory = runtime.directory("lab")
        directory.mkdir()
        (directory / "vne.json").write_bytes(data)
        try:
            live = runtime.load("lab")
        except HostError:
            return
        live = evolve(live, vne=evolve(live.vne, name="lab"))
        runtime.save(live)
        assert runtime.load("lab") == live
