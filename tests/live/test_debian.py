"""A stock Debian with systemd, on its own disk: saved while it runs, killed, restored, and it lives on."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from attrs import define

import qsnap
from qsnap import Accelerator, Disk, Engine
from tests.live.lab import QEMU_11, ROOT

DEBIAN = ROOT / "build/debian"
BOOT_S = 180.0
COUNTER = "{ while sleep 0.1; do echo $((n += 1)) >/run/count; mv /run/count /run/counter; done & }"


@define
class Shell:
    """Root's shell on the serial console of a guest."""

    stream: trio.SocketStream
    received: str = ""

    async def run(self, command: str) -> str:
        """What a command prints. Raises AssertionError if it fails."""
        mark = os.urandom(4).hex()
        await self.stream.send_all(f"{command}; echo {mark} $?\n".encode())
        text = await self.until(mark)
        status = await self.until("\n")
        assert status.strip() == "0", f"{command}: {text}"
        return text.replace("\r", "").strip()

    async def until(self, text: str) -> str:
        while text not in self.received:
            self.received += (await self.stream.receive_some(4096)).decode(errors="replace")
        before, _, self.received = self.received.partition(text)
        return before


@asynccontextmanager
async def open_shell(place: qsnap.Place) -> AsyncIterator[Shell]:
    async with await trio.open_unix_socket(qsnap.console_path("debian", "vm1", place=place)) as stream:
        yield Shell(stream)


async def wait_booted(shell: Shell) -> None:
    with trio.fail_after(BOOT_S):
        await shell.until("root@guest")
        await shell.stream.send_all(b"stty -echo; echo no''echo; PS1= exec sh\n")
        await shell.until("noecho")
        assert await shell.run("systemctl is-system-running --wait") == "running"


@pytest.mark.parametrize("engine", [Engine.PRECOPY, Engine.BACKGROUND])
async def test_debian_lives_on(engine: Engine, place: qsnap.Place) -> None:
    vm = qsnap.VM(
        "vm1",
        256 << 20,
        qemu=QEMU_11,
        accelerator=Accelerator.TCG,
        kernel=str(DEBIAN / "vmlinuz"),
        initrd=str(DEBIAN / "initrd"),
        append="root=/dev/vda rw console=ttyS0 quiet",
        disks=(Disk(str(DEBIAN / "disk.img"), "raw"),),
    )
    await qsnap.up(qsnap.VNE("debian", (vm,)), place=place)
    async with open_shell(place) as shell:
        await wait_booted(shell)
        with trio.fail_after(60):
            await shell.run(COUNTER)
            digest = await shell.run("head -c 8M /dev/urandom >/root/data && sha256sum /root/data")
            boot = await shell.run("cat /proc/sys/kernel/random/boot_id")
        saved = await qsnap.snapshot("debian", "cut", engine=engine, place=place)
        with trio.fail_after(60):
            before = int(await shell.run("sleep 1; cat /run/counter"))
            await shell.run("rm /root/data && sync")
    (status,) = (await qsnap.status("debian", place=place)).vms
    os.kill(status.pid, signal.SIGKILL)

    await qsnap.restore("debian", "cut", place=place)
    async with open_shell(place) as shell:
        with trio.fail_after(60):
            assert int(await shell.run("cat /run/counter")) < before
            assert await shell.run("cat /proc/sys/kernel/random/boot_id") == boot
            assert await shell.run("sync && echo 3 >/proc/sys/vm/drop_caches && sha256sum /root/data") == digest
            now = int(await shell.run("cat /run/counter"))
            assert int(await shell.run("sleep 1; cat /run/counter")) > now
            assert await shell.run("systemctl is-system-running") == "running"
            assert await shell.run("dmesg --level=err,crit,alert,emerg | grep -ci ext4 || true") == "0"
    assert saved.vms[0].engine is engine
