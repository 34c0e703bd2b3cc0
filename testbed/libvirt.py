"""A libvirtd of one's own: in a network namespace that is given, with files and sockets in a directory of its own.

It sees nothing of a libvirtd that the machine may run, and leaves nothing behind: what libvirt insists on having below
/etc, /run and /var is mounted over, for it and the QEMUs that it starts alone.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from attrs import frozen

from qsnap.host.netns import netns_path

START_S = 60.0
DAEMON_OPTIONS = 'auth_unix_rw = "none"\nauth_unix_ro = "none"\n'
#: no guests confined or run as somebody else, no cgroups and no log daemon: of these a container may have none
QEMU_OPTIONS = """\
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
hugetlbfs_mount = "/run/huge"
"""
#: Debian's libvirt does not start without these, whatever user it is told to take
USERS = {"passwd": "libvirt-qemu:x:64055:64055::/:/bin/false", "group": "libvirt-qemu:x:64055:\nkvm:x:64056:"}
MOUNTS = """\
cd {directory}
mount --bind etc /etc/libvirt && mount --bind passwd /etc/passwd && mount --bind group /etc/group || exit
for private in /run /var/lib /var/cache; do mount -t tmpfs tmpfs $private || exit; done
umount -l /sys && mount -t sysfs sysfs /sys || exit
mkdir /run/huge && mount -t hugetlbfs hugetlbfs /run/huge || exit
exec libvirtd
"""


class LibvirtError(Exception):
    """libvirt refused, or did not start; what it said."""


@frozen
class Libvirt:
    """A running libvirtd. `socket` is where it listens."""

    socket: Path

    @property
    def uri(self) -> str:
        """What its clients connect to."""
        return f"qemu+unix:///system?socket={self.socket}"

    async def virsh(self, *words: str) -> str:
        """Run one command, and return what it prints. Raises LibvirtError if it fails."""
        command = ["virsh", "-q", "-c", self.uri, *words]
        done = await trio.run_process(command, check=False, capture_stdout=True, capture_stderr=True)
        if done.returncode:
            raise LibvirtError(f"{shlex.join(words)}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode()


@asynccontextmanager
async def open_libvirtd(directory: Path, netns: str) -> AsyncIterator[Libvirt]:
    """Start libvirtd in the namespace, with `directory` for its files; both end with the block, and so do its VMs."""
    _configure(directory)
    libvirt = Libvirt(directory / "libvirt-sock")
    script = MOUNTS.format(directory=shlex.quote(str(directory)))
    command = ["nsenter", f"--net={netns_path(netns)}", "--", "unshare", "--mount", "sh", "-c", script]
    with (directory / "libvirtd.log").open("wb") as log:
        process = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        await _wait_ready(libvirt, process, directory / "libvirtd.log")
        yield libvirt
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                for name in (await libvirt.virsh("list", "--name")).split():
                    await libvirt.virsh("destroy", name)
            process.terminate()
            await process.wait()


def _configure(directory: Path) -> None:
    (directory / "etc").mkdir(parents=True)
    (directory / "etc/libvirtd.conf").write_text(f'unix_sock_dir = "{directory}"\n{DAEMON_OPTIONS}')
    (directory / "etc/qemu.conf").write_text(QEMU_OPTIONS)
    for name, lines in USERS.items():
        (directory / name).write_text(f"{Path('/etc', name).read_text()}{lines}\n")


async def _wait_ready(libvirt: Libvirt, process: trio.Process, log: Path) -> None:
    """Return when the daemon answers for its QEMU driver."""
    with trio.move_on_after(START_S):
        while process.poll() is None:
            try:
                await libvirt.virsh("list")
                return
            except LibvirtError:
                await trio.sleep(0.1)
    raise LibvirtError(f"libvirtd does not come up: {log.read_text(errors='replace')[-2000:]}")
