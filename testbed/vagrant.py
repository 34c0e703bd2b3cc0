"""Hosts that are machines with a kernel of their own: Vagrant starts them, on a libvirtd of the test bed's.

Their networks are in a network namespace, which is the initiator's too. Nothing of this is seen in the machine's own
namespace. Where there is no KVM to run them with, their processors are emulated, and have an emulated KVM themselves.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import trio
import vagrant
from attrs import frozen
from pyroute2 import netns

from qsnap.host.netns import enter_command, entered
from qsnap.host.qemu import kvm_works
from testbed.fleet import INITIATOR
from testbed.hosts import open_netlink
from testbed.libvirt import Libvirt, open_libvirtd

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ROOT / "testbed/hosts.toml"
POOL = "machines"
INITIATOR_ADDRESS = "10.77.1.1"  #: that libvirt gives its bridge
COMMAND_S = 300.0
#: an emulated processor takes seconds to make one
SHARED_CONNECTION = "Host *\n  ControlMaster auto\n  ControlPath {directory}/%n.ssh\n  ControlPersist yes\n"
T = TypeVar("T")


class MachineError(Exception):
    """A command failed in a machine: its exit code, and what it said."""


@frozen
class Machine:
    """A machine, for as long as the test bed lasts. `config` is that of ssh."""

    name: str
    address: str
    netns: str
    config: Path

    @property
    def tunnel(self) -> str:
        """Where tunnels end."""
        return self.address

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line that runs a command in it, as root."""
        return [*enter_command(self.netns), "ssh", "-F", str(self.config), self.name, shlex.join(words)]

    async def run(self, *words: str, given: bytes = b"", timeout_s: float = COMMAND_S) -> str:
        """Run a command in it, and return what it prints. Raises MachineError if it fails."""
        with trio.fail_after(timeout_s):
            done = await trio.run_process(
                self.command(words), stdin=given, capture_stdout=True, capture_stderr=True, check=False
            )
        if done.returncode:
            said = (done.stdout + done.stderr).decode(errors="replace")
            raise MachineError(f"{self.name}: {shlex.join(words)}: exit code {done.returncode}: {said}")
        return done.stdout.decode()

    async def put(self, directory: Path, target: str) -> None:
        """Copy all that is in a directory into one of the machine's, which is made."""
        packed = await trio.run_process(["tar", "-C", str(directory), "-cf", "-", "."], capture_stdout=True)
        await self.run("mkdir", "-p", target)
        await self.run("tar", "-C", target, "--no-same-owner", "-xf", "-", given=packed.stdout)

    @asynccontextmanager
    async def forwarded(self, there: str, here: Path) -> AsyncIterator[None]:
        """Meanwhile the Unix socket `here` leads to the one `there`, in the machine."""
        await self._control("forward", "-L", f"{here}:{there}")
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._control("cancel", "-L", f"{here}:{there}")
                here.unlink(missing_ok=True)

    async def disconnect(self) -> None:
        """End the connection that all commands share."""
        await self._control("exit")

    async def _control(self, word: str, *options: str) -> None:
        ssh = [*enter_command(self.netns), "ssh", "-F", str(self.config), "-O", word, *options, self.name]
        await trio.run_process(ssh, capture_stderr=True, check=word == "forward")


@frozen
class Outside:
    """The initiator: the namespace that the machines' networks are in."""

    netns: str
    name: str = INITIATOR
    address: str = INITIATOR_ADDRESS
    tunnel: str = INITIATOR_ADDRESS

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line that runs a command here."""
        return [*enter_command(self.netns), *words]


@frozen
class Machines:
    """The machines, by name, and how they were made."""

    driver: str
    initiator: Outside
    hosts: dict[str, Machine]


@asynccontextmanager
async def open_machines(directory: Path) -> AsyncIterator[Machines]:
    """All machines of testbed/hosts.toml, with disks and logs in `directory`; at the end nothing is left of them."""
    name = f"qsnap-testbed-{os.getpid()}"
    driver = "kvm" if await kvm_works("qemu-system-x86_64") else "qemu"
    with _namespace(name):
        async with open_libvirtd(directory / "libvirt", name) as libvirt:
            await _make_pool(libvirt, directory / "disks")
            with (directory / "vagrant.log").open("ab") as log:
                driven = _driven(directory, libvirt, driver, log)
                machines: dict[str, Machine] = {}
                try:
                    await _start(name, driven, directory / "vagrant.log")
                    machines |= await _connect(name, driven, directory)
                    yield Machines(driver, Outside(name), machines)
                finally:
                    with trio.CancelScope(shield=True):
                        for machine in machines.values():
                            await machine.disconnect()
                        await _inside(name, driven.destroy)


@contextmanager
def _namespace(name: str) -> Iterator[None]:
    netns.create(name)
    try:
        with open_netlink(name) as ip:
            ip.link("set", index=1, state="up")
        yield
    finally:
        netns.remove(name)


async def _make_pool(libvirt: Libvirt, directory: Path) -> None:
    directory.mkdir()
    await libvirt.virsh("pool-create-as", POOL, "dir", "--target", str(directory))


async def _start(name: str, driven: vagrant.Vagrant, log: Path) -> None:
    try:
        await _inside(name, partial(driven.up, provider="libvirt"))
    except subprocess.CalledProcessError as error:
        raise MachineError(f"the machines do not come up: {log.read_text(errors='replace')[-4000:]}") from error


async def _connect(name: str, driven: vagrant.Vagrant, directory: Path) -> dict[str, Machine]:
    hosts = tomllib.loads(HOSTS.read_text())
    told = [await _inside(name, partial(driven.ssh_config, host)) for host in hosts]
    config = directory / "ssh-config"
    config.write_text("".join(told) + SHARED_CONNECTION.format(directory=directory))
    return {host: Machine(host, settings["address"], name, config) for host, settings in hosts.items()}


def _driven(directory: Path, libvirt: Libvirt, driver: str, log: BinaryIO) -> vagrant.Vagrant:
    """Vagrant with all of its own files in `directory`."""

    @contextmanager
    def said() -> Iterator[BinaryIO]:
        yield log

    settings = {
        "TESTBED_DRIVER": driver,
        "TESTBED_POOL": POOL,
        "TESTBED_URI": libvirt.uri,
        "VAGRANT_DOTFILE_PATH": str(directory / "vagrant"),
        "VAGRANT_HOME": str(directory / "vagrant-home"),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
    }
    return vagrant.Vagrant(root=str(ROOT), env={**os.environ, **settings}, out_cm=said, err_cm=said)


async def _inside(name: str, function: Callable[[], T]) -> T:
    """Call a function in a thread that is in the namespace, and so are the processes that it starts."""

    def call() -> T:
        with entered(name):
            return function()

    return await trio.to_thread.run_sync(call)
