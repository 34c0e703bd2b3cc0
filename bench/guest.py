"""The guest that the benchmarks save: one VM with a disk and a tap, dirtying memory at a given rate."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

import qsnap
from testbed.guests import GuestConsole, kernel_append

ROOT = Path(__file__).resolve().parents[1]
QEMU = str(ROOT / "build/qemu-11.1/bin/qemu-system-x86_64")
RATES = (0, 100, 1000)  #: MB/s
WORKING_SET_MB = 200
READY_S = 120.0


@contextmanager
def temporary_place() -> Iterator[qsnap.Place]:
    """Directories for one benchmark, on tmpfs, so that no disk is measured."""
    with tempfile.TemporaryDirectory(prefix="qsnap-bench-", dir="/dev/shm") as root:
        (Path(root) / "base.img").write_bytes(bytes(64 << 20))
        yield qsnap.Place(f"{root}/run", f"{root}/store")


def describe(place: qsnap.Place, *, memory_mib: int, rate: int, backing: qsnap.Backing) -> qsnap.VNE:
    """A VNE `bench` of one guest, `rate` in MB/s."""
    vm = qsnap.VM(
        "vm1",
        memory_mib << 20,
        backing=backing,
        qemu=QEMU,
        kernel=str(ROOT / "build/guest/vmlinuz"),
        initrd=str(ROOT / "build/guest/initrd"),
        append=kernel_append(1, 1, dirty_mb=WORKING_SET_MB, rate_mb=rate, udp=0, tcp=0),
        disks=(qsnap.Disk(str(place.run.parent / "base.img"), "raw"),),
        nics=(qsnap.Nic("lan", "52:54:00:00:00:01"),),
    )
    return qsnap.VNE("bench", (vm,), (qsnap.Network("lan"),))


@asynccontextmanager
async def running_guest(place: qsnap.Place, **settings: Any) -> AsyncIterator[None]:
    """The guest, running and dirtying its whole working set."""
    async with qsnap.running(describe(place, **settings), place=place):
        async with GuestConsole(qsnap.console_path("bench", "vm1", place=place)) as console:
            await console.wait_ready(trio.current_time() + READY_S)
        await trio.sleep(1.0)  # the whole working set has been written once
        yield
