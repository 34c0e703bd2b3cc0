"""What is known about running VNEs: one directory each, with a state file, a lock, sockets and logs.

`<root>/<vne>/vne.json` is replaced as a whole after every change; `<root>/<vne>/<vm>/` holds `qmp.sock` (qsnap's),
`monitor.sock` (anybody's), `console.sock`, `console.log` and `qemu.log`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen
from cattrs.preconf.json import make_converter

from qsnap.errors import BusyError, HostError, NotUpError, StateError
from qsnap.host.disks import LiveDisk
from qsnap.host.hugepages import HugePages
from qsnap.host.journal import Journal
from qsnap.host.owner import MigrationSettings
from qsnap.host.qemu import Process
from qsnap.model import VM, VNE, Accelerator, BootFile, Colour
from qsnap.rules.manifest import check_names

USUAL_ROOT = Path("/run/qsnap")  #: of root; there a namespace is named after its VNE alone
LONGEST_SOCKET_PATH = 107  #: sun_path less its final NUL (sys/un.h)
_converter = make_converter()


@frozen
class LiveVM:
    """A running VM, and what qsnap needs to know to capture it. `settings` are those of one that it did not start.

    `boot` are the store's files that it was started with, in place of those that its hardware names.
    """

    vm: VM
    process: Process
    hardware: tuple[str, ...]
    machine_type: str
    accelerator: Accelerator
    qemu_version: tuple[int, int, int]
    hugetlb: bool
    disks: tuple[LiveDisk, ...]
    settings: MigrationSettings | None = None
    boot: tuple[BootFile, ...] = ()


@frozen
class LiveVNE:
    """A VNE that was brought up, or attached to.

    `netns` is the name of its namespace, or the path by which one without a name was known when it was made.
    `barrier_only` is why colours cannot be kept on the bridges of somebody else's, if so. `started` is the operation on
    several hosts that has let it run; `waiting` are the VMs that are yet to be let run by one.
    """

    vne: VNE
    store: str
    netns: str
    active: Colour
    vms: tuple[LiveVM, ...]
    barrier_only: str = ""
    started: str = ""
    waiting: tuple[str, ...] = ()

    def way_in(self) -> str:
        """The name or path of the namespace now: without a name, that of a VM that lives, or nothing if none does."""
        if "/" not in self.netns or self.vne.attached or not self.vms:
            return self.netns
        alive = (vm.process.pid for vm in self.vms if vm.process.is_alive())
        return next((f"/proc/{pid}/ns/net" for pid in alive), "")

    def files_in_use(self) -> tuple[str, ...]:
        """All disk layers that a VM has open, and what it boots from, relative to the VNE's directory in the store.

        What layers lie on is elsewhere, and is named by its whole path.
        """
        disks = [disk for live in self.vms for disk in live.disks]
        layers = (file for disk in disks for file in disk.layers)
        below = (file.path for disk in disks for file in disk.below)
        boot = (each.file.path for live in self.vms for each in live.boot)
        return (*(f"disks/{os.path.basename(file.path)}" for file in layers), *below, *boot)

    def find(self, vm: str) -> LiveVM:
        """The VM of this name. Raises StateError with the names there are."""
        for live in self.vms:
            if live.vm.name == vm:
                return live
        names = ", ".join(live.vm.name for live in self.vms)
        raise StateError(f"VNE {self.vne.name} has no VM {vm}", advice=f"It has: {names}")


@frozen
class Runtime:
    """The directory of all VNEs that run on this host for this user."""

    root: Path

    def directory(self, vne: str) -> Path:
        """Where a VNE's state, sockets and logs are. Raises StateError for what cannot be a name."""
        check_names(vne)
        return self.root / vne

    def netns(self, vne: str) -> str:
        """The name of a VNE's network namespace: other run directories may hold a VNE of the same name."""
        if self.root == USUAL_ROOT:
            return f"qsnap-{vne}"
        return f"qsnap-{vne}-{hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]}"

    def vm_directory(self, vne: str, vm: str) -> Path:
        """Where a VM's sockets and logs are. Raises HostError if its socket paths would be too long."""
        check_names(vm)
        directory = self.directory(vne) / vm
        if len(os.fsencode(directory / "console.sock")) > LONGEST_SOCKET_PATH:
            raise HostError(
                "the path of a socket in it would be longer than the kernel allows",
                where=str(directory),
                advice="Choose a shorter --run-dir or a shorter name.",
            )
        return directory

    def qmp_path(self, vne: str, vm: str) -> str:
        """The QMP socket that qsnap alone uses; QEMU serves one client at a time on it."""
        return str(self.vm_directory(vne, vm) / "qmp.sock")

    def monitor_path(self, vne: str, vm: str) -> str:
        """A second QMP socket, for looking on while qsnap is at work."""
        return str(self.vm_directory(vne, vm) / "monitor.sock")

    def console_path(self, vne: str, vm: str) -> str:
        """The socket of the VM's serial console."""
        return str(self.vm_directory(vne, vm) / "console.sock")

    def make_vm_directory(self, vne: str, vm: str) -> Path:
        """An empty directory for a VM about to start."""
        directory = self.vm_directory(vne, vm)
        shutil.rmtree(directory, ignore_errors=True)
        try:
            directory.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise HostError(error.strerror or str(error), where=str(directory), advice="Make room there.") from error
        return directory

    def link_sockets(self, vne: str, vm: str, qmp: str) -> None:
        """Let the one QMP socket of an attached VM be found where both of another VM's are."""
        directory = self.make_vm_directory(vne, vm)
        for name in ("qmp.sock", "monitor.sock"):
            (directory / name).symlink_to(qmp)

    def names(self) -> list[str]:
        """The VNEs that were brought up or attached to, and are so still."""
        return sorted(path.parent.name for path in self.root.glob("*/vne.json"))

    def load(self, vne: str) -> LiveVNE:
        """The state of a VNE. Raises NotUpError if it was not brought up, HostError if the file is damaged."""
        path = self.directory(vne) / "vne.json"
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            up = ", ".join(self.names()) or "none"
            raise NotUpError(f"VNE {vne} is not up", advice=f"Up are: {up}. See `qsnap ps`.") from error
        except OSError as error:
            raise HostError(error.strerror or str(error), where=str(path), advice="Run qsnap as root.") from error
        try:
            return _converter.loads(content, LiveVNE)
        except Exception as error:  # cattrs lets through nearly anything that a value of the wrong kind can raise
            raise HostError("this state file is damaged", where=str(path), advice=f"qsnap down {vne}") from error

    def save(self, live: LiveVNE) -> None:
        """Replace the state file as a whole. Raises HostError where it cannot be written."""
        path = self.directory(live.vne.name) / "vne.json"
        fresh = path.with_suffix(".new")
        try:
            path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
            fresh.write_text(_converter.dumps(live, indent=1))
            fresh.replace(path)
        except OSError as error:
            raise HostError(error.strerror or str(error), where=str(path), advice="Make room there.") from error

    def forget(self, vne: str) -> None:
        """Remove all that is kept about a VNE."""
        shutil.rmtree(self.directory(vne), ignore_errors=True)

    def journal(self, vne: str) -> Journal:
        """The journal of a VNE."""
        return Journal(self.root / f"{vne}.journal")

    def huge_pages(self) -> HugePages:
        """The host's huge pages, and what was added to them for VNEs of this directory."""
        return HugePages(self.root / "huge-pages.json")

    def interrupted(self) -> list[str]:
        """The VNEs with a journal: an operation on them is under way, or its process was killed."""
        return sorted(path.stem for path in self.root.glob("*.journal"))

    @contextmanager
    def locked(self, vne: str) -> Iterator[None]:
        """Keep every other qsnap away from this VNE. Raises BusyError at once if one is at work on it.

        Raises HostError for a directory of another user's, who may have put it there to be written to.
        """
        check_names(vne)
        try:
            self.root.mkdir(parents=True, mode=0o700, exist_ok=True)
            owner = self.root.lstat().st_uid
            if owner != os.geteuid():
                advice = "Choose another --run-dir, or run qsnap as that user."
                raise HostError(f"it belongs to user {owner}", where=str(self.root), advice=advice)
            fd = os.open(self.root / f"{vne}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            advice = "Choose another --run-dir."
            raise HostError(error.strerror or str(error), where=str(self.root), advice=advice) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise BusyError(
                "another qsnap is at work on it", where=f"VNE {vne}", advice="Wait for it to end and try again."
            ) from error
        finally:
            os.close(fd)
