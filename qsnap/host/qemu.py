"""QEMU processes: starting one inside a namespace, knowing whether it lives, ending it.

A VM outlives the qsnap that started it. It is known by its process id and start time, so that a process id used
again is never taken for it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL

import trio
from attrs import evolve, field, frozen

from qsnap.errors import HostError, QemuError
from qsnap.host.births import starting
from qsnap.host.clock import steady_s
from qsnap.model import Accelerator

KVM_PROBE_TIMEOUT_S = 60.0  # in a machine with an emulated KVM, on a busy host, a probe that went well took 15
DYING_S = 0.3
LAST_LINES = 8  #: of what a QEMU said that did not start
_PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-aarch64": "qemu-system-arm",
}

# mov ax, 10h; mov dx, 501h; out dx, ax; hlt: ends QEMU with status 2 * 0x10 + 1 through isa-debug-exit
_PROBE_CODE = bytes((0xB8, 0x10, 0x00, 0xBA, 0x01, 0x05, 0xEF, 0xF4))
_PROBE_SECTOR = _PROBE_CODE.ljust(510, b"\0") + b"\x55\xaa"
_PROBE_STATUS = 2 * 0x10 + 1


@frozen
class Process:
    """A running process: its id, and its start in clock ticks since boot (`/proc/PID/stat`, field 22)."""

    pid: int
    start_ticks: int
    spawned_s: float = field(default=0.0, eq=False)  #: Unix time, of one that was started here

    def is_alive(self) -> bool:
        """Whether this very process still runs. A zombie does not."""
        state, start_ticks = _state_of(self.pid)
        return state not in ("", "Z", "X") and start_ticks == self.start_ticks


def process_of(pid: int) -> Process:
    """The process that has this id now."""
    return Process(pid, _state_of(pid)[1])


def find_program(name: str) -> str:
    """The absolute path of a program. Raises HostError with the package to install."""
    path = shutil.which(name)
    if path is None:
        package = _PACKAGES.get(os.path.basename(name), "qemu-system")
        raise HostError(f"{name} is not installed", advice=f"Install it: apt install {package}")
    return os.path.abspath(path)


async def start_qemu(
    command: list[str], *, enter: list[str], directory: str, vm: str, fds: Iterable[int] = ()
) -> Process:
    """Start QEMU in the namespace that the command `enter` leads into, and wait until its QMP socket answers.

    Its output goes to `qemu.log` in `directory`, a VM's in that of its VNE; the descriptors `fds` are inherited under
    their numbers. Raises QemuError with QEMU's own words if it ends at once.
    """
    log = os.path.join(directory, "qemu.log")
    argv = [*enter, find_program(command[0]), *command[1:]]
    spawned_s = steady_s()
    with starting(os.path.dirname(directory)) as fd:
        pid = _spawn(argv, log, (*fds, fd))
    process = evolve(process_of(pid), spawned_s=spawned_s)
    try:
        await _wait_for_socket(process, os.path.join(directory, "qmp.sock"), log, vm)
    except BaseException:
        with trio.CancelScope(shield=True):
            await end_process(process)
        raise
    return process


def _spawn(argv: list[str], log: str, fds: tuple[int, ...]) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions: list[tuple[object, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, log, flags, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds),  # onto itself: inherited
    ]
    try:
        return os.posix_spawn(find_program(argv[0]), argv, os.environ, file_actions=actions, setsid=True)
    except OSError as error:  # which names the program, whatever failed
        raise HostError(
            f"cannot start QEMU: {error.strerror}", where=log, advice="Is there room for this file, and memory?"
        ) from error


async def _wait_for_socket(process: Process, path: str, log: str, vm: str) -> None:
    while not os.path.exists(path):
        if not process.is_alive():
            reap(process)
            raise did_not_start(last_words(Path(log)), vm)
        await trio.sleep(0.002)


def did_not_start(words: str, vm: str) -> QemuError:
    """The error for a QEMU that ended at once. Its log goes with all that was made, so what it said is told here."""
    message = f"QEMU did not start: {words or 'it ended without a word'}"
    return QemuError(message, where=f"VM {vm}", advice="Nothing of this attempt is left. QEMU's words tell why.")


def last_words(log: Path) -> str:
    """The last lines that QEMU wrote to its log, on one line."""
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:])


async def end_process(process: Process) -> None:
    """Kill the process and wait until it is gone. Nothing happens where it is gone already."""
    with open_pidfd(process) as fd:
        if fd is not None:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(fd)
    reap(process)


async def has_ended(process: Process) -> bool:
    """Whether the process is gone. One that was killed a moment ago takes its time to end, and is waited for."""
    with trio.move_on_after(DYING_S), open_pidfd(process) as fd:
        if fd is not None:
            await trio.lowlevel.wait_readable(fd)
    return not process.is_alive()


def find_processes(marks: Sequence[str]) -> list[Process]:
    """The processes with one of these texts on their command line, such as the path of a VM's QMP socket."""
    wanted = [os.fsencode(mark) for mark in marks]
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = entry.read_bytes()
            if any(mark in line for mark in wanted):
                pid = int(entry.parent.name)
                found.append(process_of(pid))
    return found


