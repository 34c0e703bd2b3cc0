"""Commands in a guest with real programs (`scripts/images`), over a virtio serial port and no network of the VNE.

A command is sent under a tag, which the guest knows again. So when the connection ends, as it does where a VM is ended
and restored, the same command is sent once more on the next one, and is still run once in each life of the guest.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable
from functools import partial
from types import TracebackType
from uuid import uuid4

import trio
from attrs import frozen

from testbed.tasks import together

PORT = "agent"
POLL_S = 0.05
ASK_AGAIN_S = 2.0  #: a line that came to a guest that was booting, or to one that was ended then, is lost
BOOT_S = 120.0
GRACE_S = 20.0  #: what a guest that is short of processor time may take beyond a command's own time


class GuestShellError(Exception):
    """A command that failed or took too long in a guest: what it was, and what it said."""


@frozen
class Completed:
    """A command that has ended. `status` is 124 where its time was up."""

    status: int
    out: str
    err: str


def port_arguments(socket: str) -> tuple[str, ...]:
    """QEMU's arguments for a port that is a unix socket on the host; for `extra` in a description."""
    path = socket.replace(",", ",,")
    return (
        "-chardev",
        f"socket,id={PORT},path={path},server=on,wait=off",
        "-device",
        "virtio-serial-pci",
        "-device",
        f"virtserialport,chardev={PORT},name={PORT}",
    )


def encode_command(tag: str, command: str, limit_s: float) -> bytes:
    """The line that has a guest run a command. The newline first ends what an abandoned one left."""
    return f"\n{tag} {limit_s:g} {b64encode(command.encode()).decode()} .\n".encode()


def parse_answer(line: bytes, tag: str) -> Completed | None:
    """The answer to `tag`, or None: another one, or a piece of one."""
    words = line.split()
    if len(words) != 5 or words[0] != tag.encode() or words[4] != b".":
        return None
    out, err = (b64decode(word[1:]).decode(errors="replace") for word in words[2:4])
    return Completed(int(words[1]), out, err)


class GuestShell:
    """Root in one guest. One command at a time; what is to go on meanwhile is started with `&` and looked at later."""

    def __init__(self, name: str, socket: str) -> None:
        self.name = name
        self.socket = socket
        self._stream: trio.SocketStream | None = None
        self._received = b""
        self._lock = trio.Lock()

    async def __aenter__(self) -> GuestShell:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; what runs in the guest runs on."""
        if self._stream is not None:
            await self._stream.aclose()
            self._stream, self._received = None, b""

    async def run(self, command: str, *, limit_s: float = 60.0) -> str:
        """What a command prints, without space around it. Raises GuestShellError where it fails."""
        done = await self.complete(command, limit_s=limit_s)
        if done.status:
            why = f"was not done after {limit_s:g} s" if done.status == 124 else f"ended with {done.status}"
            raise GuestShellError(f"{self.name}: `{command}` {why}: {(done.out + done.err).strip() or 'no output'}")
        return done.out.strip()

    async def complete(self, command: str, *, limit_s: float = 60.0) -> Completed:
        """Run a command with bash, and wait until it has ended: GuestShellError where the guest does not answer."""
        tag = uuid4().hex[:12]
        line = encode_command(tag, command, limit_s)
        with trio.move_on_after(limit_s + GRACE_S):
            async with self._lock:
                while True:
                    try:
                        return await self._ask(tag, line)
                    except (trio.BrokenResourceError, trio.EndOfChannel):
                        await self.aclose()
        raise GuestShellError(f"{self.name}: does not answer on {self.socket} after `{command}`")

    async def boot(self) -> str:
        """The number that the guest's kernel makes up once in its life; it may be still booting."""
        return await self.run("cat /proc/sys/kernel/random/boot_id", limit_s=BOOT_S)

    async def _ask(self, tag: str, line: bytes) -> Completed:
        stream = await self._connected()
        while True:
            await stream.send_all(line)
            with trio.move_on_after(ASK_AGAIN_S):
                return await self._answer(stream, tag)

    async def _answer(self, stream: trio.SocketStream, tag: str) -> Completed:
        while True:
            while b"\n" not in self._received:
                data = await stream.receive_some(65536)
                if not data:
                    raise trio.EndOfChannel
                self._received += data
            line, _, self._received = self._received.partition(b"\n")
            answer = parse_answer(line, tag)
            if answer is not None:
                return answer

    async def _connected(self) -> trio.SocketStream:
        while self._stream is None:
            try:
                self._stream = await trio.open_unix_socket(self.socket)
            except (FileNotFoundError, ConnectionRefusedError):  # QEMU has not come that far, or is gone
                await trio.sleep(POLL_S)
        return self._stream


async def run_everywhere(shells: Iterable[GuestShell], command: str, *, limit_s: float = 60.0) -> list[str]:
    """The same command in several guests side by side; what they print, in order."""
    return await together(partial(shell.run, command, limit_s=limit_s) for shell in shells)
