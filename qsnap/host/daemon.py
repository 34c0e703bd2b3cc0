"""The snapshot daemon as its parent sees it: one `qsnap.host.receiver` process per VM, and its messages."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import trio
from attrs import define, field

from qsnap.errors import HostError, QemuError, QsnapError, StreamError
from qsnap.host.streams import open_stream
from qsnap.rules.convergence import PATIENCE

DISCARD_BYTES = 1 << 20
GIVE_WAY_S = 0.004  #: for each VM: it waits for `cont`, QEMU's main thread for a processor; the pipe has room meanwhile
MOST_GIVE_WAY_S = 0.032  #: a guest may wait for a page to be saved
STANDSTILL_S = 10.0  #: what has not come by then will not: no migration has taken the stream up, and it stays open


class Receiving(Protocol):
    """What takes in the stream of one VM. Each of these raises what it has failed with."""

    async def wait_ready(self) -> None:
        """Return once the stream is read."""

    async def wait_tracking(self) -> None:
        """Return once QEMU has saved its devices and tracks writes."""

    async def wait_done(self) -> dict[str, Any]:
        """What has come, once everything is in files."""

    async def read_to_end(self) -> None:
        """Take the rest of the stream and throw it away, so that QEMU is none the wiser."""


@define
class Daemon:
    """A running receiver. Made by `open_daemon` and `open_converter`."""

    where: str  #: the VM or the file that its stream comes from
    process: trio.Process
    status: trio.SocketStream
    on_bytes: Callable[[int], None]
    spare_fd: int | None = None  #: a second descriptor of the stream, so that it does not break when the process dies
    ready: trio.Event = field(factory=trio.Event)  #: it reads the stream from now on
    tracking: trio.Event = field(factory=trio.Event)  #: set at the first RAM record: QEMU tracks writes by now
    settled: trio.Event = field(factory=trio.Event)  #: set once, where QEMU is held
    diverged: bool = False
    ended: trio.Event = field(factory=trio.Event)
    listened: trio.Event = field(factory=trio.Event)  #: `listen` has ended, which reads its descriptors
    result: dict[str, Any] = field(factory=dict)
    failure: QsnapError | None = None
    _discarding: trio.Lock = field(factory=trio.Lock)

    async def wait_ready(self) -> None:
        """Return once the process reads its stream. Raises what ended it before that."""
        await self.ready.wait()
        if self.failure is not None:
            raise self.failure

    async def wait_tracking(self) -> None:
        """Return once QEMU has saved its devices and tracks writes. Raises what ended the daemon before that."""
        await self.tracking.wait()
        if self.failure is not None:
            raise self.failure

    async def wait_done(self) -> dict[str, Any]:
        """The daemon's last message, once everything is in its files. Raises what it failed with."""
        await self.ended.wait()
        if self.failure is not None:
            raise self.failure
        return self.result

    async def wait_settled(self) -> bool:
        """Return once QEMU, which is held, has little left to send; whether it came to that. For ever if it ends."""
        await self.settled.wait()
        return not self.diverged

    async def let_go(self) -> None:
        """Hold QEMU no more."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # it has died: `wait_done` says so
            await self.status.send_all(b".")

    async def read_to_end(self) -> None:
        """End the process, take the rest of its stream and throw it away, so that QEMU is none the wiser."""
        self.process.kill()
        await self.process.wait()
        await self._discard_rest()

    async def _discard_rest(self) -> None:
        if self.spare_fd is None:
            return
        async with self._discarding:
            with trio.CancelScope(shield=True):  # QEMU holds its locks while it waits for a reader
                while True:
                    with trio.move_on_after(STANDSTILL_S) as patience:
                        await trio.lowlevel.wait_readable(self.spare_fd)
                    if patience.cancelled_caught or not os.read(self.spare_fd, DISCARD_BYTES):
                        return

    async def listen(self) -> None:
        """Take in the daemon's messages until it ends, and what is left of its stream if that must not break."""
        try:
            await self._listen()
        finally:
            self.listened.set()

    async def _listen(self) -> None:
        buffer = b""
        try:
            while chunk := await self.status.receive_some(65536):
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it died, or is no longer needed: the same as an end without a result
        if not self.result and self.failure is None:
            await self.process.wait()
            how = "was killed" if self.process.returncode == -signal.SIGKILL else "ended"
            advice = "Is the host out of memory? See dmesg."
            self.failure = QemuError(f"the receiver {how} before the stream did", where=self.where, advice=advice)
        for event in (self.ready, self.tracking, self.ended):
            event.set()
        if self.failure is not None:
            await self._discard_rest()

    def _take(self, message: dict[str, Any]) -> None:
        match message["event"]:
            case "ready":
                self.ready.set()
            case "tracking":
                self.tracking.set()
            case "settled" | "diverged" as how:
                self.diverged = how == "diverged"
                self.settled.set()
            case "progress":
                self.on_bytes(message["bytes"])
            case "done":
                self.result = message
            case "error":
                self.failure = _failure(message, self.where)


def _failure(message: dict[str, Any], where: str) -> QsnapError:
    text = message["message"]
    match message["kind"]:
        case "stream":
            return StreamError(text, stream_offset=message["stream_offset"], where=where)
        case "space":
            return HostError(f"the store is full: {text}", where=where, advice="Remove snapshots: qsnap rm VNE NAME")
    return HostError(text, where=where, advice=message.get("advice", ""))


