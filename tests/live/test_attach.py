"""VMs that qsnap did not start: attached to, saved under traffic, killed, restored as qsnap's own; or let go again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import field, frozen

import qsnap
from qsnap import Cut, Engine
from qsnap.host.qmp import Qmp, open_loop, open_qmp
from testbed.guests import GuestConsole, kernel_append
from tests.live.lab import GUEST, QEMU_7, QEMU_11, check_continues, judge, open_consoles, statuses

NETNS = f"qsnap-test-attach-{os.getpid()}"


BOOT_S = 300.0  # with all the firmware that QEMU puts into a machine by default


def ip(*words: str) -> str:
    """Run `ip` in the namespace of the test, and return what it says."""
    return subprocess.run(["ip", "-n", NETNS, *words], check=True, capture_output=True, text=True).stdout


@frozen
class Hand:
    """VMs started by hand, in a namespace of their user's own."""

    directory: Path
    processes: list[subprocess.Popen[bytes]] = field(factory=list)

    def start(self, number: int, qemu: str, *arguments: str, vms: int = 2, boots: bool = True) -> None:
        """Start guest `number`, with one network card on the tap `handN` and a bridge of the user's."""
        tap = f"hand{number}"
        ip("tuntap", "add", tap, "mode", "tap")
        ip("link", "set", tap, "master", "handbr", "up")
        append = kernel_append(number, vms, dirty_mb=8, rate_mb=20, udp=100, tcp=1)
        guest = ("-kernel", str(GUEST / "vmlinuz"), "-initrd", str(GUEST / "initrd"), "-append", append)
        command = [
            *("ip", "netns", "exec", NETNS, qemu, "-accel", "tcg", "-display", "none", "-name", tap),
            *(guest if boots else ()),
            *("-qmp", f"unix:{self.qmp(number)},server=on,wait=off"),
            *("-serial", f"unix:{self.console(number)},server=on,wait=off"),
            *arguments,
        ]
        with (self.directory / f"{number}.log").open("wb") as log:
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def qmp(self, number: int) -> str:
        return f"{self.directory}/{number}.qmp"

    def console(self, number: int) -> str:
        return f"{self.directory}/{number}.console"

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    @asynccontextmanager
    async def consoles(self) -> AsyncIterator[list[GuestConsole]]:
        async with AsyncExitStack() as stack:
            numbers = range(1, len(self.processes) + 1)
            for number in numbers:
                with trio.fail_after(20):
                    while not (os.path.exists(self.console(number)) and os.path.exists(self.qmp(number))):
                        await trio.sleep(0.05)
            yield [await stack.enter_async_context(GuestConsole(self.console(number))) for number in numbers]

    def description(self, qemu: str) -> str:
        """What the user writes for `qsnap attach`."""
        vms = "".join(
            f'[vm.vm{number}]\nqmp = "{self.qmp(number)}"\nnics = [{{ network = "lan", tap = "hand{number}" }}]\n'
            + (f'qemu = "{qemu}"\n' if "/" in qemu else "")
            for number in range(1, len(self.processes) + 1)
        )
        return f'name = "hand"\n[network.lan]\n{vms}'

    def load(self, qemu: str) -> qsnap.VNE:
        path = self.directory / "hand.toml"
        path.write_text(self.description(qemu))
        return qsnap.load_description(path)


@pytest.fixture
def hand(place: qsnap.Place) -> Iterator[Hand]:
    """A namespace with the bridge `handbr`, and nothing in it yet."""
    subprocess.run(["ip", "netns", "add", NETNS], check=True)
    ip("link", "add", "handbr", "type", "bridge")
    ip("link", "set", "handbr", "up")
    hand = Hand(place.run.parent)
    try:
        yield hand
    finally:
        hand.kill()
        subprocess.run(["ip", "netns", "del", NETNS], check=True)


def links() -> list[dict[str, object]]:
    """All interfaces of the namespace with what they are set to, without what the kernel counts and numbers."""
    found = json.loads(ip("-j", "-d", "link"))
    for link in found:
        for kind in ("info_data", "info_slave_data"):
            data = link.get("linkinfo", {}).get(kind, {})
            for key in [key for key in data if "timer" in key or key in ("no", "id", "designated_port")]:
                del data[key]
    return [{key: link.get(key) for key in ("ifname", "master", "mtu", "flags", "linkinfo")} for link in found]


