"""The QMP conversation with one QEMU, for trio.

`qemu.qmp` is asyncio, so it runs inside a trio-asyncio loop (`open_loop`). Commands that belong to one stop phase
are sent back to back with `execute_all`: a round trip costs about a millisecond, and the VM is paused meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import trio
import trio_asyncio
from attrs import frozen
from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.protocol import StateError as QmpStateError
from qemu.qmp.qmp_client import NegotiationError

from qsnap.errors import QemuError
from qsnap.host.clock import place_stamp, steady_s
from qsnap.wire.qapi import ANSWERS, event_matches, matches

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what it would log is raised here as well

REFUSED_FOR_S = 1.0
DISCONNECT_S = 2.0
ANSWER_S = 60.0  #: a busy QEMU may be slow to answer; one that takes longer hangs
EVENTS_LIMIT = 100_000  #: of one session; QEMU limits the rate of those that a guest can cause
IGNORED = "MIGRATION_PASS"  #: a QEMU that is not held yet makes thousands of passes
_IGNORED_LINE = f'"event": "{IGNORED}"'.encode()  # in no string of another message, where quotes are escaped
Command = tuple[str, Mapping[str, object]]


class QmpError(QemuError):
    """QEMU answered a command with an error. `reason` is QEMU's own text."""

    def __init__(self, command: str, reason: str, *, vm: str) -> None:
        super().__init__(f"{command}: {reason}", where=f"VM {vm}")
        self.command = command
        self.reason = reason


class QemuGoneError(QemuError):
    """The connection ended: QEMU exited, was killed, closed its QMP socket, or sent something that is not QMP."""


@frozen
class QmpEvent:
    """An event as QEMU sent it; `instant_s` is QEMU's own time stamp, on the clock of `qsnap.host.clock`."""

    name: str
    data: Mapping[str, Any]
    instant_s: float


@asynccontextmanager
async def open_loop() -> AsyncIterator[None]:
    """An asyncio loop for everything inside; nothing is opened where one runs already."""
    if trio_asyncio.current_loop.get() is not None:
        yield
        return
    async with trio_asyncio.open_loop():
        yield


class _Client(QMPClient):
    """A client that a flood of passes does not keep from its other messages.

    Such an event is thrown away unread. The others are not spelt out for a log, as the base class does with each: that
    takes three times as long as to read them.
    """

    async def _do_recv(self) -> Message:
        while _IGNORED_LINE in (line := await self._readline()):
            pass
        return Message(line, eager=True)

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg


