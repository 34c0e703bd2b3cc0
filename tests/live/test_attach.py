"""VMs that qsnap did not start: attached to, saved under traffic, killed, restored as qsnap's own; or let go again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from attrs import field, frozen

import qsnap
from qsnap import Cut, Engine
from testbed.guests import GuestConsole, kernel_append
from tests.live.lab import GUEST, QEMU_7, QEMU_11, check_continues, judge, open_consoles, statuses, wait_ready

NETNS = "qsnap-test-attach"


def ip(*words: str) -> str:
    """Run `ip` in the namespace of the test, and return what it says."""
    return subprocess.run(["ip", "-n", NETNS, *words], check=True, capture_output=True, text=True).stdout


@frozen
class Hand:
    """VMs started by hand, in a namespace of their user's own."""

    directory: Path
    processes: list[subprocess.Popen[bytes]] = field(factory=list)

    def start(self, number: int, qemu: str, *arguments: str, vms: int = 2) -> None:
        """Start guest `number`, with one network card on the tap `handN` and a bridge of the user's."""
        tap = f"hand{number}"
        ip("tuntap", "add", tap, "mode", "tap")
        ip("link", "set", tap, "master", "handbr", "up")
        append = kernel_append(number, vms, dirty_mb=16, rate_mb=50, udp=200, tcp=1)
        command = [
            *("ip", "netns", "exec", NETNS, qemu, "-accel", "tcg", "-display", "none", "-name", tap),
            *("-kernel", str(GUEST / "vmlinuz"), "-initrd", str(GUEST / "initrd"), "-append", append),
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
    """All interfaces of the namespace: name, master, the settings of bridges and ports, without counters."""
    return [
        {key: link.get(key) for key in ("ifname", "master", "mtu", "linkinfo")}
        for link in json.loads(ip("-j", "-d", "link"))
    ]


def settled(found: list[dict[str, object]]) -> str:
    """What `links` found, without timers and port numbers, which are the kernel's."""
    return json.dumps(found)


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
        await wait_ready(consoles)
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