def command_line(process: Process) -> list[str]:
    """The words that a process was started with. Raises OSError if it is gone."""
    return [os.fsdecode(word) for word in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[:-1]]


def find_image_tools(directory: str) -> list[Process]:
    """The qemu-img processes at work on images in this directory."""
    found = []
    for process in find_processes([f"{directory}/"]):
        with suppress(OSError):
            if [os.path.basename(word) for word in command_line(process)[:1]] == ["qemu-img"]:
                found.append(process)
    return found


def reap(process: Process) -> None:
    """Take the exit status of an ended child, if it was a child of ours."""
    with suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)


@contextmanager
def open_pidfd(process: Process) -> Iterator[int | None]:
    """A descriptor that stands for this very process, for as long as the block lasts; None if it has ended."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        yield None
        return
    try:  # opened first, looked at second: from here on the id cannot mean another process
        yield fd if process.is_alive() else None
    finally:
        os.close(fd)


def _state_of(pid: int) -> tuple[str, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])


async def program_version(qemu: str) -> tuple[int, int, int]:
    """The version of a QEMU program, as it says itself."""
    done = await trio.run_process([find_program(qemu), "--version"], capture_stdout=True, check=False)
    found = re.search(rb"version (\d+)\.(\d+)\.(\d+)", done.stdout)
    if not found:
        raise HostError(f"{qemu} --version does not tell a version", advice="Name a QEMU program.")
    major, minor, micro = map(int, found.groups())
    return major, minor, micro


async def choose_accelerator(wish: Accelerator, qemu: str) -> Accelerator:
    """KVM where it really runs guest code, else TCG. A KVM that was asked for and does not work raises HostError."""
    if wish is Accelerator.TCG:
        return wish
    if await kvm_works(qemu):
        return Accelerator.KVM
    if wish is Accelerator.KVM:
        raise HostError(
            "KVM does not run a guest here",
            where="/dev/kvm",
            advice='Set accelerator = "tcg" or "auto"; or enable virtualisation, and join the group of /dev/kvm.',
        )
    return Accelerator.TCG


async def kvm_works(qemu: str) -> bool:
    """Whether the processor virtualises and a boot sector runs under KVM. That /dev/kvm opens is no proof.

    Without vmx or svm some kernels still offer KVM and emulate every instruction: a boot sector runs, Linux does not.
    """
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    virtualises = flags is None or not {"vmx", "svm"}.isdisjoint(flags[1].split())
    if not (virtualises and os.access("/dev/kvm", os.R_OK | os.W_OK)):
        return False
    with tempfile.NamedTemporaryFile(prefix="qsnap-kvm-") as sector:
        sector.write(_PROBE_SECTOR)
        sector.flush()
        command = [
            *(find_program(qemu), "-accel", "kvm", "-cpu", "host", "-m", "32", "-nodefaults", "-display", "none"),
            *("-no-reboot", "-device", "isa-debug-exit,iobase=0x501,iosize=2"),
            *("-drive", f"file={sector.name},format=raw,if=ide"),
        ]
        with trio.move_on_after(KVM_PROBE_TIMEOUT_S):
            done = await trio.run_process(command, check=False, stdout=DEVNULL, stderr=DEVNULL)
            return done.returncode == _PROBE_STATUS
    return False
