"""What was being started when its parent was killed is ended, although nothing tells yet what it will be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from qsnap.errors import HostError
from qsnap.host import takedown
from qsnap.host.births import being_started, starting
from qsnap.host.disks import create_overlay
from qsnap.host.takedown import collect

PARENT = """
import os, sys, time
from qsnap.host.births import starting
directory, seconds, *command = sys.argv[1:]
with starting(directory) as fd:
    if os.fork() == 0:  # a child that has not come to its exec when its parent is killed
        os.set_inheritable(fd, True)
        time.sleep(float(seconds))
        os.execvp(command[0], command)
    os.kill(os.getpid(), 9)
"""


def start_orphan(directory: Path, seconds: float, *command: str) -> None:
    words = [sys.executable, "-c", PARENT, str(directory), str(seconds), *command]
    assert subprocess.run(words, timeout=60, check=False).returncode == -9


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    directory = tmp_path / "lab/disks"
    directory.mkdir(parents=True)
    return directory


def test_one_that_is_alive_when_it_is_known(disks: Path) -> None:
    with starting(str(disks)) as fd:
        assert being_started(str(disks))
        child = subprocess.Popen(["sleep", "60"], pass_fds=[fd])
    try:
        assert not being_started(str(disks))
    finally:
        child.kill()
        child.wait()


async def test_an_image_that_would_be_made_after_all(tmp_path: Path, disks: Path) -> None:
    late = disks / "late.qcow2"
    start_orphan(disks, 1.0, "qemu-img", "create", "-q", "-f", "qcow2", str(late), "1M")
    assert not late.exists()
    await collect("lab", str(tmp_path))
    assert not being_started(str(disks))
    assert not late.exists()
    await trio.sleep(1.5)
    assert not late.exists()


async def test_one_that_does_not_come_to_anything(tmp_path: Path, disks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takedown, "PATIENCE_S", 0.2)
    start_orphan(disks, 3.0, "true")
    with pytest.raises(HostError, match="neither there nor gone"):
        await collect("lab", str(tmp_path))
    while being_started(str(disks)):
        await trio.sleep(0.05)
    await collect("lab", str(tmp_path))


async def test_nothing_is_being_started_once_a_layer_is_made(disks: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(1 << 20))
    await create_overlay("qemu-img", str(disks / "a.qcow2"), base=str(base), base_format="raw")
    assert not being_started(str(disks))


def test_no_directory(tmp_path: Path) -> None:
    assert not being_started(str(tmp_path / "nowhere"))