STYLES = {
    "7.2-pc": (QEMU_7, "-m 96 -vga none -net nic,model=virtio -net tap,ifname=hand{n},script=no,downscript=no"),
    "11.1-q35": (
        QEMU_11,
        "-M q35,usb=off -m 96M -nodefaults -netdev tap,id=lan,ifname=hand{n},script=no,downscript=no "
        "-device virtio-net-pci,netdev=lan,mac=52:54:00:00:00:0{n},id=card,bus=pcie.0,addr=7",
    ),
}


@pytest.mark.parametrize(
    ("style", "engine", "cut"),
    [
        ("7.2-pc", Engine.BACKGROUND, Cut.COLOUR),
        ("11.1-q35", Engine.PRECOPY, Cut.COLOUR),
        ("11.1-q35", Engine.BACKGROUND, Cut.BARRIER),
    ],
)
async def test_attach_save_kill_restore(style: str, engine: Engine, cut: Cut, hand: Hand, place: qsnap.Place) -> None:
    qemu, arguments = STYLES[style]
    for number in (1, 2):
        mac = f",macaddr=52:54:00:00:00:0{number}"
        hand.start(number, qemu, *shlex.split(arguments.format(n=number).replace("model=virtio", f"model=virtio{mac}")))
    async with hand.consoles() as consoles:
        for console in consoles:
            await console.wait_ready(trio.current_time() + BOOT_S)
        report = await qsnap.attach(hand.load(qemu), place=place)
        assert report.barrier_only == ""
        assert {vm.state for vm in report.status.vms} == {"running"}
        saved = await qsnap.snapshot("hand", "cut", engine=engine, cut=cut, place=place)
        before = await statuses(consoles)
        await trio.sleep(1)
        after = await statuses(consoles)
        assert all(sum(b.received) > sum(a.received) for a, b in zip(before, after, strict=True))
        with pytest.raises(qsnap.StateError, match="running"):
            await qsnap.restore("hand", "cut", place=place)
    verdict = judge(saved, place)
    assert (verdict.orphans, verdict.wrong_stamps) == (0, 0)
    hand.kill()
    await qsnap.restore("hand", "cut", place=place)
    async with open_consoles("hand", place, 2) as consoles:
        await check_continues(consoles, verdict.states)
    again = await qsnap.snapshot("hand", "again", place=place)
    assert judge(again, place).orphans == 0


def start_still(hand: Hand, number: int, *arguments: str, qemu: str = QEMU_11) -> None:
    """A VM without a guest: its firmware finds nothing to boot."""
    card = f"tap,id=lan,ifname=hand{number},script=no,downscript=no"
    device = ("-device", "e1000,netdev=lan,id=card")
    hand.start(number, qemu, "-m", "32", "-nodefaults", "-netdev", card, *device, *arguments, boots=False)


async def ask(hand: Hand, number: int, command: str, **arguments: object) -> Any:
    with trio.fail_after(30):
        while not os.path.exists(hand.qmp(number)):
            await trio.sleep(0.05)
    async with open_loop(), open_qmp(hand.qmp(number), vm="asked") as qmp:
        return await qmp.execute(command, arguments)


async def test_detach_leaves_all_as_it_was(hand: Hand, place: qsnap.Place) -> None:
    for number in (1, 2):
        start_still(hand, number)
        await ask(hand, number, "migrate-set-parameters", **{"max-bandwidth": 123456, "downtime-limit": 77})
        on = [{"capability": "xbzrle", "state": True}]
        await ask(hand, number, "migrate-set-capabilities", capabilities=on)
    before = links()
    vne = hand.load(QEMU_11)
    await qsnap.attach(vne, place=place)
    assert {"handbr-blue", "handbr-to-b", "handbr-to-r"} < {link["ifname"] for link in links()}
    with pytest.raises(qsnap.StateError, match="attached already"):
        await qsnap.attach(vne, place=place)
    with pytest.raises(qsnap.StateError, match="not started by qsnap"):
        await qsnap.down("hand", place=place)
    saved = await qsnap.snapshot("hand", "still", place=place)
    assert not saved.vne.attached
    assert saved.vms[0].vm.nics[0].tap == ""
    parameters = await ask(hand, 1, "query-migrate-parameters")
    assert (parameters["max-bandwidth"], parameters["downtime-limit"]) == (123456, 77)
    capabilities = await ask(hand, 1, "query-migrate-capabilities")
    assert [each["capability"] for each in capabilities if each["state"]] == ["xbzrle"]
    await qsnap.detach("hand", place=place)
    assert links() == before
    assert place.runtime().names() == []
    assert (await ask(hand, 2, "query-status"))["status"] == "running"


