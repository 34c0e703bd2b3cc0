"""Stored RAM equals the guest's RAM at the stop, byte for byte, while the guest dirties as much as it can."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trio

import qsnap
from qsnap import Engine
from qsnap.host.capture import Background, Capture, Precopy
from qsnap.host.daemon import open_daemon
from qsnap.host.disks import DiskCut, DiskPlan
from qsnap.host.hugepages import HUGE_PAGE_BYTES, HugePages, free_pages
from qsnap.host.qmp import open_loop, open_qmp
from qsnap.host.runtime import LiveVM
from qsnap.rules.command import RAM_ID
from tests.live.lab import MEMORY, QEMU_7, QEMU_11, make_vne, open_consoles, wait_ready


def copy_ram(pid: int) -> bytes:
    """The guest's memory as QEMU has it mapped now: the one mapping of its size."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if end - start == MEMORY:
            with open(f"/proc/{pid}/mem", "rb") as memory:
                memory.seek(start)
                return memory.read(MEMORY)
    raise AssertionError("no mapping of the guest's memory")


async def capture_and_compare(live: LiveVM, qmp_path: str, engine: Engine, directory: Path) -> int:
    """Capture one VM and count the bytes in which its file differs from its RAM at the stop."""
    copies: list[bytes] = []

    def copy_while_stopped() -> None:  # it is called where the taps would be moved
        copies.append(copy_ram(live.process.pid))

    async with open_loop(), trio.open_nursery() as nursery, open_qmp(qmp_path, vm=live.vm.name) as qmp:
        daemon_context = open_daemon(
            nursery,
            directory,
            vm=live.vm.name,
            backed=(RAM_ID,),
            ram_limit_bytes=1 << 30,
            keeps_reading=False,
            heir=(),
            on_bytes=lambda done: None,
        )
        async with daemon_context as (daemon, stream_fd):
            make = partial(Precopy, force=True) if engine is Engine.PRECOPY else Background
            capture: Capture = make(
                qmp, daemon, DiskCut(qmp, DiskPlan((), live.qemu_version, "")), True, copy_while_stopped
            )
            await capture.prepare(stream_fd)
            await capture.stop_and_resume()
            captured = await capture.complete()
    stored = np.fromfile(captured.receipt["blocks"][0]["file"], dtype=np.uint8)
    return int(np.count_nonzero(stored != np.frombuffer(copies[0], dtype=np.uint8)))


@pytest.mark.parametrize(
    ("qemu", "engine"), [(QEMU_7, Engine.BACKGROUND), (QEMU_11, Engine.BACKGROUND), (QEMU_11, Engine.PRECOPY)]
)
async def test_stored_ram_is_the_guests_ram(qemu: str, engine: Engine, place: qsnap.Place, tmp_path: Path) -> None:
    vne = make_vne("ram", qemu=qemu, vms=1, backing=qsnap.Backing.MEMFD, guest={"rate_mb": 1000})
    await qsnap.up(vne, place=place)
    async with open_consoles("ram", place, 1) as consoles:
        await wait_ready(consoles)
    runtime = place.runtime()
    live: LiveVM = runtime.load("ram").vms[0]
    for attempt in range(3):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        assert await capture_and_compare(live, runtime.qmp_path("ram", "vm1"), engine, directory) == 0


async def test_the_comparison_finds_a_running_guest(place: qsnap.Place) -> None:
    """Negative control: two copies of a guest's RAM that was not stopped differ."""
    vne = make_vne("ram", vms=1, backing=qsnap.Backing.MEMFD)
    await qsnap.up(vne, place=place)
    async with open_consoles("ram", place, 1) as consoles:
        await wait_ready(consoles)
    pid = place.runtime().load("ram").vms[0].process.pid
    before = copy_ram(pid)
    await trio.sleep(0.2)
    assert copy_ram(pid) != before


def test_two_who_reserve_huge_pages_at_once(tmp_path: Path) -> None:
    """The kernel has one pool, and each of them a ledger of its own."""
    size = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = size.read_text()

    def take_turns(name: str) -> None:
        pages = HugePages(tmp_path / f"{name}.json")
        for _ in range(40):
            pages.reserve(name, 5)
            pages.give_back(name)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(take_turns, ("one", "two")))
    assert list(tmp_path.iterdir()) == []
    assert size.read_text() == before


def test_huge_pages_given_back_while_in_use(tmp_path: Path) -> None:
    """The kernel gives each up as soon as its user lets go; until then the next who reserves does not count on it."""
    size = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = size.read_text()
    pages = HugePages(tmp_path / "ledger.json")
    pages.reserve("one", free_pages() + 4)
    map_hugetlb = 0x40000  # as in <asm-generic/mman-common.h>
    with mmap.mmap(-1, HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_hugetlb) as page:
        page[0] = 1
        pages.give_back("one")
        assert not pages.ledger.exists()
        pages.reserve("two", wanted := free_pages() + 4)
        assert free_pages() >= wanted
    pages.give_back("two")
    assert not pages.ledger.exists()
    assert size.read_text() == before


async def test_huge_pages_that_somebody_else_takes_first(place: qsnap.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were free when they were counted, and are not when QEMU asks for them."""
    monkeypatch.setattr("qsnap.host.hugepages.free_pages", lambda: 1 << 20)
    async with qsnap.running(make_vne("lab", vms=1, memory=8 << 30), place=place) as status:
        assert [(vm.state, vm.hugetlb) for vm in status.vms] == [("running", False)]
