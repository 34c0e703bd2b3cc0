"""A walk through all commands as a user types them, on real QEMU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import qsnap
from testbed.guests import kernel_append
from tests.live.lab import GUEST, QEMU_7, READY_S

pytestmark = pytest.mark.live

LAB = f"""
name = "walk"
[network.lan]
[defaults]
memory = "96M"
accelerator = "tcg"
qemu = "{QEMU_7}"
kernel = "{GUEST / "vmlinuz"}"
initrd = "{GUEST / "initrd"}"
network = "lan"
[vm.alice]
append = "{kernel_append(1, 2, dirty_mb=8)}"
[vm.bob]
append = "{kernel_append(2, 2, dirty_mb=8)}"
"""


class Shell:
    """Runs qsnap with the directories of a place in its environment."""

    def __init__(self, place: qsnap.Place) -> None:
        self.directory = Path.cwd()
        self.environment = {**os.environ, "QSNAP_RUN": str(place.run), "QSNAP_STORE": str(place.store)}

    def __call__(self, *words: str, code: int = 0, typed: str = "") -> str:
        """What a command prints, having ended with `code`."""
        done = subprocess.run(
            [sys.executable, "-m", "qsnap.cli", *words],
            env=self.environment,
            cwd=self.directory,
            input=typed,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    def json(self, *words: str) -> Any:
        """The same as a value."""
        return json.loads(self(*words, "--json"))

    def states(self) -> list[str]:
        """What `ps` says of the VMs."""
        return [vm["state"] for vm in self.json("ps", "walk")["vms"]]

    def wait_ready(self, vm: str) -> None:
        """Ask the guest over its console until it exchanges traffic."""
        deadline = time.monotonic() + READY_S
        while '"ready":true' not in self("console", "walk", vm, typed="\nstatus\n"):
            assert time.monotonic() < deadline, f"{vm} did not get ready"


def test_another_run_directory(place: qsnap.Place, tmp_path: Path) -> None:
    """What a running VM has open stays, whoever tidies the store without knowing of it; and paths may be relative."""
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "8M"], check=True)
    lab = tmp_path / "lab.toml"
    lab.write_text(LAB.partition("[vm.bob]")[0] + f'disks = ["{disk}"]')
    own, other = Shell(place), Shell(qsnap.Place(run=tmp_path / "other", store=place.store))
    own.environment["QSNAP_STORE"] = os.path.relpath(place.store)
    own("up", str(lab))
    own("snapshot", "walk", "one")
    assert "Removed walk/one" in other("rm", "walk", "one")
    own.directory = tmp_path
    own("snapshot", "walk", "two")
    own("down", "walk")
    own("verify", "walk", "two", "--store", str(place.store))
    own("rm", "walk", "two", "--store", str(place.store))
    assert [path for path in (place.store / "walk").rglob("*") if path.is_file()] == []


def test_walk(place: qsnap.Place, tmp_path: Path) -> None:
    lab = tmp_path / "lab.toml"
    lab.write_text(LAB)
    shell = Shell(place)

    assert "alice" in shell("up", str(lab))
    assert "is up already" in shell("up", str(lab), code=4)
    assert shell.states() == ["running", "running"]
    shell.wait_ready("alice")
    shell.wait_ready("bob")

    told = shell("snapshot", "walk", "one")
    assert "Discrepancy: " in told
    assert "qsnap down walk && qsnap restore walk one" in told
    assert shell.json("snapshot", "walk", "two", "--cut", "barrier", "--engine", "background")["cut"] == "barrier"
    assert "precopy under TCG" in shell("snapshot", "walk", "three", "--engine", "precopy", code=7)
    assert [each["name"] for each in shell.json("ls", "walk")] == ["one", "two"]
    assert shell.states() == ["running", "running"]

    assert "is running" in shell("restore", "walk", "one", code=4)
    shell("down", "walk")
    assert "after " in shell("restore", "walk", "one", "--ram", "map")
    shell.wait_ready("alice")
    shell("down", "walk")
    assert shell.json("restore", "walk", "two", "--paused")["ram"].keys() == {"alice", "bob"}
    assert shell.states() == ["paused", "paused"]
    assert "engine record: asked for" in shell("snapshot", "walk", "four", "--engine", "record").lower()
    shell("down", "walk")

    assert "stream" in shell("show", "walk", "four")
    assert "four is flat" in shell("convert", "walk", "four")
    assert "is flat already" in shell("convert", "walk", "four", "--json", code=4)
    assert "mapped" in shell("restore", "walk", "four")
    shell("down", "walk")

    assert "alice" in shell("show", "walk", "two")
    assert "intact" in shell("verify", "walk", "two")
    shell("rm", "walk", "one", "two", "four")
    assert shell("ls") == "No snapshots.\n"
    assert shell("ps") == "No VNE is up.\n"