async def test_a_failed_snapshot_puts_the_taps_back(
    hand: Hand, place: qsnap.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        start_still(hand, number)
    await ask(hand, 1, "query-status")
    await ask(hand, 2, "query-status")
    await qsnap.attach(hand.load(QEMU_11), place=place)
    before = links()

    async def fail(*_: object) -> None:
        raise qsnap.HostError("no space")

    monkeypatch.setattr("qsnap.host.saving.Saving.commit", fail)
    with pytest.raises(qsnap.HostError, match="no space"):
        await qsnap.snapshot("hand", "failed", place=place)
    assert links() == before
    hand.kill()
    await qsnap.detach("hand", place=place)
    assert {link["ifname"] for link in links()} == {"lo", "handbr", "hand1", "hand2"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("link set handbr type bridge stp_state 1", "STP"),
        ("link set hand2 type bridge_slave isolated on", "isolated"),
        ("link set hand2 nomaster", "hand2 is not on a bridge"),
    ],
)
async def test_without_a_bridge_for_colours_only_the_barrier_is_left(
    change: str, reason: str, hand: Hand, place: qsnap.Place
) -> None:
    for number in (1, 2):
        start_still(hand, number)
        await ask(hand, number, "query-status")
    ip(*change.split())
    before = links()
    report = await qsnap.attach(hand.load(QEMU_11), place=place)
    assert reason in report.barrier_only
    with pytest.raises(qsnap.StateError, match=r"(?s)colours cannot be kept.*--cut barrier"):
        await qsnap.snapshot("hand", "cut", place=place)
    await qsnap.snapshot("hand", "cut", cut=Cut.BARRIER, place=place)
    assert links() == before


async def test_a_socket_that_somebody_else_uses(hand: Hand, place: qsnap.Place) -> None:
    start_still(hand, 1)
    await ask(hand, 1, "query-status")
    vne = hand.load(QEMU_11)
    async with open_loop(), open_qmp(hand.qmp(1), vm="mine"):
        with pytest.raises(qsnap.StateError, match="one client"):
            await qsnap.attach(vne, place=place)
    await qsnap.attach(vne, place=place)
    async with open_loop(), open_qmp(hand.qmp(1), vm="mine"):
        with trio.fail_after(2):
            (vm,) = (await qsnap.status("hand", place=place)).vms
    assert vm.state == "busy"


async def test_a_device_that_came_later_is_refused(hand: Hand, place: qsnap.Place) -> None:
    start_still(hand, 1)
    await ask(hand, 1, "device_add", driver="e1000", id="late")
    with pytest.raises(qsnap.AttachRefusedError, match="the device late was plugged in"):
        await qsnap.attach(hand.load(QEMU_11), place=place)
    assert place.runtime().names() == []


OUTSIDE = {
    "virtio-9p-pci": "-fsdev local,id=shared,path={directory},security_model=none "
    "-device virtio-9p-pci,fsdev=shared,mount_tag=shared",
    "nvdimm": "-M pc,nvdimm=on -m 32,slots=2,maxmem=1G -device nvdimm,memdev=dimm "
    "-object memory-backend-file,id=dimm,share=on,mem-path={directory}/dimm,size=16M",
    "ivshmem-plain": "-object memory-backend-file,id=shared,share=on,mem-path={directory}/shared,size=1M "
    "-device ivshmem-plain,memdev=shared",
    "vhost-user-blk-pci": "-object memory-backend-memfd,id=ram,size=32M,share=on -M pc,memory-backend=ram "
    "-chardev socket,id=disk,path={directory}/disk.sock -device vhost-user-blk-pci,chardev=disk",
}


