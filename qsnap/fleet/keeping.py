"""The stream of a VM from the host where it runs to the one that keeps its state: both ends of that connection."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio
from attrs import define, field

from qsnap.errors import ConnectionLostError, ProtocolError, QsnapError
from qsnap.fleet.channel import Connection, connect
from qsnap.fleet.identity import Identity, load_identity
from qsnap.host.daemon import open_stand_by
from qsnap.host.keeping import Keeping, KeptVM
from qsnap.host.place import Place
from qsnap.host.tasks import one_error
from qsnap.model import Host, StateFiles, VMSnapshot
from qsnap.wire import messages as m
from qsnap.wire.frames import LIMITS_BYTES, FrameKind

READ_BYTES = LIMITS_BYTES[FrameKind.DATA]


@define
class RemoteKeeper:
    """The daemon on another host that a VM's stream goes to. Made by `open_keeper`.

    Whatever becomes of it, QEMU's stream is read on: QEMU cannot cancel a migration while it waits for a reader.
    """

    host: Host
    on_bytes: Callable[[int], None]
    stream_fd: int
    ready: trio.Event = field(factory=trio.Event)
    tracking: trio.Event = field(factory=trio.Event)
    received: trio.Event = field(factory=trio.Event)
    kept: trio.Event = field(factory=trio.Event)
    held: trio.Event = field(factory=trio.Event)
    drained: trio.Event = field(factory=trio.Event)  #: QEMU has closed the stream
    ended: trio.Event = field(factory=trio.Event)
    life: trio.CancelScope = field(factory=partial(trio.CancelScope, shield=True))
    connection: Connection | None = None
    receipt: dict[str, Any] = field(factory=dict)
    files: StateFiles | None = None
    failure: QsnapError | None = None

    async def wait_ready(self) -> None:
        """Return once the other host reads the stream. This and the others raise what it has failed with."""
        await self._wait(self.ready)

    async def wait_tracking(self) -> None:
        """Return once the first RAM record has come there."""
        await self._wait(self.tracking)

    async def wait_done(self) -> dict[str, Any]:
        """What has come, once it is in files there."""
        await self._wait(self.received)
        return self.receipt

    async def wait_files(self) -> StateFiles:
        """The files, once they are durable."""
        await self._wait(self.kept)
        assert self.files is not None
        return self.files

    async def hold(self, vm: VMSnapshot) -> None:
        """Have it keep this of the VM if the snapshot is committed."""
        if self.failure is None and self.connection is not None:
            await self.connection.send(m.Hold(vm))
        await self._wait(self.held)

    async def read_to_end(self) -> None:
        """Throw away the rest of the stream, until QEMU closes it."""
        self._fail(ConnectionLostError("the snapshot is undone", where=f"host {self.host.name}"))
        await self.drained.wait()

    async def _wait(self, event: trio.Event) -> None:
        await event.wait()
        if self.failure is not None:
            raise self.failure

    async def run(self, identity: Identity, message: m.Keep) -> None:
        """Be the other end until all is held, the connection is lost, or `life` is cancelled."""
        try:
            with self.life:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump)
                    try:
                        async with connect(self.host, identity) as self.connection:
                            await self._converse(self.connection, message)
                    except QsnapError as error:
                        self._fail(error)
        finally:
            self.ended.set()

    async def _pump(self) -> None:
        await self.ready.wait()
        while True:
            await trio.lowlevel.wait_readable(self.stream_fd)
            data = os.read(self.stream_fd, READ_BYTES)
            if self.failure is None and self.connection is not None:
                try:
                    await self.connection.send_data(data)
                except QsnapError as error:
                    self._fail(error)
            if not data:
                self.drained.set()
                return

    async def _converse(self, connection: Connection, message: m.Keep) -> None:
        try:
            await connection.send(message)
            await self._listen(connection)
        except QsnapError as error:
            self._fail(error)  # before the connection is closed, which fails the pump

    async def _listen(self, connection: Connection) -> None:
        while not self.held.is_set():
            match await connection.receive():
                case m.Keeping("ready"):
                    self.ready.set()
                case m.Keeping("tracking"):
                    self.tracking.set()
                case m.Keeping("progress", stream_bytes):
                    self.on_bytes(stream_bytes)
                case m.Received(ram_bytes, data_pages):
                    self.receipt = {"ram_bytes": ram_bytes, "data_pages": data_pages}
                    self.received.set()
                case m.Kept(files):
                    self.files = files
                    self.kept.set()
                case m.Done():
                    self.held.set()
                case other:
                    raise ProtocolError(f"{type(other).__name__} is not expected now")

    def _fail(self, error: QsnapError) -> None:
        """Let everybody who waits know what went wrong: the first thing that did."""
        if self.failure is None and not self.held.is_set():
            here = f"host {self.host.name}"
            if not error.where.startswith(here):
                error.where = ", ".join(filter(None, (here, error.where)))
            self.failure = error
            for event in (self.ready, self.tracking, self.received, self.kept, self.held):
                event.set()


@asynccontextmanager
async def open_keeper(
    place: Place,
    nursery: trio.Nursery,
    host: Host,
    message: m.Keep,
    directory: Path,
    *,
    keeps_reading: bool,
    heir: Sequence[str],
    on_bytes: Callable[[int], None],
) -> AsyncIterator[tuple[RemoteKeeper, int]]:
    """A daemon on another host, with the descriptor for QEMU.

    A process here stands by for the death of this one; `directory` tells whoever looks for it what it belongs to.
    """
    identity = load_identity(place.identity)
    async with open_stand_by(directory, keeps_reading=keeps_reading, heir=heir) as (stream_in, stream_out):
        keeper = RemoteKeeper(host, on_bytes, stream_in)
        nursery.start_soon(keeper.run, identity, message)
        try:
            yield keeper, stream_out
        finally:
            keeper.life.cancel()
            with trio.CancelScope(shield=True):
                await keeper.ended.wait()


async def keep(connection: Connection, keeping: Keeping, message: m.Keep) -> None:
    """Take in the stream of another host's VM, and keep what that host says of it."""
    reports, progress = trio.open_memory_channel[int](4)

    def on_bytes(done: int) -> None:
        with suppress(trio.WouldBlock):
            reports.send_nowait(done)

    async with keeping.open(message, connection.peer.name, on_bytes) as kept:
        with one_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pour, connection, kept)
                nursery.start_soon(_tell, connection, kept, progress)
                receipt = await kept.daemon.wait_done()
                reports.close()
                await connection.send(m.Received(receipt["ram_bytes"], receipt.get("data_pages", 0)))
                files = await keeping.seal(kept, receipt)
        await connection.send(m.Kept(files))
        match await connection.receive():
            case m.Hold(vm):
                keeping.hold(kept, vm)
            case other:
                raise ProtocolError(f"{type(other).__name__} is not expected now")
    await connection.send(m.Done())


async def _pour(connection: Connection, kept: KeptVM) -> None:
    """Give the daemon what comes; what comes when it has ended is not needed."""
    async with kept.inlet:
        while data := await connection.receive_data():
            with suppress(trio.BrokenResourceError):
                await kept.inlet.send_all(data)


async def _tell(connection: Connection, kept: KeptVM, progress: trio.MemoryReceiveChannel[int]) -> None:
    """Tell the other host how far it has come. A message that was begun is sent: an error may be next."""
    await kept.daemon.wait_ready()
    await _send_whole(connection, m.Keeping("ready"))
    await kept.daemon.wait_tracking()
    await _send_whole(connection, m.Keeping("tracking"))
    async for done in progress:
        await _send_whole(connection, m.Keeping("progress", done))


async def _send_whole(connection: Connection, message: m.Message) -> None:
    with trio.CancelScope(shield=True):
        await connection.send(message)
