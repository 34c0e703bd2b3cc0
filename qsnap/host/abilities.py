"""What this host and this user can do for VNEs: tried out, not looked up."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Awaitable, Callable
from functools import partial

from attrs import frozen

from qsnap.errors import HostError
from qsnap.host import hugepages
from qsnap.host.bridges import check_networking, open_links
from qsnap.host.netns import is_privileged, make_netns, remove_netns
from qsnap.host.qemu import choose_accelerator, program_version
from qsnap.host.tasks import one_error
from qsnap.model import Accelerator, version_text
from qsnap.rules.colouring import AddBridge, AddTap
from qsnap.rules.engine import USERFAULTFD_ADVICE

_USERFAULTFD = 323  # the system call (asm/unistd_64.h)
_MTU = 1500


@frozen
class Ability:
    """Something that VNEs need or are better for: whether it is here, what was found, and how to come by it."""

    name: str
    here: bool
    finding: str
    remedy: str = ""


async def abilities(*, qemu: str = "qemu-system-x86_64") -> tuple[Ability, ...]:
    """What this host can do for VNEs of this user. QEMU and networks are needed; without the others it takes longer.

    `qemu` is the program to ask.
    """
    checks: dict[str, Callable[[], Awaitable[str]]] = {
        "QEMU": partial(_qemu, qemu),
        "networks": _networks,
        "KVM": partial(_kvm, qemu),
        "huge pages": _huge_pages,
        "userfaultfd": _userfaultfd,
    }
    return tuple([await _try(name, check) for name, check in checks.items()])


async def _try(name: str, check: Callable[[], Awaitable[str]]) -> Ability:
    try:
        return Ability(name, True, await check())
    except HostError as error:
        return Ability(name, False, f"{error.where}: {error.message}" if error.where else error.message, error.advice)


async def _qemu(program: str) -> str:
    return version_text(await program_version(program))


async def _networks() -> str:
    check_networking()
    name = f"qsnap-try-{os.getpid()}"
    try:
        with one_error():
            async with make_netns(name) as netns, open_links(netns) as links:
                await links.apply([AddBridge("bridge", _MTU, ""), AddTap("tap", "bridge", _MTU, "")])
    finally:
        await remove_netns(name)
    return "bridges and taps, as root" if is_privileged() else "bridges and taps, in a user namespace"


async def _kvm(program: str) -> str:
    await choose_accelerator(Accelerator.KVM, program)
    return "runs guests"


async def _huge_pages() -> str:
    free = hugepages.free_pages()
    if not free:
        raise HostError("none is free", advice="For the shortest pauses, root reserves some: sysctl vm.nr_hugepages=N")
    return f"{free} are free, of 2 MiB each"


async def _userfaultfd() -> str:
    fd = ctypes.CDLL(None).syscall(_USERFAULTFD, os.O_CLOEXEC)
    if fd >= 0:
        os.close(fd)
        return "open to every QEMU, for the engine background"
    if os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return "open to QEMU 8.0 and newer, for the engine background"
    raise HostError("closed to this user, so that there is no engine background", advice=USERFAULTFD_ADVICE)