class Qmp:
    """A connected QMP session. Made by `open_qmp`."""

    def __init__(self, client: QMPClient, vm: str, answer_s: float) -> None:
        self.vm = vm
        self.events: list[QmpEvent] = []
        self._client = client
        self._answer_s = answer_s
        self._changed = trio.Event()
        self._ended_by_us = False

    @property
    def lost(self) -> bool:
        """Whether the connection has ended."""
        return self._client.runstate is not Runstate.RUNNING

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run one command and return its value.

        Raises QmpError, QemuGoneError when QEMU ends meanwhile, and QemuError when it does not answer, or not to the
        point.
        """
        (answer,) = await self.execute_all((command, arguments or {}))
        return answer

    async def execute_all(self, *commands: Command) -> list[Any]:
        """Send the commands back to back, and return their values in order.

        QEMU runs every command even if one before it fails; the first failure is raised when all have answered.
        """
        with deadline(self._answer_s, " and ".join(command for command, _ in commands), self.vm):
            answers: list[Any] = await trio_asyncio.aio_as_trio(self._gather)(commands)
        for (command, _), answer in zip(commands, answers, strict=True):
            if isinstance(answer, BaseException):
                raise self._translated(command, answer) from answer
            if command in ANSWERS and not matches(answer, ANSWERS[command]):
                raise self._senseless(command)
        return answers

    def _gone(self, when: str) -> QemuGoneError:
        what = "QEMU ended, or closed its QMP socket,"
        advice = "Is it dead? See `qsnap ps` and its qemu.log."
        if self._ended_by_us:
            what = "QEMU sent an event that makes no sense, or too many of them,"
            advice = "Is this QEMU's QMP socket?"
        return QemuGoneError(f"{what} {when}", where=f"VM {self.vm}", advice=advice)

    def _senseless(self, command: str) -> QemuError:
        return QemuError(f"QEMU's answer to {command} makes no sense", where=f"VM {self.vm}")

    async def _gather(self, commands: tuple[Command, ...]) -> list[Any]:
        # asyncio starts tasks in the order they were made, so the commands leave in order
        calls = (self._client.execute(command, arguments or None) for command, arguments in commands)
        return await asyncio.gather(*calls, return_exceptions=True)

    def _translated(self, command: str, error: BaseException) -> BaseException:
        match error:
            case ExecuteError():
                return QmpError(command, str(error), vm=self.vm)
            case ExecInterruptedError() | QmpStateError() | OSError() | EOFError():
                return self._gone(f"during {command}")
            case QMPError():
                return self._senseless(command)
        return error

    async def send_fd(self, name: str, fd: int, *then: Command) -> None:
        """Hand a copy of `fd` to QEMU, which knows it as `name` from then on (`getfd`); `then` is run right after."""
        try:
            await trio_asyncio.aio_as_trio(self._send_fd)(fd)
        except (OSError, QMPError) as error:
            raise self._gone("before it was given a file") from error
        await self.execute_all(("getfd", {"fdname": name}), *then)

    async def _send_fd(self, fd: int) -> None:
        self._client.send_fd_scm(fd)

    async def wait_event(self, matches: Callable[[QmpEvent], bool], *, since: int = 0) -> QmpEvent:
        """The first event from index `since` of `events` on that matches; waits for it if it is yet to come."""
        position = since
        while True:
            for event in self.events[position:]:
                if matches(event):
                    return event
            position = len(self.events)
            if self.lost:
                raise self._gone("meanwhile")
            await self._changed.wait()

    def _note(self, message: Mapping[str, Any]) -> bool:
        if not event_matches(message) or len(self.events) == EVENTS_LIMIT:
            self._ended_by_us = True
            raise QMPError("not an event, or one too many")  # ends the session
        if message["event"] == IGNORED:
            return False
        stamp = message["timestamp"]
        instant_s = place_stamp(
            stamp["seconds"] + stamp["microseconds"] / 1e6,
            wall_s=time.time(),
            now_s=steady_s(),
            earliest_s=self.events[-1].instant_s if self.events else 0.0,
        )
        self.events.append(QmpEvent(message["event"], message.get("data", {}), instant_s))
        self._wake()
        return False  # noted here: nothing is to be queued in the client

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _watch(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._wake()


@contextmanager
def deadline(seconds: float, step: str, vm: str) -> Iterator[None]:
    """Bound a step of the conversation. Raises QemuError that names it if QEMU takes longer."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        advice = "See its qemu.log; the machine may be overloaded."
        raise QemuError(f"no end of {step} in {seconds:.0f} s", where=f"VM {vm}", advice=advice) from error


@asynccontextmanager
async def open_qmp(path: str, *, vm: str, timeout_s: float = 10.0, answer_s: float = ANSWER_S) -> AsyncIterator[Qmp]:
    """Connect to the QMP socket at `path`. A socket that does not answer in time raises QemuGoneError.

    `answer_s` bounds every later answer.
    """
    client = _Client(vm)
    qmp = Qmp(client, vm, answer_s)
    client.events.event_filter = qmp._note
    try:
        with trio.fail_after(timeout_s):
            await _connect(client, path)
    except (trio.TooSlowError, QMPError, OSError, EOFError, AssertionError) as error:  # it asserts that it goes on
        await _disconnect(client)
        advice = "Is it dead? See `qsnap ps` and its qemu.log. Does another program hold the socket?"
        raise QemuGoneError(f"QEMU does not answer on {path} ({error})", where=f"VM {vm}", advice=advice) from error
    watch = trio_asyncio.current_loop.get().create_task(qmp._watch())
    try:
        yield qmp
    finally:
        watch.cancel()
        await _disconnect(client)


async def _disconnect(client: QMPClient) -> None:
    with trio.move_on_after(DISCONNECT_S, shield=True), suppress(Exception):  # QEMU may hang, or be gone
        await trio_asyncio.aio_as_trio(client.disconnect)()


async def _connect(client: QMPClient, path: str) -> None:
    """Connect; what may pass is believed only after a while.

    QEMU binds its socket a moment before it listens. And an event that the client before has left unread comes where
    the answer to the negotiation is expected.
    """
    patience = trio.current_time() + REFUSED_FOR_S
    while True:
        try:
            await trio_asyncio.aio_as_trio(client.connect)(path)
            return
        except ConnectError as error:
            if not isinstance(error.exc, ConnectionRefusedError | NegotiationError) or trio.current_time() > patience:
                raise
        await trio.sleep(0.001)
