"""Network namespaces: making them, running code in them, and opening what belongs to them.

Root's have names, below /run/netns. Those of an ordinary user have none: each belongs to a user namespace of its own,
lasts as long as a process is in it, and is known by the path of such a process, /proc/PID/ns/net. The user owns it and
may change it from outside (user_namespaces(7)), so qsnap never goes in: see `netns_helper`, and decision 0017.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio
from attrs import frozen
from pyroute2 import netns

from qsnap.errors import HostError
from qsnap.host import netns_helper
from qsnap.host.netns_helper import READY, open_here, turn_off_ipv6

T = TypeVar("T")
Opener = Callable[[str], int]  #: takes a name of `netns_helper`, returns a descriptor

OWN = "/proc/self/ns/net"  #: the path of the namespace that this process was started in

NEEDED_CAPABILITIES = (12, 21)  #: CAP_NET_ADMIN, CAP_SYS_ADMIN (linux/capability.h)

# What may forbid an ordinary user a user namespace: the value that does, and one that does not.
_SWITCHES = {
    "kernel.unprivileged_userns_clone": ("0", "1"),
    "kernel.apparmor_restrict_unprivileged_userns": ("1", "0"),
    "user.max_user_namespaces": ("0", "10000"),
    "user.max_net_namespaces": ("0", "10000"),
}


def is_privileged() -> bool:
    """Whether this process may make and join network namespaces by itself."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("\nCapEff:")[2].split()[0], 16)
    return all(effective >> capability & 1 for capability in NEEDED_CAPABILITIES)


def netns_path(name: str) -> str:
    """Where a namespace of this name is mounted, so that `ip netns exec NAME` finds it too; a path is one already."""
    return os.path.join(netns.NETNS_RUN_DIR, name)


def enter_command(name: str) -> list[str]:
    """What to put before a command so that it runs in the namespace."""
    path = netns_path(name)
    if is_privileged():
        return ["nsenter", f"--net={path}", "--"]
    return ["nsenter", f"--user={Path(path).with_name('user')}", f"--net={path}", "--preserve-credentials", "--"]


@asynccontextmanager
async def make_netns(name: str) -> AsyncIterator[str]:
    """Make a namespace, without IPv6, and yield what it is called.

    Without privileges that is a path, and the namespace ends with the block if no process has joined it.
    """
    if is_privileged():
        await create_netns(name)
        yield name
        return
    with ExitStack() as stack:
        helper = await trio.to_thread.run_sync(stack.enter_context, _helper())
        yield f"/proc/{helper.pid}/ns/net"


async def create_netns(name: str) -> None:
    """Make a namespace with a name, without IPv6. Needs privileges."""
    try:
        await trio.to_thread.run_sync(netns.create, name)
        await run_in_netns(name, turn_off_ipv6)
    except OSError as error:
        raise HostError(f"cannot make the network namespace {name}: {error.strerror}") from error


async def remove_netns(name: str) -> None:
    """Remove the namespace with all its links, if it is there. One without a name needs no removing."""

    def remove() -> None:
        if "/" not in name and os.path.exists(netns_path(name)):
            netns.remove(name)

    await trio.to_thread.run_sync(remove)


async def run_in_netns(name: str, call: Callable[[], T]) -> T:
    """Run the blocking `call` in a worker thread inside the namespace. It can be neither cancelled nor abandoned.

    A namespace belongs to a thread: the rest of the process does not follow. Needs privileges.
    """

    def inside() -> T:
        with entered(name):
            return call()

    return await trio.to_thread.run_sync(inside)


@contextmanager
def entered(name: str) -> Iterator[int]:
    """Have this thread in another namespace. Yields a descriptor of the one it came from. Needs privileges."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        netns.setns(netns_path(name), flags=0)
        try:
            yield home
        finally:
            netns.setns(home, flags=0)
    finally:
        os.close(home)


async def run_with_opener(name: str, call: Callable[[Opener], T]) -> T:
    """Run the blocking `call` in a worker thread, with what opens sockets and devices of the namespace for it."""
    if is_privileged():
        return await run_in_netns(name, partial(call, open_here))

    def outside() -> T:
        with _helper(netns_path(name)) as helper:
            return call(helper.open)

    return await trio.to_thread.run_sync(outside)


@frozen
class _Helper:
    """A process in a namespace. Made by `_helper`."""

    pid: int
    channel: socket.socket

    def open(self, name: str) -> int:
        """A descriptor from inside."""
        self.channel.send(name.encode())
        reply, fds, _, _ = socket.recv_fds(self.channel, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        if reply != READY:
            raise HostError(f"it cannot be opened in a network namespace: {_words(reply)}", where=name)
        return fds[0]


@contextmanager
def _helper(*path: str) -> Iterator[_Helper]:
    """A process in the namespace at this path, or in one that it makes, until the block ends."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-S", str(netns_helper.__file__), *path]
    with theirs:
        process = subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True)
    with process, ours:  # once the connection is closed, the process ends and is waited for
        if (reply := ours.recv(4096)) != READY:
            what = f"join the network namespace {path[0]}" if path else "make a network namespace as an ordinary user"
            raise HostError(f"cannot {what}: {_words(reply)}", advice=_advice())
        yield _Helper(process.pid, ours)


def _words(reply: bytes) -> str:
    return reply.decode() or "the process inside has ended"


def _advice() -> str:
    """What forbids user namespaces here, and how to allow them."""
    found = [f"sysctl {name}={better}" for name, (bad, better) in _SWITCHES.items() if _sysctl(name) == bad]
    if found:
        return f"This host is set not to allow it. Root can change that: {'; '.join(found)}. Or run qsnap as root."
    return "Something forbids user namespaces here, such as the seccomp filter of a container. Run qsnap as root."


def _sysctl(name: str) -> str:
    path = Path("/proc/sys", *name.split("."))
    return path.read_text().strip() if path.exists() else ""
