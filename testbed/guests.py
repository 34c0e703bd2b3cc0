"""Talking to a test guest over its serial console, a unix socket that QEMU listens on.

Kernel messages, half a line from before a snapshot and answers that nobody waited for may all be on the wire.
So every command carries a tag, an answer is the line that brings the tag back, and all else is only kept.
"""

from __future__ import annotations

import json
import math
from collections import deque
from itertools import count
from types import TracebackType
from typing import Any
from uuid import uuid4

import trio

from testbed.state import GuestState

OPTIONS = frozenset({"net", "dirty_mb", "rate_mb", "udp", "tcp", "tcp_kbps", "work"})
#: No messages between the answers; no huge pages, whose making leaves stale copies behind; 0.2 s less to boot; QEMU
#: ends when the kernel panics. And no test of the timer, which where processors are few fails now and then.
KERNEL_OPTIONS = "console=ttyS0 quiet loglevel=1 transparent_hugepage=never no_timer_check nokaslr panic=-1"
POLL_S = 0.1
LOG_LINES = 1000


class GuestConsoleError(Exception):
    """The console closed, or the guest refused a command. `log` has the last lines it printed."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(f"{message}; the console's last lines:\n{log}")
        self.log = log


def kernel_append(id: int, peers: int, **options: int | str) -> str:
    """The kernel command line of guest `id` of `peers`; `options` are those of `OPTIONS`."""
    unknown = options.keys() - OPTIONS
    if unknown:
        raise ValueError(f"unknown guest option {sorted(unknown)[0]!r}: known are {sorted(OPTIONS)}")
    settings = {"id": id, "peers": peers, **options}
    return " ".join([KERNEL_OPTIONS, *(f"qsnap.{name}={value}" for name, value in settings.items())])


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The answer in a console line, or None: answers begin with `@` and are a JSON object."""
    if not line.startswith(b"@"):
        return None
    try:
        answer = json.loads(line[1:])
    except ValueError:
        return None  # cut in two by a kernel message
    return answer if isinstance(answer, dict) else None


class GuestConsole:
    """A connection to one guest's console: made at the first command, closed by `aclose` or `async with`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.log: deque[str] = deque(maxlen=LOG_LINES)  #: every line that came, newest last
        self.events: deque[dict[str, Any]] = deque(maxlen=LOG_LINES)  #: lines that were no answer: ready, errors
        self._stream: trio.SocketStream | None = None
        self._partial = b""
        self._lines: deque[bytes] = deque()
        self._tags = (f"{uuid4().hex[:8]}-{n}" for n in count())
        self._lock = trio.Lock()

    async def __aenter__(self) -> GuestConsole:
        await self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; the guest does not notice."""
        if self._stream is not None:
            await self._stream.aclose()
            self._stream, self._partial = None, b""
            self._lines.clear()

    async def command(self, line: str) -> dict[str, Any]:
        """Send one command and wait for its answer, for as long as the caller's cancel scope allows.

        Can be cancelled at any point: a late answer is told from the next one by its tag.
        """
        async with self._lock:
            tag = next(self._tags)
            await self._send(line, tag)
            answer = await self._answer(tag)
        if "error" in answer:
            raise GuestConsoleError(f"{line!r}: {answer['error']}", self.tail())
        return answer

    async def status(self) -> GuestState:
        """The guest's counters, at once."""
        return GuestState.from_json((await self.command("status"))["status"])

    async def finish(self) -> GuestState:
        """End the streams and wait until they were compared. Tell all guests at once, or they wait."""
        return GuestState.from_json((await self.command("finish"))["finished"])

    async def wait_ready(self, deadline: float) -> GuestState:
        """Wait until traffic has started with all peers; trio.TooSlowError at `deadline` (of trio's clock).

        Asks again and again, under one tag: what is sent while the kernel boots is lost, and so is a line of
        the guest's that nobody was there to read.
        """
        tag = next(self._tags)
        with trio.fail_at(deadline):
            async with self._lock:
                while True:
                    with trio.move_on_after(POLL_S):
                        await self._send("status", tag)
                        while True:
                            status = (await self._answer(tag)).get("status")  # none if the command was mangled
                            if status and status["ready"]:
                                return GuestState.from_json(status)

    async def boot(self) -> str:
        """The number that the guest makes up once in its life; it may be still booting."""
        return f"{(await self.wait_ready(math.inf)).nonce:016x}"

    def tail(self, lines: int = 20) -> str:
        """The last lines of the console, for an error report."""
        return "\n".join(list(self.log)[-lines:])

    async def _connect(self) -> trio.SocketStream:
        while self._stream is None:
            try:
                self._stream = await trio.open_unix_socket(self.path)
            except (FileNotFoundError, ConnectionRefusedError):  # QEMU has not come that far
                await trio.sleep(POLL_S / 10)
        return self._stream

    async def _send(self, line: str, tag: str) -> None:
        stream = await self._connect()
        # The newline first ends whatever an abandoned command left in the guest's line buffer.
        await stream.send_all(f"\n{line} #{tag}\n".encode())

    async def _answer(self, tag: str) -> dict[str, Any]:
        while True:
            answer = parse_line(await self._line())
            if answer is None:
                continue
            if answer.get("tag") == tag:
                return answer
            if "tag" not in answer:
                self.events.append(answer)

    async def _line(self) -> bytes:
        assert self._stream is not None
        while not self._lines:
            data = await self._stream.receive_some(65536)
            if not data:
                raise GuestConsoleError(f"{self.path}: closed by QEMU", self.tail())
            *whole, self._partial = (self._partial + data).split(b"\n")
            self._lines.extend(line.strip(b"\r") for line in whole)
            self.log.extend(line.decode(errors="replace") for line in whole if line.strip())
        return self._lines.popleft()
