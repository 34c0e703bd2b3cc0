"""How tests of the store fill it, and do harm to what is in it."""

from __future__ import annotations

import os
from pathlib import Path

from qsnap.host.store import Store
from qsnap.model import Snapshot
from tests.samples import contents, snapshot

LAYER = "disks/alice-0.qcow2"
STREAM = "snapshots/s1/alice/device.stream"
RAM = "snapshots/s1/alice/pc.ram.ram"
SEALS = "snapshots/s1/seals.json"
MANIFEST = "snapshots/s1/manifest.json"


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


async def save(store: Store, name: str = "s1", vne: str = "lab", layer: str = LAYER) -> Snapshot:
    """Take the sample snapshot the way the real ones are taken."""
    await store.begin(vne, name)
    for path, content in contents(name, layer).items():
        if path != layer or not (store.root / vne / path).exists():
            write(store.root / vne / path, content)
        await store.seal_file(vne, path)
    saved = snapshot(name, vne, layer)
    await store.commit(saved)
    return saved


def present(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir()}


async def save_into(store: Store, home: Path) -> None:
    for path, content in contents().items():
        write(home / path, content)
        await store.seal_file("lab", path)
    await store.commit(snapshot())


def alter(path: Path) -> None:
    """Change one byte, and put the times that can be put back."""
    status = path.stat()
    with path.open("r+b") as stream:
        byte = stream.read(1)
        stream.seek(0)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