@asynccontextmanager
async def open_daemon(
    nursery: trio.Nursery,
    directory: Path,
    *,
    vm: str,
    backed: tuple[str, ...],
    ram_limit_bytes: int,
    keeps_reading: bool,
    heir: Sequence[str],
    on_bytes: Callable[[int], None],
    record_limit_bytes: int | None = None,
    vms: int = 1,
    held: bool = False,
    reserve_bytes: int = 0,
) -> AsyncIterator[tuple[Daemon, int]]:
    """Start a receiver for one VM that writes into `directory`, and yield it with the descriptor for QEMU.

    The caller closes its copy of that descriptor once QEMU has it. With `keeps_reading` the stream never breaks,
    whatever becomes of the receiver and of qsnap. Should qsnap die, the receiver starts the command `heir`. With
    `record_limit_bytes` the stream is kept as it comes, up to that size. A QEMU that is `held` waits when it has
    converged, until `let_go`. The receiver gives way to the cut of so many `vms`, and takes `reserve_bytes` of memory
    in advance for a `directory` on tmpfs. It is gone when this ends.
    """
    stream_in, stream_out = open_stream(held=held)
    give_way_s = str(min(vms * GIVE_WAY_S, MOST_GIVE_WAY_S))
    options = [
        *_options(directory, backed, ram_limit_bytes),
        *_last_words(keeps_reading, heir),
        *("--give-way", *(("0", give_way_s) if held else (give_way_s, "0"))),
        *("--reserve", str(reserve_bytes)),
        *(("--record-limit", str(record_limit_bytes)) if record_limit_bytes is not None else ()),
    ]
    qemu_fd = stream_out if held else None
    async with _start(nursery, stream_in, options, f"VM {vm}", on_bytes, keeps_reading, qemu_fd) as daemon:
        yield daemon, stream_out


@asynccontextmanager
async def open_stand_by(directory: Path, *, keeps_reading: bool, heir: Sequence[str]) -> AsyncIterator[tuple[int, int]]:
    """A pipe that is read here, as (what to read, the descriptor for QEMU), and a process that stands by.

    Should qsnap die, the process does what a receiver into `directory` does then.
    """
    stream_in, stream_out = os.pipe()
    ours, theirs = socket.socketpair()
    words = ["--stand-by", *_last_words(keeps_reading, heir), *_options(directory, (), 0)]
    try:
        process = await _spawn(stream_in, theirs, words)
    except BaseException:
        os.close(stream_in)
        os.close(stream_out)
        ours.close()
        raise
    try:
        yield stream_in, stream_out
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        ours.close()
        os.close(stream_in)


@asynccontextmanager
async def open_converter(
    nursery: trio.Nursery,
    directory: Path,
    stream: Path,
    *,
    backed: tuple[str, ...],
    ram_limit_bytes: int,
    on_bytes: Callable[[int], None],
) -> AsyncIterator[Daemon]:
    """Start a receiver that reads a recorded stream, and writes into `directory`. It is gone when this ends."""
    options = _options(directory, backed, ram_limit_bytes)
    stream_in = os.open(stream, os.O_RDONLY | os.O_CLOEXEC)
    async with _start(nursery, stream_in, options, str(stream), on_bytes, keeps_reading=False) as daemon:
        yield daemon


def _environment() -> dict[str, str]:
    """Ours, less the threads that numpy would start for linear algebra: they take the processor from the VMs."""
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1"}


def _last_words(keeps_reading: bool, heir: Sequence[str]) -> list[str]:
    """What a receiver is to do if its parent dies."""
    return [*(("--keep-reading",) if keeps_reading else ()), "--heir", json.dumps(heir)]


def _options(directory: Path, backed: tuple[str, ...], ram_limit_bytes: int) -> list[str]:
    blocks = [word for idstr in backed for word in ("--backed", idstr)]
    return ["--directory", str(directory), "--ram-limit", str(ram_limit_bytes), *blocks]


async def _spawn(stream_in: int, status: socket.socket, options: list[str], qemu_fd: int | None = None) -> trio.Process:
    """The process, which is given the descriptors of the stream and `status`; the latter is closed here."""
    fds = [stream_in, status.fileno()]
    if qemu_fd is not None:
        fds.append(qemu_fd)
        options = [*options, "--hold", str(qemu_fd), "--patience", str(PATIENCE)]
    command = [sys.executable, "-m", "qsnap.host.receiver", "--stream", str(stream_in), "--status", str(fds[1])]
    with status:
        # in a session of its own: Ctrl-C is for qsnap to deal with, which ends this process in due course
        return await trio.lowlevel.open_process(
            [*command, *options], pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True, env=_environment()
        )


@asynccontextmanager
async def _start(
    nursery: trio.Nursery,
    stream_in: int,
    options: list[str],
    where: str,
    on_bytes: Callable[[int], None],
    keeps_reading: bool,
    qemu_fd: int | None = None,
) -> AsyncIterator[Daemon]:
    """The process, which takes over `stream_in`."""
    ours, theirs = socket.socketpair()
    try:
        process = await _spawn(stream_in, theirs, options, qemu_fd)
    finally:
        spare_fd = os.dup(stream_in) if keeps_reading else None  # one open pipe: both see what the other leaves
        os.close(stream_in)
    daemon = Daemon(where, process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)), on_bytes, spare_fd)
    nursery.start_soon(daemon.listen)
    try:
        yield daemon
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await daemon.status.aclose()
            await daemon.listened.wait()
        if spare_fd is not None:
            os.close(spare_fd)
