"""Run as a program: joins a network namespace, or makes one for an ordinary user, and opens there what it is asked for.

No process with threads can join a user namespace, so qsnap stays outside and has this program go in. Its standard
input is a socket: the program says `READY`, or else what went wrong, and answers each name of something to open with
a descriptor. It ends with the connection. The standard library is all it needs; started with -I -S it takes 17 ms.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import sys

NETLINK = "netlink"
TUN = "/dev/net/tun"
READY = b"ready"
NAME_BYTES = 64

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
_NS_GET_USERNS = 0xB701  # linux/nsfs.h
_libc = ctypes.CDLL(None, use_errno=True)


def open_here(name: str) -> int:
    """A netlink socket, or the device that taps are made with, of the network namespace that this thread is in."""
    if name == NETLINK:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE).detach()
    return os.open(name, os.O_RDWR | os.O_CLOEXEC)


def turn_off_ipv6() -> None:
    """Bridges and links must not speak by themselves."""
    for scope in ("all", "default"):
        path = f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"
        if os.path.exists(path):
            _write(path, "1")


def _make() -> None:
    """A user namespace that the user is root of, and a network namespace that belongs to it."""
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNET))
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1")
    _write("/proc/self/gid_map", f"0 {gid} 1")
    turn_off_ipv6()


def _join(path: str) -> None:
    net = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    owner = fcntl.ioctl(net, _NS_GET_USERNS)
    _check(_libc.setns(owner, CLONE_NEWUSER))
    _check(_libc.setns(net, CLONE_NEWNET))


def _check(failed: int) -> None:
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _serve(channel: socket.socket, path: str = "") -> None:
    try:
        _join(path) if path else _make()
        channel.send(READY)
        while name := channel.recv(NAME_BYTES).decode():
            fd = open_here(name)
            socket.send_fds(channel, [READY], [fd])
            os.close(fd)
    except OSError as error:
        channel.send((error.strerror or str(error)).encode())


if __name__ == "__main__":
    _serve(socket.socket(fileno=0), *sys.argv[1:])
