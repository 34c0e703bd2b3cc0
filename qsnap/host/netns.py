"""Running code inside a named network namespace, without the rest of the process following it there.

A network namespace belongs to a thread, so each call runs in a worker thread that enters it and comes back.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import trio
from pyroute2 import netns

from qsnap.errors import HostError

T = TypeVar("T")


def netns_path(name: str) -> str:
    """Where a namespace of this name is mounted, so that `ip netns exec NAME` finds it too; a path is one already."""
    return os.path.join(netns.NETNS_RUN_DIR, name)


async def create_netns(name: str) -> None:
    """Make the namespace. IPv6 is off in it: bridges must not speak by themselves."""
    try:
        await trio.to_thread.run_sync(netns.create, name)
        await run_in_netns(name, _without_ipv6)
    except OSError as error:
        raise HostError(
            f"cannot make the network namespace {name}: {error.strerror}",
            advice="Run qsnap as root; it needs CAP_SYS_ADMIN and CAP_NET_ADMIN.",
        ) from error


def _without_ipv6() -> None:
    for scope in ("all", "default"):
        path = f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"
        if os.path.exists(path):
            with open(path, "w") as file:
                file.write("1")


async def remove_netns(name: str) -> None:
    """Remove the namespace with all its links, if it is there."""

    def remove() -> None:
        if os.path.exists(netns_path(name)):
            netns.remove(name)

    await trio.to_thread.run_sync(remove)


async def run_in_netns(name: str, call: Callable[[], T]) -> T:
    """Run the blocking `call` in a worker thread inside the namespace. It can be neither cancelled nor abandoned."""

    def inside() -> T:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            netns.setns(netns_path(name), flags=0)
            try:
                return call()
            finally:
                netns.setns(home, flags=0)
        finally:
            os.close(home)

    return await trio.to_thread.run_sync(inside)
