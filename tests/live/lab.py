"""A small VNE of test guests for the live tests, and the judge of what was saved of it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from attrs import evolve, frozen

import qsnap
from testbed.guests import GuestConsole, kernel_append
from testbed.state import GuestState, check_stamps, find_orphans, read_state

ROOT = Path(__file__).resolve().parents[2]
GUEST = ROOT / "build/guest"
GUEST_ARM64 = ROOT / "build/guest-arm64"
QEMU_7 = "qemu-system-x86_64"
QEMU_10 = str(ROOT / "build/qemu-10.0/bin/qemu-system-x86_64")
QEMU_11 = str(ROOT / "build/qemu-11.1/bin/qemu-system-x86_64")
QEMU_7_ARM = "qemu-system-aarch64"
QEMU_11_ARM = str(ROOT / "build/qemu-11.1/bin/qemu-system-aarch64")
MEMORY = 96 << 20
READY_S = 120.0


def make_vne(
    name: str,
    *,
    qemu: str = QEMU_11,
    vms: int = 3,
    memory: int = MEMORY,
    networks: int = 1,
    nic: str = "virtio-net-pci",
    boot: str = "",
    **settings: Any,
) -> qsnap.VNE:
    """A VNE of test guests that all are on each network.

    `settings` are those of a VM, `guest` the guest's own options, `boot` more of the kernel's, `nic` a model.
    """
    built = GUEST_ARM64 if "aarch64" in qemu else GUEST
    lans = ["lan", "lan1", "lan2"][:networks]
    options = {"dirty_mb": 16, "rate_mb": 50, "udp": 200, "tcp": 1, **settings.pop("guest", {})}
    return qsnap.VNE(
        name,
        tuple(
            qsnap.VM(
                f"vm{number}",
                memory,
                qemu=qemu,
                kernel=str(built / "vmlinuz"),
                initrd=str(built / "initrd"),
                append=f"{kernel_append(number, vms, **options)} {boot}",
                nics=tuple(qsnap.Nic(lan, f"52:54:00:00:{i:02x}:{number:02x}", nic) for i, lan in enumerate(lans)),
                accelerator=qsnap.Accelerator.TCG,
                **settings,
            )
            for number in range(1, vms + 1)
        ),
        tuple(qsnap.Network(lan) for lan in lans),
    )


def booting_from(vne: qsnap.VNE, directory: Path) -> qsnap.VNE:
    """The VNE with copies in this directory of what its guests boot from."""
    kernel, initrd = (str(shutil.copy(file, directory)) for file in (vne.vms[0].kernel, vne.vms[0].initrd))
    return evolve(vne, vms=tuple(evolve(vm, kernel=kernel, initrd=initrd) for vm in vne.vms))


@asynccontextmanager
async def open_consoles(vne: str, place: qsnap.Place, vms: int = 3) -> AsyncIterator[list[GuestConsole]]:
    """The consoles of all guests of a VNE."""
    async with AsyncExitStack() as stack:
        names = [f"vm{number}" for number in range(1, vms + 1)]
        yield [
            await stack.enter_async_context(GuestConsole(qsnap.console_path(vne, name, place=place))) for name in names
        ]


async def wait_ready(consoles: Sequence[GuestConsole]) -> None:
    """Return when every guest exchanges traffic with every other."""
    for console in consoles:
        await console.wait_ready(trio.current_time() + READY_S)


async def statuses(consoles: Sequence[GuestConsole]) -> list[GuestState]:
    """What every guest says of itself, one after the other: not a consistent cut."""
    states = []
    for console in consoles:
        with trio.fail_after(60):
            states.append(await console.status())
    return states


@frozen
class Verdict:
    """What the stored images of a snapshot say."""

    states: tuple[GuestState, ...]
    orphans: int
    wrong_stamps: int


def ram_paths(snapshot: qsnap.Snapshot, place: qsnap.Place, vm: int) -> tuple[Path, ...]:
    """The flat files of a VM's memory."""
    return tuple(place.store / snapshot.vne.name / block.file.path for block in snapshot.vms[vm].ram)


def ram_path(snapshot: qsnap.Snapshot, place: qsnap.Place, vm: int) -> Path:
    """The flat file of a VM whose memory is in one piece."""
    (path,) = ram_paths(snapshot, place, vm)
    return path


def judge(snapshot: qsnap.Snapshot, place: qsnap.Place) -> Verdict:
    """Read the guests' states out of the stored RAM, and check them against each other and against themselves."""
    paths = [ram_paths(snapshot, place, vm) for vm in range(len(snapshot.vms))]
    states = tuple(read_state(path) for path in paths)
    reports = [check_stamps(path, state) for path, state in zip(paths, states, strict=True)]
    wrong = sum(not report.ok for report in reports)
    return Verdict(states, len(find_orphans(states)), wrong)


async def finish(consoles: Sequence[GuestConsole]) -> None:
    """End all TCP streams: a guest is finished when its own stream and that of its neighbour have ended."""
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for console in consoles:
                nursery.start_soon(console.finish)


async def check_continues(consoles: Sequence[GuestConsole], cut: Sequence[GuestState]) -> None:
    """The running guests go on from exactly this cut, and their streams end with the right digests."""
    before = await statuses(consoles)
    for now, then in zip(before, cut, strict=True):
        assert now.nonce == then.nonce, "another boot"
        assert now.ticks >= then.ticks
        assert all(a >= b for a, b in zip(now.sent, then.sent, strict=True))
    await finish(consoles)
    for state in await statuses(consoles):
        assert state.stamp_errors == 0
        assert sum(state.duplicates) == 0, "a frame of an abandoned future was delivered"
        assert state.stream_errors == 0
        assert state.streams_completed == state.streams_matched
        assert state.streams_matched > 0 or state.peers == 1
