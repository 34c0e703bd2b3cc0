"""A VM's serial console on the terminal of this process, or on whatever its input and output are."""

from __future__ import annotations

import os
import select
import socket
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

import trio
from attrs import define, field

from qsnap.errors import BusyError, StateError

LEAVE = b"\x1d"  #: Ctrl-]
CHUNK_BYTES = 65536
QUIET_S = 1.0  #: after the end of the input, a console that says nothing for so long has answered
_CONNECTED = "03"  #: SS_CONNECTED (linux/net.h), of a connection that QEMU has accepted


class End(Enum):
    """Why a console session ended."""

    LEFT = "left"  #: the user typed `LEAVE`
    CLOSED = "closed"  #: the VM ended
    QUIET = "quiet"  #: the input ended, and the console had no more to say


def connect(path: str, *, vm: str) -> trio.SocketStream:
    """A connection with the console socket at `path`.

    Raises StateError if the VM does not listen, BusyError if somebody else is connected.
    """
    if is_taken(path):
        raise BusyError(
            "somebody else is connected to its console", where=f"VM {vm}", advice="QEMU serves one at a time."
        )
    console = socket.socket(socket.AF_UNIX)
    try:
        console.connect(path)
    except OSError as error:
        console.close()
        raise StateError(
            f"its console does not answer: {error.strerror}", where=f"VM {vm}", advice="See `qsnap ps`."
        ) from error
    return stream_of(console)


def stream_of(end: socket.socket) -> trio.SocketStream:
    """The same connection for trio; `end` itself is closed."""
    return trio.SocketStream(trio.socket.from_stdlib_socket(end))


async def use(console: trio.SocketStream, *, stdin: int = 0, stdout: int = 1) -> End:
    """Join a connection with a console to two descriptors until one side ends it.

    A terminal is put into raw mode meanwhile, so that every key reaches the guest, except `LEAVE`.
    """
    end = socket.fromfd(console.socket.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)
    with raw_terminal(stdin) as interactive:
        session = _Session(end, stdin, stdout, leave=LEAVE if interactive else b"")
        try:
            return await trio.to_thread.run_sync(session.run, abandon_on_cancel=True)
        except trio.Cancelled:
            end.shutdown(socket.SHUT_RDWR)  # by which the thread ends
            raise


def is_taken(path: str) -> bool:
    """Whether QEMU has accepted a connection on its socket at `path`: until that ends, nobody else is served.

    The kernel counts the accepted end to the namespace of the client: one in another namespace is not seen.
    """
    rows = (line.split(maxsplit=7) for line in Path("/proc/self/net/unix").read_text().splitlines()[1:])
    return any(row[5] == _CONNECTED and row[7:] == [path] for row in rows)


@contextmanager
def raw_terminal(fd: int) -> Iterator[bool]:
    """Raw mode for a terminal, undone whatever happens. Yields whether `fd` is one."""
    if not os.isatty(fd):
        yield False
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield True
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@define
class _Session:
    """Bytes on their way in both directions. `typed` are those that the VM has not taken yet."""

    console: socket.socket
    stdin: int
    stdout: int
    leave: bytes
    typed: bytearray = field(factory=bytearray)
    input_open: bool = True

    def run(self) -> End:
        """Copy until one side ends, and close this end of the connection."""
        with self.console:
            return self._copy()

    def _copy(self) -> End:
        socket_fd = self.console.fileno()
        while True:
            sources = [socket_fd, self.stdin] if self.input_open and len(self.typed) < CHUNK_BYTES else [socket_fd]
            sinks = [socket_fd] if self.typed else []
            readable, writable, _ = select.select(sources, sinks, [], None if self.input_open else QUIET_S)
            if not readable and not writable:
                return End.QUIET
            if self.stdin in readable and self._take_input():
                return End.LEFT
            if self.typed and not self._send():
                return End.CLOSED
            if socket_fd in readable and not self._show_output():
                return End.CLOSED

    def _take_input(self) -> bool:
        """Read what was typed; whether the user leaves."""
        data = b""
        with suppress(OSError):  # EIO: the terminal is gone
            data = os.read(self.stdin, CHUNK_BYTES)
        self.input_open = bool(data)
        before, leave, _ = data.partition(self.leave) if self.leave else (data, b"", b"")
        self.typed += before
        if leave:
            self._send()
        return bool(leave)

    def _send(self) -> bool:
        """Give the VM as much as it takes now; whether it is still there."""
        try:
            del self.typed[: self.console.send(self.typed)]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def _show_output(self) -> bool:
        """Write what the VM said; whether it is still there."""
        try:
            data = self.console.recv(CHUNK_BYTES)
        except ConnectionError:
            return False
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.stdout, rest) :]
        return bool(data)
