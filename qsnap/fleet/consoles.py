"""Serial consoles of VMs on other hosts: bytes in both directions, over the connection to an agent."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from qsnap.errors import ProtocolError
from qsnap.fleet.channel import Connection, connect
from qsnap.fleet.identity import load_identity
from qsnap.fleet.remote import ask
from qsnap.host.console import connect as connect_console
from qsnap.host.console import stream_of
from qsnap.host.lifecycle import console_path
from qsnap.host.place import Place
from qsnap.host.tasks import one_error
from qsnap.model import Host
from qsnap.wire import messages as m

CAPABILITY = "console"
PIECE_BYTES = 1 << 16
FAREWELL_S = 1.0


@asynccontextmanager
async def open_remote_console(host: Host, vne: str, vm: str, place: Place) -> AsyncIterator[trio.SocketStream]:
    """A connection with the console of a VM on another host. Raises what the agent there raises."""
    async with connect(host, load_identity(place.identity)) as connection:
        if CAPABILITY not in connection.capabilities:
            raise ProtocolError(
                "its qsnap does not pass on consoles yet",
                where=f"host {host.name}",
                advice="Upgrade it, or use the console there.",
            )
        await ask(connection, m.OpenConsole(vne, vm), m.Done)
        ours, theirs = map(stream_of, socket.socketpair())
        with one_error():
            async with ours, trio.open_nursery() as nursery:
                nursery.start_soon(_pass_on, connection, theirs)
                yield ours
                await ours.aclose()  # which ends the other side too, unless it waits for a guest that takes nothing
                nursery.cancel_scope.deadline = trio.current_time() + FAREWELL_S


async def serve_console(connection: Connection, place: Place, message: m.OpenConsole) -> None:
    """Join the console of a VM to the connection until either side ends it."""
    console = connect_console(console_path(message.vne, message.vm, place=place), vm=message.vm)
    await connection.send(m.Done())
    with one_error():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.cancel_when_lost, nursery.cancel_scope)
            await _pass_on(connection, console)
            nursery.cancel_scope.cancel()


async def _pass_on(connection: Connection, stream: trio.SocketStream) -> None:
    """Pass on what comes, both ways. Who ends tells the other so by an empty frame, and that one ends too."""

    async def send() -> None:
        with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            while data := await stream.receive_some(PIECE_BYTES):
                await connection.send_data(data)
        await connection.send_data(b"")

    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while data := await connection.receive_data():
            with suppress(trio.BrokenResourceError):  # nobody takes it any more
                await stream.send_all(data)
        await stream.aclose()
