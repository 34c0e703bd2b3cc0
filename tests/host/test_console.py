"""A console session on a terminal: every key reaches the guest, Ctrl-] leaves, and the terminal is as before."""

from __future__ import annotations

import os
import socket
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from attrs import frozen

from qsnap.errors import StateError
from qsnap.host.console import End, connect, use


@frozen
class Seat:
    """A terminal (`keys` is where a user types), the console's listener, and where the session's end is told."""

    keys: int
    terminal: int
    listener: socket.socket
    ends: list[End | BaseException]

    def sit(self) -> threading.Thread:
        """Begin a session in a thread."""
        thread = threading.Thread(target=self._attach)
        thread.start()
        return thread

    def _attach(self) -> None:
        path = self.listener.getsockname()
        try:
            self.ends.append(trio.run(self._use, path))
        except BaseException as error:
            self.ends.append(error)

    async def _use(self, path: str) -> End:
        async with connect(path, vm="alice") as console:
            return await use(console, stdin=self.terminal, stdout=self.terminal)


@pytest.fixture
def seat(tmp_path: Path) -> Iterator[Seat]:
    keys, terminal = os.openpty()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "console.sock"))
        listener.listen()
        listener.settimeout(30)
        yield Seat(keys, terminal, listener, [])
    os.close(keys)
    os.close(terminal)


def test_keys_reach_the_guest_and_the_terminal_is_restored(seat: Seat) -> None:
    before = termios.tcgetattr(seat.terminal)
    thread = seat.sit()
    connection, _ = seat.listener.accept()
    with connection:
        connection.sendall(b"login: ")
        assert os.read(seat.keys, 7) == b"login: "  # the session is under way: the terminal is raw by now
        os.write(seat.keys, b"\x03root\r")
        assert connection.recv(6, socket.MSG_WAITALL) == b"\x03root\r"
        os.write(seat.keys, b"x\x1dy")
        thread.join(30)
        assert connection.recv(10) == b"x"
    assert seat.ends == [End.LEFT]
    assert termios.tcgetattr(seat.terminal) == before


def test_a_guest_that_takes_nothing_can_still_be_left(seat: Seat) -> None:
    thread = seat.sit()
    connection, _ = seat.listener.accept()
    with connection:
        connection.sendall(b"$")
        os.read(seat.keys, 1)
        for _ in range(40):
            os.write(seat.keys, b"x" * 1000)
        os.write(seat.keys, b"\x1d")
        thread.join(30)
    assert seat.ends == [End.LEFT]


def test_the_vm_ends(seat: Seat) -> None:
    before = termios.tcgetattr(seat.terminal)
    thread = seat.sit()
    seat.listener.accept()[0].close()
    thread.join(30)
    assert seat.ends == [End.CLOSED]
    assert termios.tcgetattr(seat.terminal) == before


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="its console does not answer"):
        connect(str(tmp_path / "console.sock"), vm="alice")
