"""Connections between hosts: TLS over TCP, messages and data in frames, and heartbeats.

Each side is silent for no longer than HEARTBEAT_S; one that hears nothing for LOST_S takes the other for gone.
`docs/protocol.md` has it all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path

import trio
from attrs import define, field

from qsnap.errors import ConnectionLostError, HostError, IdentityError, ProtocolError, QsnapError
from qsnap.fleet.identity import Identity, Peer, adopt_crl, load_identity, peer_of
from qsnap.fleet.tls import FAREWELL_S, certificate_of, secure, translated
from qsnap.host.tasks import one_error
from qsnap.model import Host
from qsnap.wire.frames import Frame, FrameKind, FrameReader, PartJoiner, encode_frame, split_message
from qsnap.wire.messages import (
    CAPABILITIES,
    VERSION,
    Hello,
    Message,
    Ping,
    Refused,
    Welcome,
    check_version,
    decode_message,
    encode_message,
)

HEARTBEAT_S = 1.0
LOST_S = 5.0
HANDSHAKE_S = 5.0
CONNECTIONS = 64  #: with hosts that a server has at once
STRANGERS = 64  #: connections that have not shown yet who they are; the oldest makes room for one more
QUEUE_FRAMES = 4  #: that have come and nobody has asked for; then the other side has to wait

Handler = Callable[["Connection"], Awaitable[None]]
TlsStream = trio.SSLStream[trio.SocketStream]
log = logging.getLogger(__name__)


class Connection:
    """A connection to another host. Made by `connect` and `serve`, and closed by them.

    Attributes:
        peer: the host at the other end.
        capabilities: what both sides can do.
    """

    def __init__(self, stream: trio.abc.Stream, peer: Peer) -> None:
        self.peer = peer
        self.capabilities: frozenset[str] = frozenset()
        self._stream = stream
        self._sending = trio.Lock()
        self._last_sent_s = trio.current_time()
        self._arrived, self._incoming = trio.open_memory_channel[Message | bytes](QUEUE_FRAMES)
        self._failure: QsnapError | None = None
        self._gone = trio.Event()
        self._life = trio.CancelScope(shield=True)

    @property
    def lost(self) -> bool:
        """Whether it has ended. What came before that can still be received."""
        return self._gone.is_set()

    async def wait_lost(self) -> None:
        """Return once the connection is lost."""
        await self._gone.wait()

    async def cancel_when_lost(self, scope: trio.CancelScope) -> None:
        """Cancel what nobody waits for any more."""
        await self.wait_lost()
        scope.cancel()

    async def send(self, message: Message) -> None:
        """Send a message. Raises ConnectionLostError if the connection is lost."""
        await self._send(*split_message(encode_message(message)))

    async def send_data(self, data: bytes) -> None:
        """Send bytes as they are, at most 1 MiB. Raises ConnectionLostError if the connection is lost."""
        await self._send(Frame(FrameKind.DATA, data))

    async def receive(self) -> Message:
        """The next message.

        Raises:
            QsnapError: the other side has failed with this.
            ProtocolError: what has come is no message.
            ConnectionLostError: the connection is lost, and all that came before has been received.
        """
        match await self._next():
            case bytes():
                raise ProtocolError("data came where a message was expected", where=self._where)
            case message:
                return message

    async def receive_data(self) -> bytes:
        """The next bytes that the other side has sent with one `send_data`. Raises what `receive` does."""
        match await self._next():
            case bytes() as data:
                return data
            case message:
                what = type(message).__name__
                raise ProtocolError(f"a message {what} came where data was expected", where=self._where)

    async def ask(self, message: Message) -> Message:
        """Send a message, and return the next one that comes."""
        await self.send(message)
        return await self.receive()

    @property
    def _where(self) -> str:
        return f"host {self.peer.name}"

    async def _next(self) -> Message | bytes:
        try:
            item = await self._incoming.receive()
        except trio.EndOfChannel:
            assert self._failure is not None
            raise self._failure from None
        if isinstance(item, Refused):
            raise item.error()
        return item

    async def _send(self, *frames: Frame) -> None:
        data = b"".join(map(encode_frame, frames))
        async with self._sending:
            if self._failure is not None:
                raise self._failure
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._lose(translated(error, self.peer.name)) from error
            except trio.Cancelled:
                self._lose(ConnectionLostError("a frame was sent in part only", where=self._where))
                raise
            self._last_sent_s = trio.current_time()

    def _lose(self, failure: QsnapError) -> QsnapError:
        """Note that the connection is lost. The reason, which is the first one."""
        self._failure = self._failure or failure
        self._gone.set()
        return self._failure

    async def run(self) -> None:
        """Take in what comes, and show that this side lives, until the connection is lost or `end` is called.

        A cancellation from outside does not end it: whoever is cancelled may have to tell the other side so.
        """
        with self._life:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._beat)
                await self._listen()
                nursery.cancel_scope.cancel()

    def end(self) -> None:
        """It is not needed any more."""
        self._lose(ConnectionLostError("this side has ended the connection", where=self._where))
        self._life.cancel()

    async def _beat(self) -> None:
        with suppress(QsnapError):
            while True:
                await trio.sleep_until(self._last_sent_s + HEARTBEAT_S)
                if trio.current_time() >= self._last_sent_s + HEARTBEAT_S:
                    await self.send(Ping())

    async def _listen(self) -> None:
        with self._arrived:
            try:
                with trio.fail_after(LOST_S) as patience:
                    await self._take_frames(patience)
            except ProtocolError as error:
                error.where = self._where
                self._lose(error)
                return  # the other side can still be told so
            except trio.TooSlowError:
                message, advice = f"nothing was heard of it for {LOST_S:.0f} s", "Is it up, and the network between?"
                self._lose(ConnectionLostError(message, where=self._where, advice=advice))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._lose(translated(error, self.peer.name))
            await trio.aclose_forcefully(self._stream)  # whoever is sending need not wait

    async def _take_frames(self, patience: trio.CancelScope) -> None:
        reader, joiner = FrameReader(), PartJoiner()
        while True:
            patience.deadline = trio.current_time() + LOST_S
            data = await self._stream.receive_some()
            patience.deadline = math.inf  # what follows may take as long as it likes
            if not data:
                advice = "See the log of its agent."
                self._lose(ConnectionLostError("it has closed the connection", where=self._where, advice=advice))
                return
            reader.receive_data(data)
            while frame := reader.next_frame():
                whole = joiner.join(frame)
                if whole is None:
                    continue
                item = whole.body if whole.kind is FrameKind.DATA else decode_message(whole.body)
                if not isinstance(item, Ping):
                    await self._arrived.send(item)


@asynccontextmanager
async def connect(host: Host, identity: Identity, *, timeout_s: float = HANDSHAKE_S) -> AsyncIterator[Connection]:
    """A connection to the agent of `host`, which has to have the identity of that name.

    Raises:
        ConnectionLostError: it cannot be reached, or does not answer in time.
        IdentityError: a certificate is not accepted by this side or the other.
        ProtocolError: it speaks another version, or something else.
    """
    deadline_s = trio.current_time() + timeout_s
    with _deadline(deadline_s, host):
        transport = await _dial(host)
        stream = await secure(transport, identity, server=host.name)
    async with _closing(stream), _running(stream) as connection:
        with _deadline(deadline_s, host):
            answer = await connection.ask(Hello(VERSION, CAPABILITIES, identity.crl_pem))
            if not isinstance(answer, Welcome):
                raise ProtocolError(f"it answers with {type(answer).__name__}", where=f"host {host.name}")
            await _agree(connection, stream, identity, answer)
        yield connection


@define
class _Server:
    """What the connections of a server share: the identity, which is read again for each."""

    path: Path
    handler: Handler
    identity: Identity
    strangers: dict[trio.CancelScope, str] = field(factory=dict)  #: their addresses, the oldest first
    known: set[trio.CancelScope] = field(factory=set)

    async def take(self, transport: trio.SocketStream) -> None:
        """Deal with one connection. Whatever goes wrong with it is logged."""
        address = _address_of(transport)
        with trio.CancelScope() as scope:
            self._make_room()
            self.strangers[scope] = address
            try:
                await self._talk(transport, address, scope)
            except QsnapError as error:
                log.warning("%s: %s", address, _one_line(error))
            except Exception:
                log.exception("%s: a connection failed", address)
            finally:
                self.strangers.pop(scope, None)
                self.known.discard(scope)
        if scope.cancelled_caught:
            await trio.aclose_forcefully(transport)

    def _make_room(self) -> None:
        """Whoever has no certificate must not be able to keep out those who have."""
        if len(self.strangers) == STRANGERS:
            oldest = next(iter(self.strangers))
            log.warning("%s: closed: %d others are waiting for theirs", self.strangers.pop(oldest), STRANGERS)
            oldest.cancel()

    def _admit(self, scope: trio.CancelScope) -> None:
        """A stranger is a host that may be here."""
        if len(self.known) == CONNECTIONS:
            raise HostError(f"there are {CONNECTIONS} connections", where=f"host {self.identity.name}")
        self.strangers.pop(scope, None)
        self.known.add(scope)

    async def _talk(self, transport: trio.SocketStream, address: str, scope: trio.CancelScope) -> None:
        identity = await self._current_identity()
        deadline_s = trio.current_time() + HANDSHAKE_S
        with _deadline(deadline_s):
            stream = await secure(transport, identity)
        async with _closing(stream):
            try:
                async with _running(stream) as connection:
                    with _deadline(deadline_s):
                        await self._welcome(connection, stream, identity, scope)
                    log.info("%s: connected as %s", address, connection.peer.name)
                    await self._handle(connection)
            except QsnapError as error:
                await _refuse(stream, error)
                raise

    async def _current_identity(self) -> Identity:
        """The identity as its file has it now; if that cannot be used, then as it was last."""
        try:
            self.identity = await trio.to_thread.run_sync(load_identity, self.path)
        except QsnapError as error:
            log.warning("the identity stays as it was: %s", _one_line(error))
        return self.identity

    async def _welcome(
        self, connection: Connection, stream: TlsStream, identity: Identity, scope: trio.CancelScope
    ) -> None:
        hello = await connection.receive()
        if not isinstance(hello, Hello):
            raise ProtocolError(f"it begins with {type(hello).__name__}", where=f"host {connection.peer.name}")
        identity = await _agree(connection, stream, identity, hello)
        self._admit(scope)
        await connection.send(Welcome(VERSION, CAPABILITIES, identity.crl_pem))

    async def _handle(self, connection: Connection) -> None:
        try:
            with one_error():
                await self.handler(connection)
        except ConnectionLostError:
            if not connection.lost:
                raise
        except QsnapError:
            raise
        except Exception as error:
            log.exception("the connection with %s failed", connection.peer.name)
            message = f"its agent failed with {type(error).__name__}"
            raise QsnapError(message, where=f"host {self.identity.name}", advice="See its log.") from error


async def serve(
    listen: tuple[str, int],
    identity_path: Path,
    handler: Handler,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept connections at this (address, port) for ever, and run `handler` with each.

    An empty address is all of the host's. A connection ends when `handler` does; what that raises, the other side is
    told. `task_status` gets the port, once connections are accepted.

    Raises:
        IdentityError: there is no usable identity in the file. Later on, the last usable one is kept.
        HostError: it cannot listen there.
    """
    address, port = listen
    server = _Server(identity_path, handler, load_identity(identity_path))
    try:
        listeners = await trio.open_tcp_listeners(port, host=address or None)
    except OSError as error:
        advice = "Is another agent running, or the address not of this host?"
        raise HostError(error.strerror or str(error), where=f"{address}:{port}", advice=advice) from error
    task_status.started(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(server.take, listeners)


async def _dial(host: Host) -> trio.SocketStream:
    where = f"host {host.name}"
    try:
        return await trio.open_tcp_stream(host.address, host.port)
    except OSError as error:
        if _refused(error):
            message = f"nothing listens at {host.address}:{host.port}"
            advice = f"Start its agent, on {host.name}: qsnap agent --identity {host.name}.pem"
        else:
            message = f"cannot connect to {host.address}:{host.port}: {_reason(error)}"
            advice = "Is the address in [hosts] right, and the network up?"
        raise ConnectionLostError(message, where=where, advice=advice) from error


def _reason(error: OSError) -> str:
    """Why none of the attempts has gone well, of which trio's error has a group."""
    cause = error.__cause__
    attempts = cause.exceptions if isinstance(cause, BaseExceptionGroup) else (cause or error,)
    return ", ".join(dict.fromkeys(getattr(each, "strerror", "") or str(each) for each in attempts))


def _refused(error: BaseException | None) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(map(_refused, error.exceptions))
    return isinstance(error, ConnectionRefusedError) or (error is not None and _refused(error.__cause__))


@contextmanager
def _deadline(deadline_s: float, host: Host | None = None) -> Iterator[None]:
    try:
        with trio.fail_at(deadline_s):
            yield
    except trio.TooSlowError as error:
        if host is None:
            raise ConnectionLostError("it did not finish its handshake in time") from error
        advice = "Is it up, its address in [hosts] right, and its firewall open?"
        message = f"no answer from {host.address}:{host.port} in time"
        raise ConnectionLostError(message, where=f"host {host.name}", advice=advice) from error


@asynccontextmanager
async def _running(stream: TlsStream) -> AsyncIterator[Connection]:
    connection = Connection(stream, peer_of(certificate_of(stream)))
    with one_error():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            try:
                yield connection
            finally:
                connection.end()


@asynccontextmanager
async def _closing(stream: TlsStream) -> AsyncIterator[None]:
    try:
        yield
    finally:
        with trio.move_on_after(FAREWELL_S, shield=True):
            await stream.aclose()


async def _refuse(stream: TlsStream, error: QsnapError) -> None:
    """Tell the other side why it is sent away, and wait until it has gone."""
    frame = Frame(FrameKind.MESSAGE, encode_message(Refused.of(error)))
    with trio.move_on_after(FAREWELL_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(encode_frame(frame))
        while await stream.receive_some():
            pass


async def _agree(connection: Connection, stream: TlsStream, identity: Identity, greeting: Hello | Welcome) -> Identity:
    """Settle on what both sides can do, and on who may; the identity with the newer CRL of both."""
    check_version(greeting.version, peer=connection.peer.name, here=identity.name)
    connection.capabilities = frozenset(CAPABILITIES) & frozenset(greeting.capabilities)
    identity = await trio.to_thread.run_sync(partial(adopt_crl, identity, greeting.crl))
    if identity.revokes(certificate_of(stream)):
        advice = "Issue a new one: qsnap pki issue DIR NAME"
        raise IdentityError("its certificate is revoked", where=f"host {connection.peer.name}", advice=advice)
    return identity


def _one_line(error: QsnapError) -> str:
    """An error for the log. Its advice is for the other side."""
    return f"{error.where}: {error.message}" if error.where else error.message


def _address_of(transport: trio.SocketStream) -> str:
    try:
        address, port, *_ = transport.socket.getpeername()
    except OSError:
        return "a connection that has ended"
    return f"{address}:{port}"
