"""Live tests boot real QEMU guests. They need root, /dev/net/tun and what `scripts/setup --tests` makes.

Nothing is skipped.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import qsnap
from qsnap.host.qemu import find_processes
from qsnap.host.takedown import take_down
from tests.live.lab import GUEST, QEMU_7, QEMU_10, QEMU_11, ROOT, make_vne, open_consoles, wait_ready

KEPT = ROOT / "build/test-consoles"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/live" in str(item.path):
            item.add_marker(pytest.mark.live)


@pytest.fixture(scope="session", autouse=True)
def _has_what_it_needs() -> None:
    for path in (GUEST / "vmlinuz", GUEST / "initrd", Path(QEMU_10), Path(QEMU_11), Path("/dev/net/tun")):
        assert path.exists(), f"{path} is missing: run scripts/setup --tests first"
    assert os.geteuid() == 0, "the live tests make network namespaces: run them as root"


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[qsnap.Place]:
    """Directories of the test's own; afterwards nothing of its VNEs may be left on the machine."""
    with tempfile.TemporaryDirectory(prefix="qsnap-", dir="/var/tmp") as root:
        place = qsnap.Place(f"{root}/run", f"{root}/store")
        yield place
        _keep_consoles(place, request.node.name)
        up = place.runtime().names()
        for name in up:
            trio.run(take_down, name, place.runtime())
        assert not find_processes([root]), "a process was left behind"
        assert not place.runtime().huge_pages().ledger.exists(), "huge pages were not given back"


def _keep_consoles(place: qsnap.Place, test: str) -> None:
    """Keep the last consoles of every test's VMs, to be read when it failed."""
    for log in place.run.glob("*/*/console.log"):
        target = KEPT / test.replace("/", "_")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, target / f"{log.parent.parent.name}-{log.parent.name}.log")


@pytest.fixture(scope="session")
def golden() -> Iterator[qsnap.Place]:
    """A store with VNEs saved right after boot, `seven` and `eleven` by QEMU version: a restore is faster than a boot.

    It is on tmpfs, so that what is restored from it can be captured by either engine.
    """
    with tempfile.TemporaryDirectory(prefix="qsnap-golden-", dir="/dev/shm") as root:
        place = qsnap.Place(f"{root}/run", f"{root}/store")
        for name, qemu in (("seven", QEMU_7), ("eleven", QEMU_11)):
            trio.run(_boot_and_save, name, qemu, place)
        yield place


async def _boot_and_save(name: str, qemu: str, place: qsnap.Place) -> None:
    async with qsnap.running(make_vne(name, qemu=qemu), place=place):
        async with open_consoles(name, place) as consoles:
            await wait_ready(consoles)
        await qsnap.snapshot(name, "booted", place=place)


@pytest.fixture
def eleven(golden: qsnap.Place) -> Iterator[qsnap.Place]:
    """A place where the VNE `eleven` (QEMU 11.1) has a snapshot `booted`; what the test adds is removed."""
    yield from _clean(golden, "eleven")


@pytest.fixture
def seven(golden: qsnap.Place) -> Iterator[qsnap.Place]:
    """The same for `seven` (QEMU 7.2)."""
    yield from _clean(golden, "seven")


def _clean(golden: qsnap.Place, name: str) -> Iterator[qsnap.Place]:
    yield golden
    trio.run(_tidy, golden, name)
    assert not find_processes([f"{golden.run}/{name}/"]), "a process was left behind"


async def _tidy(place: qsnap.Place, name: str) -> None:
    if name in place.runtime().names():
        await qsnap.down(name, place=place)
    for snapshot in await qsnap.snapshots(name, place=place):
        if snapshot.name != "booted":
            await qsnap.remove(name, snapshot.name, place=place)


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A directory on tmpfs, with a path that is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="qsnap-", dir="/dev/shm") as root:
        yield Path(root)
        assert not find_processes([root]), "a process was left behind"