@pytest.fixture
def disk_process(hand: Hand) -> Iterator[None]:
    """A disk in another process: its socket is `disk.sock`."""
    make_images(hand.directory / "disk.raw")
    socket = hand.directory / "disk.sock"
    node = f"driver=file,node-name=file,filename={hand.directory}/disk.raw"
    export = f"type=vhost-user-blk,id=disk,node-name=file,writable=on,addr.type=unix,addr.path={socket}"
    process = subprocess.Popen(["qemu-storage-daemon", "--blockdev", node, "--export", export])
    try:
        for _ in range(200):
            if socket.exists():
                break
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("disk_process")
@pytest.mark.parametrize("device", OUTSIDE)
async def test_a_device_whose_state_is_elsewhere(device: str, hand: Hand, place: qsnap.Place) -> None:
    start_still(hand, 1, *OUTSIDE[device].format(directory=hand.directory).split(), qemu=QEMU_7)
    await ask(hand, 1, "query-status")
    with pytest.raises(qsnap.AttachRefusedError, match=f"({device}|-fsdev).*\n.*Start the VM without it"):
        await qsnap.attach(hand.load(QEMU_7), place=place)
    assert place.runtime().names() == []
    assert (await ask(hand, 1, "query-status"))["status"] == "running"


async def test_a_nic_that_the_description_lacks(hand: Hand, place: qsnap.Place) -> None:
    start_still(hand, 1)
    await ask(hand, 1, "query-status")
    path = hand.directory / "lab.toml"
    path.write_text(hand.description(QEMU_11).replace('tap = "hand1"', 'tap = "hand7"'))
    with pytest.raises(qsnap.AttachRefusedError, match="hand1"):
        await qsnap.attach(qsnap.load_description(path), place=place)


async def qemu_io(qmp: Qmp, log: Path, disk: int, command: str) -> str:
    """Let QEMU itself read or write one of its disks, as a guest's request would; it prints to its own output."""
    device = (await qmp.execute("query-block"))[disk]["qdev"]
    before = log.stat().st_size
    await qmp.execute("human-monitor-command", {"command-line": f'qemu-io -d {device} "{command}"'})
    return log.read_text()[before:]


@pytest.mark.parametrize("qemu", [QEMU_7, QEMU_11], ids=["7.2", "11.1"])
async def test_disks_of_the_users(qemu: str, hand: Hand, place: qsnap.Place) -> None:
    """They stay in use where they are; what is restored are copies of the cut."""
    raw, qcow2 = hand.directory / "a.raw", hand.directory / "b.qcow2"
    make_images(raw, qcow2)
    node = f"qcow2,node-name=mine,file.driver=file,file.filename={qcow2}"
    drive = ("-drive", f"file={raw},format=raw,if=virtio")
    start_still(hand, 1, *drive, "-blockdev", node, "-device", "virtio-blk-pci,drive=mine,id=second", qemu=qemu)
    log = hand.directory / "1.log"
    await ask(hand, 1, "query-status")

    async def on_each(pattern: str) -> None:
        async with open_loop(), open_qmp(hand.qmp(1), vm="asked") as qmp:
            for disk in (0, 1):
                assert "wrote 65536" in await qemu_io(qmp, log, disk, f"write -P {pattern} 0 64k")

    await on_each("0x11")
    await qsnap.attach(hand.load(qemu), place=place)
    saved = await qsnap.snapshot("hand", "cut", engine=Engine.BACKGROUND, place=place)
    await on_each("0x22")
    hand.kill()
    assert raw.read_bytes()[:2] == b"\x22\x22"
    assert [disk.base for disk in saved.vms[0].disks] == [None, None]
    await qsnap.restore("hand", "cut", place=place)
    again = await qsnap.snapshot("hand", "again", place=place)
    assert {disk.engine for disk in again.vms[0].disks} == {qsnap.DiskEngine.OVERLAY}
    log = place.runtime().vm_directory("hand", "vm1") / "qemu.log"
    async with open_loop(), open_qmp(place.runtime().monitor_path("hand", "vm1"), vm="vm1") as qmp:
        for disk in (0, 1):
            answer = await qemu_io(qmp, log, disk, "read -P 0x11 0 64k")
            assert "read 65536" in answer
            assert "failed" not in answer


async def test_a_disk_that_could_not_be_found_again(hand: Hand, place: qsnap.Place) -> None:
    make_images(hand.directory / "a.raw")
    relative = os.path.relpath(hand.directory / "a.raw")
    start_still(hand, 1, "-drive", f"file={relative},format=raw,if=virtio")
    await ask(hand, 1, "query-status")
    with pytest.raises(qsnap.AttachRefusedError, match="relative path"):
        await qsnap.attach(hand.load(QEMU_11), place=place)


def make_images(*paths: Path) -> None:
    for path in paths:
        subprocess.run(["qemu-img", "create", "-q", "-f", path.suffix[1:], path, "4M"], check=True)
