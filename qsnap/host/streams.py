"""What a migration stream comes through: a pipe, or a socket for a QEMU that is to be kept from its switchover."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress

PIPE_BYTES = (4 << 20, 1 << 20)  #: sizes to ask for; the second is what an ordinary user may have
SO_SNDBUFFORCE = 32  #: include/uapi/asm-generic/socket.h; not in the module `socket`
SOCKET_BYTES = 512 << 10  #: what QEMU may send ahead; without privileges it is less
#: MIG_RP_MSG_SHUT, 4 bytes long, 0 for "no error" (migration/migration.c): there will be no answers
SHUT = struct.pack(">HHI", 1, 4, 0)


def open_stream(*, held: bool) -> tuple[int, int]:
    """What to read, and the descriptor for QEMU.

    One that is to be `held` finds there what a destination would answer: nothing, for ever. So it does not wait for an
    end of that when the migration has ended, and never gets the acknowledgement that it may switch over.
    """
    if not held:
        return os.pipe()
    ours, theirs = socket.socketpair()
    ours.send(SHUT)
    widen_socket(theirs)
    return ours.detach(), theirs.detach()


def widen_pipe(stream_fd: int) -> None:
    """Let the kernel hold more of a pipe: the VM's last pages are then out of QEMU while we still write others."""
    for size in PIPE_BYTES:
        with suppress(OSError):
            fcntl.fcntl(stream_fd, fcntl.F_SETPIPE_SZ, size)
            return


def widen_socket(theirs: socket.socket) -> None:
    """Let QEMU send ahead of who reads. It is woken if it waits for room."""
    for option in (socket.SO_SNDBUF, SO_SNDBUFFORCE):
        with suppress(PermissionError):
            theirs.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)


def narrow_socket(theirs: socket.socket) -> None:
    """Let QEMU send next to nothing while nobody reads: as long as there is room for them, it makes passes."""
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
