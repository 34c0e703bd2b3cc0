"""VMs whose guest is one boot sector: up in a second, nearly no load, and they end when they are told to.

For faults of the host, which do not care what the guest does. The guest echoes what comes over its console; at `p` it
panics (pvpanic), at `s` it powers off.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

import qsnap
from qsnap.host import saving
from qsnap.host.capture import Capture
from tests.live.lab import QEMU_11

DEADLINE_S = 60.0

_CODE = """
FB F4           again: sti; hlt           ; until the next tick of the timer
BA FD 03 EC     mov dx, 3fdh; in al, dx   ; the line status of the UART
A8 01 74 F6     test al, 1; jz again
BA F8 03 EC     mov dx, 3f8h; in al, dx
3C 70 74 07     cmp al, 'p'; je panic
3C 73 74 0B     cmp al, 's'; je off
EE EB E7        out dx, al; jmp again
BA 05 05 B0 01  panic: mov dx, 505h; mov al, 1
EE EB DF        out dx, al; jmp again
BA 04 06        off: mov dx, 604h         ; PM1a_CNT of the machine type pc
B8 00 20        mov ax, 2000h             ; SLP_EN, S5
EF EB D6        out dx, ax; jmp again
"""


def make_boot_disk(path: Path) -> qsnap.Disk:
    """A disk image that holds the guest."""
    code = b"".join(bytes.fromhex(line[:14]) for line in _CODE.strip().splitlines())
    path.write_bytes((code.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    return qsnap.Disk(str(path), "raw")


def make_tiny_vne(name: str, disk: qsnap.Disk, *, vms: int = 1, qemu: str = QEMU_11, **settings: Any) -> qsnap.VNE:
    """A VNE of such VMs on one network; `settings` are those of a VM."""
    options = {"disks": (disk,), "extra": ("-device", "pvpanic"), **settings}
    return qsnap.VNE(
        name,
        tuple(
            qsnap.VM(
                f"vm{number}",
                16 << 20,
                qemu=qemu,
                nics=(qsnap.Nic("lan", f"52:54:00:00:00:{number:02x}"),),
                accelerator=qsnap.Accelerator.TCG,
                **options,
            )
            for number in range(1, vms + 1)
        ),
        (qsnap.Network("lan"),),
    )


async def tell(vne: str, vm: str, place: qsnap.Place, word: bytes) -> None:
    """Send something to a guest's console."""
    async with await trio.open_unix_socket(qsnap.console_path(vne, vm, place=place)) as console:
        await console.send_all(word)


async def check_echo(vne: str, vms: Sequence[str], place: qsnap.Place) -> None:
    """Return when each of these guests has answered: it runs, and does not just say so."""
    for vm in vms:
        async with await trio.open_unix_socket(qsnap.console_path(vne, vm, place=place)) as console:
            with trio.fail_after(DEADLINE_S):
                heard = b""
                while b"e" not in heard:  # what is sent before it has booted is lost
                    await console.send_all(b"e")
                    with trio.move_on_after(0.3):
                        heard = await console.receive_some(1000)


async def wait_state(vne: str, vm: str, place: qsnap.Place, state: str) -> None:
    """Return when QEMU says that the VM is in this state; `dead` is one too."""
    with trio.fail_after(DEADLINE_S):
        while {each.name: each.state for each in (await qsnap.status(vne, place=place)).vms}[vm] != state:
            await trio.sleep(0.01)


def strike_before(
    patch: pytest.MonkeyPatch, step: str, vm: str, fault: Callable[[], Awaitable[None]], engine: type[Capture]
) -> None:
    """Let a fault strike just before this step of one VM's capture.

    It is `prepare`, `halt`, for which the others wait, `stop`, `_release` or `complete`.
    """
    real = getattr(engine, step)

    async def struck(self: Capture, *arguments: Any) -> Any:
        if self.qmp.vm == vm:
            await fault()
        return await real(self, *arguments)

    patch.setattr(engine, step, struck)
    patch.setattr(saving, "HALT_S", math.inf)
