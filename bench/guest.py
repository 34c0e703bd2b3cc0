"""The guests that the benchmarks save, and the work they get done meanwhile.

A guest dirties memory at a given rate, and spends what is left of its vCPU on work that it counts. So any time that it
is kept from running, by a pause, a page fault or by others on the processor, shows as work not done.

*Work lost* by an action: over a window around it the guest's progress is counted, and held against the rate in the
windows right before and right after, in which nothing happens (`Meter`). With t the window's length, w the
progress in it and r the mean of the two rates, t - w / r is what was lost, in milliseconds of full speed. Nothing is
subtracted. All that belongs to the action is in the window, such as starting processes, writing files and hashing them;
only the removal of what it made comes after it.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio
from attrs import define, field, frozen

import qsnap
from bench.probe import Probe, Sample, open_probe
from qsnap.host.qmp import Qmp, QmpEvent, open_loop, open_qmp
from testbed.guests import GuestConsole, kernel_append

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
QEMU = str(ROOT / "build/qemu-11.1/bin/qemu-system-x86_64")
VNE = "bench"
RATES = (0, 100, 1000)  #: MB/s
WORKING_SET_MB = 200
DISK_BYTES = 64 << 20
READY_S = 300.0
SETTLE_S = 0.5
WINDOW_S = 0.4


@frozen
class Guest:
    """A running guest: where it is kept, and how to look at it."""

    place: qsnap.Place
    name: str
    memory_mib: int
    probe: Probe
    monitor_path: str

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[Qmp]:
        """A QMP session beside that of whoever runs the VM."""
        async with open_loop(), open_qmp(self.monitor_path, vm=self.name) as qmp:
            yield qmp


@define
class Meter:
    """Measures what actions cost a guest, each between two windows without any."""

    probe: Probe
    window_s: float = WINDOW_S
    _rate: float | None = field(default=None, init=False)

    async def lost_ms(
        self, action: Callable[[], Awaitable[T]], tidy: Callable[[], Awaitable[object]]
    ) -> tuple[T, float]:
        """The action's result, and the guest's work that was lost to it, in ms of full speed."""
        before = await self.rate() if self._rate is None else self._rate
        start = self.probe.sample()
        result = await action()
        await trio.sleep(max(0.0, start.instant_s + self.window_s - time.perf_counter()))
        end = self.probe.sample()
        await tidy()
        self._rate = await self.rate()
        rate = (before + self._rate) / 2
        return result, (end.instant_s - start.instant_s - (end.work - start.work) / rate) * 1e3

    async def rate(self) -> float:
        """Work per second over a window in which nothing happens."""
        start = self.probe.sample()
        await trio.sleep(self.window_s)
        return work_rate(start, self.probe.sample())


def work_rate(start: Sample, end: Sample) -> float:
    """Work per second between two samples."""
    return (end.work - start.work) / (end.instant_s - start.instant_s)


def pause_ms(events: list[QmpEvent]) -> float:
    """From the first STOP to the RESUME after it, by QEMU's own clock."""
    return (next(event.instant_s for event in events if event.name == "RESUME") - stop_s(events)) * 1e3


def stop_s(events: list[QmpEvent]) -> float:
    """When the first STOP was, by QEMU's own clock."""
    return next(event.instant_s for event in events if event.name == "STOP")


@contextmanager
def memory_directory() -> Iterator[Path]:
    """A directory on a tmpfs of its own, in huge pages where the kernel has them, so that no disk is measured."""
    with tempfile.TemporaryDirectory(prefix="qsnap-bench-") as root:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700,huge=within_size", "qsnap-bench", root], check=True)
        try:
            yield Path(root)
        finally:
            subprocess.run(["umount", "--lazy", root], check=True)


@contextmanager
def temporary_place() -> Iterator[qsnap.Place]:
    """Directories for one benchmark."""
    with memory_directory() as root:
        (root / "base.img").write_bytes(bytes(DISK_BYTES))
        yield qsnap.Place(root / "run", root / "store")


def describe(
    place: qsnap.Place,
    *,
    vms: int = 1,
    memory_mib: int,
    backing: qsnap.Backing = qsnap.Backing.ANONYMOUS,
    **options: int,
) -> qsnap.VNE:
    """A VNE of guests on one network; `options` are those of the guests, `rate_mb` first of all."""
    settings = {"dirty_mb": WORKING_SET_MB, "udp": 0, "tcp": 0, **options}
    guests = [
        qsnap.VM(
            f"vm{number}",
            memory_mib << 20,
            backing=backing,
            qemu=QEMU,
            kernel=str(ROOT / "build/guest/vmlinuz"),
            initrd=str(ROOT / "build/guest/initrd"),
            append=kernel_append(number, vms, **settings),
            disks=(qsnap.Disk(str(place.run.parent / "base.img"), "raw"),),
            nics=(qsnap.Nic("lan", f"52:54:00:00:00:{number:02x}"),),
        )
        for number in range(1, vms + 1)
    ]
    return qsnap.VNE(VNE, tuple(guests), (qsnap.Network("lan"),))


@asynccontextmanager
async def running_guests(place: qsnap.Place, **settings: Any) -> AsyncIterator[list[Guest]]:
    """The guests, running and past their first pass over the working set."""
    vne, runtime = describe(place, **settings), place.runtime()
    async with qsnap.running(vne, place=place) as status, AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                ready_guest(place, vm, at.pid, runtime.console_path(VNE, vm.name), runtime.monitor_path(VNE, vm.name))
            )
            for vm, at in zip(vne.vms, status.vms, strict=True)
        ]


@asynccontextmanager
async def ready_guest(
    place: qsnap.Place, vm: qsnap.VM, pid: int, console_path: str, monitor_path: str
) -> AsyncIterator[Guest]:
    """A guest that was started, once it is at work."""
    async with GuestConsole(console_path) as console:
        await console.wait_ready(trio.current_time() + READY_S)
    await trio.sleep(SETTLE_S)
    with closing(await open_probe(pid, monitor_path, vm.memory_bytes)) as probe:
        yield Guest(place, vm.name, vm.memory_bytes >> 20, probe, monitor_path)


@asynccontextmanager
async def running_guest(place: qsnap.Place, **settings: Any) -> AsyncIterator[Guest]:
    """A single guest, its vCPU busy all the time."""
    async with running_guests(place, work=1, **settings) as (guest,):
        yield guest
