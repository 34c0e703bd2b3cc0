"""Directories with any name, and closed to everybody else; many VNEs in the same ones."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

import qsnap
from qsnap.host.qemu import find_processes
from qsnap.host.tasks import run_all
from tests.live.lab import ROOT
from tests.live.tiny import check_echo, make_boot_disk, make_tiny_vne

NAMES = [f"lab{number}" for number in range(10)]
NOBODY = 65534
#: prints what of its arguments it may read, write, or enter
TRY = 'for path; do if [ -r "$path" ] || [ -w "$path" ] || [ -x "$path" ]; then echo "$path"; fi; done'


@pytest.fixture
def lax_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(paths: list[Path]) -> list[str]:
    """Which of these files, sockets and directories another user can do anything with."""
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    done = subprocess.run([*become, "sh", "-c", TRY, "sh", *paths], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.usefixtures("lax_umask")
async def test_nothing_is_open_to_others(place: qsnap.Place, tmp_path: Path) -> None:
    """Not even where the directories were there before, and open."""
    place.run.parent.chmod(0o755)
    for directory in (place.run, place.store):
        directory.mkdir(mode=0o755)
    vne = make_tiny_vne("lab", make_boot_disk(tmp_path / "boot.img"))

    def check() -> None:
        paths = [path for top in (place.run, place.store) for path in top.rglob("*")]
        assert {path.name for path in paths} >= {"vne.json", "qmp.sock", "console.log", "lab.lock", "disks"}
        assert open_to_others(paths) == []
        for path in paths:
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode) or place.store in path.parents:
                assert stat.S_IMODE(mode) & 0o077 == 0, path

    async with qsnap.running(vne, place=place):
        check()
        for engine in (qsnap.Engine.BACKGROUND, qsnap.Engine.RECORD):
            await qsnap.snapshot("lab", engine.value, engine=engine, place=place)
            check()
    for engine in (qsnap.Engine.RECORD, qsnap.Engine.BACKGROUND):
        await qsnap.restore("lab", engine.value, place=place)
        check()
        await qsnap.down("lab", place=place)
    (place.store / "open").write_bytes(b"")
    assert open_to_others([place.store / "open"]) == [str(place.store / "open")]


async def test_any_path(place: qsnap.Place, tmp_path: Path) -> None:
    """Spaces, commas, quotes and what a shell would make something of."""
    odd = tmp_path / "a b,c='d\"e;$(id)&|*%\\"
    odd.mkdir()
    here = qsnap.Place(place.run / odd.name, place.store / odd.name)
    place.run.mkdir()
    place.store.mkdir()
    vne = make_tiny_vne("lab", make_boot_disk(odd / "boot,1.img"))
    await qsnap.up(vne, place=here)
    await check_echo("lab", ["vm1"], here)
    for engine in (qsnap.Engine.BACKGROUND, qsnap.Engine.PRECOPY, qsnap.Engine.RECORD):
        await qsnap.snapshot("lab", engine.value, engine=engine, place=here)
    await qsnap.down("lab", place=here)
    await qsnap.convert("lab", "record", place=here)
    for name, ram in (("background", qsnap.RamMode.MAP), ("record", qsnap.RamMode.EAGER)):
        await qsnap.verify("lab", name, place=here)
        await qsnap.restore("lab", name, ram=ram, place=here)
        await check_echo("lab", ["vm1"], here)
        (here.run / "lab/vne.json").write_text("damaged")  # the processes are then found by their paths
        await qsnap.down("lab", place=here)
        assert not find_processes(["lab/vm1"])


async def test_ten_at_once(place: qsnap.Place, tmp_path: Path) -> None:
    """From one process and from ten: each gets what is its own."""
    disk = make_boot_disk(tmp_path / "boot.img")
    vnes = [make_tiny_vne(name, disk, vms=1) for name in NAMES]
    await run_all([partial(qsnap.up, vne, place=place) for vne in vnes])
    for name in NAMES:
        await check_echo(name, ["vm1"], place)
    await run_all([partial(qsnap.snapshot, name, "one", place=place) for name in NAMES])
    command = [sys.executable, "-m", "qsnap.cli", "--run-dir", str(place.run), "--store", str(place.store), "snapshot"]
    await run_all([partial(trio.run_process, [*command, name, "ten"], cwd=ROOT, capture_stdout=True) for name in NAMES])
    assert [(saved.vne.name, saved.name) for saved in await qsnap.snapshots(place=place)] == [
        (name, snapshot) for name in NAMES for snapshot in ("one", "ten")
    ]
    for name in NAMES[:5]:
        await qsnap.down(name, place=place)
        await qsnap.verify(name, "one", place=place)
    await run_all([partial(qsnap.restore, name, "one", place=place) for name in NAMES[:5]])
    for status in await qsnap.statuses(place=place):
        (vm,) = status.vms
        assert vm.state == "running"
        words = Path(f"/proc/{vm.pid}/cmdline").read_text()
        assert [name for name in NAMES if f"/{name}/" in words] == [status.name]
        await check_echo(status.name, ["vm1"], place)
    await run_all([partial(qsnap.down, name, place=place) for name in NAMES])
    assert {path.suffix for path in place.run.iterdir()} <= {".lock"}
