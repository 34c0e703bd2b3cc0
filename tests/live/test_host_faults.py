"""The host lacks memory, room or the permission to write: a clear error, and the VMs run on."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import qsnap
from qsnap.host.capture import Background, Capture
from qsnap.host.held import HeldPrecopy
from tests.live.test_faults import check_nothing_left, receivers
from tests.live.tiny import check_echo, make_boot_disk, make_tiny_vne, strike_before

STREAMS_FROM: dict[type[Capture], str] = {Background: "stop", HeldPrecopy: "_start_migration"}  #: the step


@contextmanager
def tmpfs(directory: Path) -> Iterator[Path]:
    """A file system of its own, with room until the test says otherwise."""
    directory.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def remount(directory: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(directory)], check=True)


@pytest.mark.parametrize("engine", STREAMS_FROM)
async def test_no_memory_for_the_receiver(
    engine: type[Capture], place: qsnap.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def starve() -> None:
        (process,) = receivers(place.store / "lab/snapshots/doomed/vm2")
        resource.prlimit(process.pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))

    async with qsnap.running(make_tiny_vne("lab", make_boot_disk(tmp_path / "boot.img"), vms=2), place=place):
        await check_echo("lab", ["vm1", "vm2"], place)
        with monkeypatch.context() as patch:
            strike_before(patch, STREAMS_FROM[engine], "vm2", starve, engine)
            with pytest.raises(qsnap.HostError, match=r"VM vm2: .*memory"):
                await qsnap.snapshot("lab", "doomed", engine=engine.engine, place=place)
        await check_nothing_left("lab", place, ["running"] * 2)
        await check_echo("lab", ["vm1", "vm2"], place)
        await qsnap.snapshot("lab", "again", engine=engine.engine, place=place)


async def test_read_only_store(place: qsnap.Place, tmp_path: Path) -> None:
    """Without disks a VM needs nothing of the store; with one, a restore needs a place for its layer."""
    disk = make_boot_disk(tmp_path / "boot.img")
    with tmpfs(place.store):
        for name, disks in (("bare", ()), ("disk", (disk,))):
            async with qsnap.running(make_tiny_vne(name, disk, disks=disks), place=place):
                await qsnap.snapshot(name, "saved", place=place)
        await qsnap.up(make_tiny_vne("lab", disk, disks=()), place=place)
        remount(place.store, "ro")
        with pytest.raises(qsnap.HostError, match=f"{place.store}.*[Rr]ead-only"):
            await qsnap.snapshot("lab", "doomed", place=place)
        assert [vm.state for vm in (await qsnap.status("lab", place=place)).vms] == ["running"]
        assert "read-only" in (await qsnap.restore("bare", "saved", place=place)).ram["vm1"]
        await qsnap.down("bare", place=place)
        with pytest.raises(qsnap.QemuError, match=r"[Rr]ead-only"):
            await qsnap.restore("bare", "saved", ram=qsnap.RamMode.MAP, place=place)
        with pytest.raises(qsnap.HostError, match=f"{place.store}.*[Rr]ead-only"):
            await qsnap.restore("disk", "saved", place=place)
        assert "disk" not in place.runtime().names()
        for name in ("bare", "disk"):
            await qsnap.verify(name, "saved", place=place)
        remount(place.store, "rw")
        await qsnap.restore("disk", "saved", place=place)
        await check_echo("disk", ["vm1"], place)
        await qsnap.snapshot("lab", "saved", place=place)
        for name in ("lab", "disk"):
            await qsnap.down(name, place=place)
