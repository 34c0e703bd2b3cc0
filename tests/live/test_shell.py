"""The shell of a guest with real programs: how soon it is there, and that it outlives snapshot, death and restore."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

import qsnap
from testbed.shell import Completed, GuestShell, GuestShellError, port_arguments
from tests.live.lab import QEMU_11, ROOT

IMAGES = ROOT / "build/images"
BOOT_S = 10.0


def make_vm(socket: str) -> qsnap.VM:
    return qsnap.VM(
        "vm1",
        192 << 20,
        qemu=QEMU_11,
        accelerator=qsnap.Accelerator.TCG,
        kernel=str(IMAGES / "vmlinuz"),
        initrd=str(IMAGES / "initrd"),
        append="console=ttyS0 quiet loglevel=1 panic=-1 qsnap.name=alice qsnap.eth0=10.1.0.1/24",
        disks=(qsnap.Disk(str(IMAGES / "internet.img"), "raw"),),
        nics=(qsnap.Nic("lan", "52:54:00:00:00:01"),),
        extra=port_arguments(socket),
    )


async def test_shell(place: qsnap.Place, memory_path: Path) -> None:
    socket = str(memory_path / "vm1.sock")
    vne = qsnap.VNE("lab", (make_vm(socket),), (qsnap.Network("lan"),))
    async with qsnap.running(vne, place=place), GuestShell("vm1", socket) as shell:
        started_s = trio.current_time()
        await shell.boot()
        assert trio.current_time() - started_s < BOOT_S
        assert await shell.run("hostname; hostname -I") == "alice\n10.1.0.1"
        assert await shell.complete("echo out; echo err >&2; exit 3") == Completed(3, "out\n", "err\n")
        with pytest.raises(GuestShellError, match=r"vm1: `false` ended with 1: no output"):
            await shell.run("false")
        with pytest.raises(GuestShellError, match=r"was not done after 0\.5 s"):
            await shell.run("sleep 20", limit_s=0.5)
        large = await shell.run("seq 100000")
        assert large == "\n".join(map(str, range(1, 100001)))
        await check_waits_idly(shell)
        await check_goes_on(shell, place)


async def check_waits_idly(shell: GuestShell) -> None:
    """While nobody is connected a guest starts no processes, which would take an emulated one long."""
    count = "sed -n 's/^processes //p' /proc/stat"
    before = int(await shell.run(count))
    await shell.aclose()
    await trio.sleep(2)
    assert int(await shell.run(count)) - before < 20


async def check_goes_on(shell: GuestShell, place: qsnap.Place) -> None:
    """A command that runs while its guest is saved, killed and restored is answered, and was run once."""
    answers = []

    async def work() -> None:
        answers.append(await shell.run("echo begun >>/root/runs; sleep 4; cat /root/runs"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.sleep(1)
        await qsnap.snapshot("lab", "cut", place=place)
        (vm,) = (await qsnap.status("lab", place=place)).vms
        os.kill(vm.pid, signal.SIGKILL)
        await qsnap.restore("lab", "cut", place=place)
    assert answers == ["begun"]
