"""What this host and this user can do for VNEs: tried out, not looked up."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from qsnap.errors import HostError
from qsnap.host import hugepages
from qsnap.host.bridges import check_networking, open_links
from qsnap.host.disks.images import clone_refusal
from qsnap.host.netns import is_privileged, make_netns, remove_netns
from qsnap.host.place import Place
from qsnap.host.qemu import choose_accelerator, program_version
from qsnap.host.tasks import one_error
from qsnap.model import Ability, Accelerator, DiskEngine, Engine, version_text
from qsnap.rules.colouring import AddBridge, AddTap
from qsnap.rules.engine import USERFAULTFD_ADVICE, precopy_is_safe

_USERFAULTFD = 323  # the system call (asm/unistd_64.h)
_MTU = 1500


async def abilities(*, qemu: str = "qemu-system-x86_64", place: Place | None = None) -> tuple[Ability, ...]:
    """What this host can do for VNEs of this user. QEMU and networks are needed; without the others it takes longer.

    `qemu` is the program to ask, `place` has the store.
    """
    checks: dict[str, Callable[[], Awaitable[str]]] = {
        "QEMU": partial(_qemu, qemu),
        "networks": _networks,
        "KVM": partial(_kvm, qemu),
        "huge pages": _huge_pages,
        "userfaultfd": _userfaultfd,
        "engines": partial(_engines, qemu),
        "disks": partial(_disks, (place or Place()).store),
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


async def _engines(program: str) -> str:
    """Those that can capture an ordinary VM, with RAM in one piece."""
    qemu = await program_version(program)
    accelerator = await choose_accelerator(Accelerator.AUTO, program)
    found = []
    with suppress(HostError):
        await _userfaultfd()
        found.append(Engine.BACKGROUND)
    if precopy_is_safe(qemu, accelerator, 1):
        found += [Engine.PRECOPY, Engine.RECORD]
    if not found:
        raise HostError("none can save VMs of this QEMU", advice=USERFAULTFD_ADVICE)
    return ", ".join(engine.value for engine in found)


async def _disks(store: Path) -> str:
    """How disks can be kept in the store."""
    while not store.exists():  # it is made when it is first written to
        store = store.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".qsnap-", dir=store) as directory:
            source = os.path.join(directory, "source")
            Path(source).write_bytes(bytes(1 << 16))
            reflink = not clone_refusal(source, "raw", directory)
    except OSError as error:
        advice = "Choose another --store, or run qsnap as the user that it belongs to."
        raise HostError(error.strerror or str(error), where=str(store), advice=advice) from error
    able = {DiskEngine.AUTO: False, DiskEngine.REFLINK: reflink, DiskEngine.LVM: bool(shutil.which("lvcreate"))}
    engines = [engine for engine in DiskEngine if able.get(engine, True)]
    free = shutil.disk_usage(store).free >> 30
    return f"{', '.join(engine.value for engine in engines)}; {free} GiB free in the store"
