"""Connections over loopback, with real TLS: what they carry, and who is turned away with which words.

Silence is tested on streams in memory, with a clock that does not wait.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from attrs import evolve
from trio.testing import MemoryReceiveStream, MemorySendStream, MockClock, memory_stream_pair

from qsnap.errors import ConnectionLostError, HostError, IdentityError, IntegrityError, ProtocolError, QsnapError
from qsnap.fleet.channel import CONNECTIONS, HEARTBEAT_S, LOST_S, STRANGERS, Connection, Handler, connect, serve
from qsnap.fleet.identity import Identity, Peer, load_identity, read_identity
from qsnap.fleet.pki import init_ca, issue, revoke
from qsnap.fleet.tls import secure
from qsnap.host.tasks import one_error
from qsnap.model import Host
from qsnap.wire.frames import Frame, FrameKind, FrameReader, encode_frame
from qsnap.wire.messages import (
    VERSION,
    ClockProbe,
    ClockReply,
    Hello,
    Message,
    Names,
    Ping,
    Refused,
    Welcome,
    decode_message,
)
from qsnap.wire.messages import encode_message as encode

MemoryStream = trio.StapledStream[MemorySendStream, MemoryReceiveStream]
PROBE, REPLY = ClockProbe(7.0), ClockReply(7.0, 0.0, 0.0)


async def echo(connection: Connection) -> None:
    while True:
        match await connection.receive():
            case ClockProbe(sent_s=1.0):
                raise IntegrityError("altered", file="/store/ram", advice="Put it back.")
            case ClockProbe(sent_s=2.0):
                raise ZeroDivisionError
            case ClockProbe(sent_s=3.0):
                while data := await connection.receive_data():
                    await connection.send_data(data)
            case ClockProbe(sent_s=sent_s):
                await connection.send(ClockReply(sent_s, 0.0, 0.0))


@asynccontextmanager
async def serving(identity: Path, handler: Handler = echo) -> AsyncIterator[Host]:
    """The server's host, called beta."""
    with one_error():
        async with trio.open_nursery() as nursery:
            port = await nursery.start(serve, ("127.0.0.1", 0), identity, handler)
            yield at(port)
            nursery.cancel_scope.cancel()


def at(port: int, name: str = "beta") -> Host:
    return Host(name, "127.0.0.1", port, "127.0.0.1")


async def works(host: Host, identity: Identity) -> None:
    """The server goes on."""
    async with connect(host, identity) as connection:
        assert await connection.ask(PROBE) == REPLY


def message_frame(message: Message) -> bytes:
    return encode_frame(Frame(FrameKind.MESSAGE, encode(message)))


def newest_crl(ca: Path) -> str:
    return (ca / "crl.pem").read_text()


@asynccontextmanager
async def knocking(host: Host, identity: Identity) -> AsyncIterator[trio.abc.Stream]:
    """A TLS connection to a server, for what `connect` would not say."""
    stream = await secure(await trio.open_tcp_stream(host.address, host.port), identity, server=host.name)
    try:
        yield stream
    finally:
        await trio.aclose_forcefully(stream)


@asynccontextmanager
async def answering(identity: Identity, *frames: bytes) -> AsyncIterator[Host]:
    """A server that answers a Hello with these frames, whatever they are, and then is silent."""

    async def answer(transport: trio.SocketStream) -> None:
        stream = await secure(transport, identity)
        await stream.receive_some()
        for frame in frames:
            await stream.send_all(frame)
        await trio.sleep_forever()

    with one_error():
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
            yield at(listeners[0].socket.getsockname()[1])
            nursery.cancel_scope.cancel()


async def heard(stream: trio.abc.Stream) -> Message:
    """The next message but a Ping."""
    reader = FrameReader()
    while True:
        while frame := reader.next_frame():
            if (message := decode_message(frame.body)) != Ping():
                return message
        reader.receive_data(await stream.receive_some())


async def test_messages_and_data_go_both_ways(ca: Path, alpha: Identity) -> None:
    data = os.urandom(1 << 20)
    async with serving(ca / "beta.pem") as beta, connect(beta, alpha) as connection:
        assert (connection.peer.name, connection.peer.vnes) == ("beta", ("lab-*", "demo"))
        assert await connection.ask(ClockProbe(7.0)) == ClockReply(7.0, 0.0, 0.0)
        await connection.send(ClockProbe(3.0))
        for _ in range(20):
            await connection.send_data(data)
            assert await connection.receive_data() == data
        await connection.send_data(b"")
        assert await connection.ask(ClockProbe(8.0)) == ClockReply(8.0, 0.0, 0.0)
        assert not connection.lost


async def test_an_error_of_the_handler_is_raised_at_the_other_side(
    ca: Path, alpha: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(ca / "beta.pem") as beta:
        async with connect(beta, alpha) as connection:
            with pytest.raises(IntegrityError) as caught:
                await connection.ask(ClockProbe(1.0))
        assert (caught.value.message, caught.value.file) == ("altered", "/store/ram")
        async with connect(beta, alpha) as connection:
            with pytest.raises(QsnapError, match="host beta: its agent failed with ZeroDivisionError"):
                await connection.ask(ClockProbe(2.0))
        assert "raise ZeroDivisionError" in caplog.text
        async with connect(beta, alpha) as connection:
            await connection.ask(ClockProbe(9.0))


async def test_what_was_sent_before_the_end_is_received(ca: Path, alpha: Identity) -> None:
    async def talkative(connection: Connection) -> None:
        for number in range(50):
            await connection.send(ClockProbe(float(number)))

    async with serving(ca / "beta.pem", talkative) as beta, connect(beta, alpha) as connection:
        for number in range(50):
            assert await connection.receive() == ClockProbe(float(number))
        with pytest.raises(ConnectionLostError, match="host beta: it has closed the connection"):
            await connection.receive()
        await connection.wait_lost()
        assert connection.lost
        with pytest.raises(ConnectionLostError, match="host beta"):
            await connection.send(PROBE)


async def test_the_capabilities_are_those_of_both(ca: Path, alpha: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsnap.fleet.channel.CAPABILITIES", ("a", "b"))
    welcome = message_frame(Welcome((VERSION[0], 99), ("b", "c"), alpha.crl_pem))
    async with answering(load_identity(ca / "beta.pem"), welcome) as beta, connect(beta, alpha) as connection:
        assert connection.capabilities == {"b"}


async def test_a_refusal_comes_between_data_too(ca: Path, alpha: Identity) -> None:
    async def failing(connection: Connection) -> None:
        await connection.send_data(b"half")
        raise IntegrityError("altered", file="ram")

    async with serving(ca / "beta.pem", failing) as beta, connect(beta, alpha) as connection:
        assert await connection.receive_data() == b"half"
        with pytest.raises(IntegrityError, match="ram: altered"):
            await connection.receive_data()


async def test_a_message_longer_than_a_frame(ca: Path, alpha: Identity) -> None:
    names = Names(tuple(f"{number:01000}" for number in range(9000)))

    async def tell(connection: Connection) -> None:
        await connection.send(names)
        await connection.send_data(b"behind it")

    async with serving(ca / "beta.pem", tell) as beta, connect(beta, alpha) as connection:
        assert await connection.receive() == names
        assert await connection.receive_data() == b"behind it"


async def test_what_comes_is_what_was_asked_for(ca: Path, alpha: Identity) -> None:
    welcome = message_frame(Welcome(VERSION, (), alpha.crl_pem))
    both = encode_frame(Frame(FrameKind.DATA, b"x")) + message_frame(REPLY)
    async with answering(load_identity(ca / "beta.pem"), welcome, both) as beta, connect(beta, alpha) as connection:
        with pytest.raises(ProtocolError, match="host beta: data came where a message was expected"):
            await connection.receive()
        with pytest.raises(ProtocolError, match="host beta: a message ClockReply came where data was expected"):
            await connection.receive_data()


async def test_who_is_connected_is_known_to_the_handler(ca: Path, alpha: Identity) -> None:
    async def tell(connection: Connection) -> None:
        await connection.send_data(f"{connection.peer.name} {connection.peer.may_use('lab-1')}".encode())

    for name in ("alpha", "beta"):
        async with (
            serving(ca / "beta.pem", tell) as beta,
            connect(beta, load_identity(ca / f"{name}.pem")) as connection,
        ):
            assert await connection.receive_data() == f"{name} True".encode()


# Who is turned away


async def test_another_ca(ca: Path, alpha: Identity, tmp_path: Path) -> None:
    init_ca(tmp_path / "other")
    stranger = issue(tmp_path / "other", "alpha")
    async with serving(ca / "beta.pem") as beta:
        with pytest.raises(IdentityError, match="host beta: its certificate is not of our CA"):
            await works(beta, stranger)
        with pytest.raises(IdentityError, match="host beta: it says that our certificate is not of our CA"):
            await works(beta, evolve(stranger, authority=alpha.authority, crl=alpha.crl))  # it trusts our CA
        await works(beta, alpha)


async def test_expired(ca: Path, alpha: Identity) -> None:
    late = issue(ca, "late", days=0)
    async with serving(ca / "beta.pem") as beta:
        with pytest.raises(IdentityError, match="host beta: it says that our certificate has expired"):
            await works(beta, late)
        await works(beta, alpha)
    async with answering(late) as host:
        with pytest.raises(IdentityError, match="host late: its certificate has expired"):
            await works(evolve(host, name="late"), alpha)


async def test_revoked_at_the_server(ca: Path, alpha: Identity) -> None:
    revoke(ca, "alpha", [ca / "beta.pem"])
    async with serving(ca / "beta.pem") as beta:
        with pytest.raises(IdentityError, match="host beta: it says that our certificate is revoked"):
            await works(beta, alpha)
        await works(beta, load_identity(ca / "gamma.pem"))


async def test_revoked_while_the_server_runs(ca: Path, alpha: Identity) -> None:
    async with serving(ca / "beta.pem") as beta:
        await works(beta, alpha)
        revoke(ca, "alpha", [ca / "beta.pem"])
        with pytest.raises(IdentityError, match="it says that our certificate is revoked"):
            await works(beta, alpha)


async def test_a_revoked_server(ca: Path, alpha: Identity) -> None:
    revoke(ca, "beta", [ca / "alpha.pem"])
    async with serving(ca / "beta.pem") as beta:
        with pytest.raises(IdentityError, match="host beta: its certificate is revoked"):
            await works(beta, load_identity(ca / "alpha.pem"))


@pytest.mark.parametrize("informed", ["alpha", "beta"])
async def test_a_revocation_spreads_by_itself(ca: Path, informed: str) -> None:
    """From the client to the server, or the other way; then gamma is turned away by both."""
    revoke(ca, "gamma", [ca / f"{informed}.pem"])
    gamma = load_identity(ca / "gamma.pem")
    async with serving(ca / "beta.pem") as beta:
        if informed == "alpha":
            await works(beta, gamma)
        await works(beta, load_identity(ca / "alpha.pem"))
        with pytest.raises(IdentityError, match="it says that our certificate is revoked"):
            await works(beta, gamma)
    for name in ("alpha", "beta"):
        assert load_identity(ca / f"{name}.pem").crl_pem == newest_crl(ca)


async def test_a_revocation_list_of_somebody_else_is_refused(ca: Path, alpha: Identity, tmp_path: Path) -> None:
    init_ca(tmp_path / "other")
    issue(tmp_path / "other", "beta")
    revoke(tmp_path / "other", "beta")
    before = (ca / "beta.pem").read_bytes()
    async with serving(ca / "beta.pem") as beta:
        async with knocking(beta, alpha) as stream:
            await stream.send_all(message_frame(Hello(VERSION, (), newest_crl(tmp_path / "other"))))
            refused = await heard(stream)
            assert isinstance(refused, Refused)
            assert (refused.kind, refused.message) == ("IdentityError", "a revocation list that is not of our CA")
        await works(beta, alpha)
    assert (ca / "beta.pem").read_bytes() == before


async def test_whom_the_newer_list_revokes_is_refused(ca: Path, alpha: Identity) -> None:
    revoke(ca, "alpha")
    async with serving(ca / "beta.pem") as beta, knocking(beta, alpha) as stream:
        await stream.send_all(message_frame(Hello(VERSION, (), newest_crl(ca))))
        with pytest.raises(IdentityError, match="host alpha: its certificate is revoked"):
            raise_refused(await heard(stream))
    welcome = message_frame(Welcome(VERSION, (), revoked_crl(ca, "beta")))
    async with answering(read_identity(ca / "beta.pem"), welcome) as beta:
        with pytest.raises(IdentityError, match="host beta: its certificate is revoked"):
            await works(beta, read_identity(ca / "gamma.pem"))


def revoked_crl(ca: Path, name: str) -> str:
    revoke(ca, name)
    return newest_crl(ca)


def raise_refused(message: Message) -> None:
    assert isinstance(message, Refused)
    raise message.error()


async def test_another_host_than_was_asked_for(ca: Path, alpha: Identity) -> None:
    async with serving(ca / "gamma.pem") as beta:
        with pytest.raises(IdentityError, match="host beta: its certificate is of another host") as caught:
            await works(beta, alpha)
        assert "address in [hosts]" in caught.value.advice
        await works(evolve(beta, name="gamma"), alpha)


async def test_another_major_version(ca: Path, alpha: Identity) -> None:
    newer, spoken = (VERSION[0] + 1, 0), rf"{VERSION[0]}\.{VERSION[1]}"
    async with serving(ca / "beta.pem") as beta, knocking(beta, alpha) as stream:
        await stream.send_all(message_frame(Hello(newer, (), alpha.crl_pem)))
        with pytest.raises(
            ProtocolError, match=rf"alpha speaks version 2\.0 .* beta version {spoken}\n.*Upgrade qsnap on beta"
        ):
            raise_refused(await heard(stream))
    async with answering(load_identity(ca / "beta.pem"), message_frame(Welcome(newer, (), alpha.crl_pem))) as beta:
        with pytest.raises(
            ProtocolError, match=rf"beta speaks version 2\.0 .* alpha version {spoken}\n.*Upgrade qsnap on alpha"
        ):
            await works(beta, alpha)


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"\x16\x03\x01" + b"x" * 50, b""])
async def test_a_client_without_tls(ca: Path, alpha: Identity, caplog: pytest.LogCaptureFixture, text: bytes) -> None:
    async with serving(ca / "beta.pem") as beta:
        async with await trio.open_tcp_stream(beta.address, beta.port) as stream:
            await stream.send_all(text)
            await stream.send_eof()
            with trio.fail_after(5):
                while await stream.receive_some():
                    pass
        await works(beta, alpha)
    (line,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert line.startswith("127.0.0.1:")
    assert "\n" not in line


async def test_a_client_that_says_nothing(
    ca: Path, alpha: Identity, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsnap.fleet.channel.HANDSHAKE_S", 0.3)
    async with serving(ca / "beta.pem") as beta, await trio.open_tcp_stream(beta.address, beta.port) as stream:
        with trio.fail_after(5):
            assert await stream.receive_some() == b""
            while "it did not finish its handshake in time" not in caplog.text:
                await trio.sleep(0.01)


async def test_a_server_without_tls(alpha: Identity) -> None:
    async def talk(stream: trio.SocketStream) -> None:
        await stream.send_all(b"SSH-2.0-OpenSSH_9.2p1\r\n")
        await stream.receive_some()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, talk, 0, host="127.0.0.1"))
        with pytest.raises(ProtocolError, match="host beta: it does not speak TLS"):
            await works(at(listeners[0].socket.getsockname()[1]), alpha)
        nursery.cancel_scope.cancel()


async def test_nobody_listens(alpha: Identity) -> None:
    with trio.socket.socket() as closed:
        await closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(ConnectionLostError, match=f"host beta: nothing listens at 127.0.0.1:{port}") as caught:
            await works(at(port), alpha)
    assert caught.value.advice == "Start its agent, on beta: qsnap agent --identity beta.pem"


async def test_no_answer(alpha: Identity) -> None:
    with trio.socket.socket() as silent:
        await silent.bind(("127.0.0.1", 0))
        silent.listen()
        host = at(silent.getsockname()[1])
        with pytest.raises(ConnectionLostError, match=r"host beta: no answer from 127.0.0.1:\d+ in time"):
            async with connect(host, alpha, timeout_s=0.2):
                pass


async def test_no_welcome(ca: Path, alpha: Identity) -> None:
    async with answering(load_identity(ca / "beta.pem")) as beta:
        with pytest.raises(ConnectionLostError, match="host beta: no answer"):
            async with connect(beta, alpha, timeout_s=0.5):
                pass


async def test_a_deadline_of_the_caller_is_the_callers(ca: Path, alpha: Identity) -> None:
    async with serving(ca / "beta.pem") as beta:
        with trio.move_on_after(0.3) as scope:
            async with connect(beta, alpha) as connection:
                await connection.receive()
        assert scope.cancelled_caught


async def test_the_port_is_taken(ca: Path) -> None:
    async with serving(ca / "beta.pem") as beta:
        with pytest.raises(HostError, match=f"127.0.0.1:{beta.port}: .*in use"):
            await serve((beta.address, beta.port), ca / "beta.pem", echo)


# What a server survives


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\1\0\x40\0\1", "a frame of 4194305 bytes"),
        (b"\2\0\x10\0\1", "a frame of 1048577 bytes"),
        (b"\x63\0\0\0\0", "a frame of the unknown kind 99"),
        (b"\1\0\0\0\4null", "not a message: no JSON object"),
        (message_frame(PROBE), "it begins with ClockProbe"),
        (encode_frame(Frame(FrameKind.DATA, b"x")), "data came where a message was expected"),
    ],
)
async def test_what_is_no_hello_is_refused(ca: Path, alpha: Identity, data: bytes, reason: str) -> None:
    async with serving(ca / "beta.pem") as beta:
        async with knocking(beta, alpha) as stream:
            await stream.send_all(data)
            with pytest.raises(ProtocolError, match=f"host alpha: {reason}"):
                raise_refused(await heard(stream))
        await works(beta, alpha)


@pytest.mark.parametrize("data", [b"", b"\1\0\0\0\4nul", message_frame(Ping())])
async def test_a_client_that_leaves_early(ca: Path, alpha: Identity, data: bytes) -> None:
    async with serving(ca / "beta.pem") as beta:
        async with knocking(beta, alpha) as stream:
            await stream.send_all(data)
        await works(beta, alpha)


async def test_garbage_in_the_middle_ends_only_its_connection(ca: Path, alpha: Identity) -> None:
    async with serving(ca / "beta.pem") as beta, connect(beta, alpha) as bystander:
        async with knocking(beta, alpha) as stream:
            await stream.send_all(message_frame(Hello(VERSION, (), alpha.crl_pem)))
            assert isinstance(await heard(stream), Welcome)
            await stream.send_all(message_frame(PROBE))
            assert await heard(stream) == REPLY
            await stream.send_all(b"\xff" * 10)
            with pytest.raises(ProtocolError, match="host alpha: a frame of the unknown kind 255"):
                raise_refused(await heard(stream))
        assert await bystander.ask(PROBE) == REPLY


async def test_as_many_connections_as_there_may_be(ca: Path, alpha: Identity) -> None:
    async with serving(ca / "beta.pem") as beta:
        async with AsyncExitStack() as stack:
            many = [await stack.enter_async_context(connect(beta, alpha, timeout_s=30)) for _ in range(CONNECTIONS)]
            with pytest.raises(HostError, match=f"host beta: there are {CONNECTIONS} connections"):
                await works(beta, alpha)
            for connection in many:
                assert await connection.ask(PROBE) == REPLY
        with trio.fail_after(10):
            while not await admits(beta, alpha):
                await trio.sleep(0.01)


async def admits(host: Host, identity: Identity) -> bool:
    try:
        await works(host, identity)
    except HostError:
        return False
    return True


async def test_strangers_keep_no_host_out(ca: Path, alpha: Identity, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(ca / "beta.pem") as beta, connect(beta, alpha) as before, AsyncExitStack() as stack:
        for _ in range(STRANGERS):
            await stack.enter_async_context(await trio.open_tcp_stream(beta.address, beta.port))
        await works(beta, alpha)
        assert "others are waiting for theirs" in caplog.text
        assert await before.ask(PROBE) == REPLY


async def test_an_identity_that_is_damaged_meanwhile(
    ca: Path, alpha: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(ca / "beta.pem") as beta:
        (ca / "beta.pem").write_text("")
        await works(beta, evolve(alpha, path=ca / "gamma.pem"))
        assert "the identity stays as it was" in caplog.text


async def test_an_identity_that_is_renewed_meanwhile(ca: Path, alpha: Identity) -> None:
    async with serving(ca / "beta.pem") as beta:
        revoke(ca, "beta")
        (ca / "beta.pem").unlink()
        issue(ca, "beta")
        (ca / "alpha.pem").unlink()
        await works(beta, issue(ca, "alpha"))


async def test_a_server_needs_an_identity(ca: Path) -> None:
    (ca / "beta.pem").chmod(0o644)
    with pytest.raises(IdentityError, match="others may read it"):
        await serve(("127.0.0.1", 0), ca / "beta.pem", echo)


# Silence


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Connection, MemoryStream]]:
    """A connection in memory, and the other end of its stream."""
    ours, theirs = memory_stream_pair()
    connection = Connection(ours, Peer("beta"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        yield connection, theirs
        connection.end()


async def test_silence_is_noticed_while_nobody_receives(autojump_clock: MockClock) -> None:
    async with pair() as (connection, _):
        began_s = trio.current_time()
        await connection.wait_lost()
        assert connection.lost
        assert trio.current_time() - began_s == pytest.approx(LOST_S)
        for call in (connection.receive, connection.receive_data, partial(connection.send, PROBE)):
            with pytest.raises(ConnectionLostError, match="host beta: nothing was heard of it for 5 s"):
                await call()


async def test_two_that_have_nothing_to_say_stay_connected(autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    alpha, beta = Connection(ours, Peer("beta")), Connection(theirs, Peer("alpha"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alpha.run)
        nursery.start_soon(beta.run)
        await trio.sleep(1000)
        assert not alpha.lost
        assert not beta.lost
        alpha.end()
        beta.end()


async def test_who_is_cancelled_can_still_tell_the_other_side(autojump_clock: MockClock) -> None:
    async with pair() as (connection, theirs):
        with trio.move_on_after(1):
            try:
                await connection.receive()
            finally:
                with trio.CancelScope(shield=True):
                    await theirs.send_all(message_frame(PROBE))
                    assert await connection.receive() == PROBE


async def test_a_heartbeat_a_second_and_none_while_there_is_talk(autojump_clock: MockClock) -> None:
    async with pair() as (connection, theirs):
        await trio.sleep(4 * HEARTBEAT_S + 0.5)
        assert await theirs.receive_some() == message_frame(Ping()) * 4
        await theirs.send_all(message_frame(Ping()))
        for _ in range(8):
            await connection.send(PROBE)
            await trio.sleep(HEARTBEAT_S / 2)
        assert await theirs.receive_some() == message_frame(PROBE) * 8


async def test_a_slow_reader_is_not_lost(autojump_clock: MockClock) -> None:
    """What waits to be received is no silence: it is this side that does not listen."""
    async with pair() as (connection, theirs):
        for _ in range(20):
            await theirs.send_all(message_frame(PROBE))
        await trio.sleep(100)
        assert not connection.lost
        for _ in range(20):
            assert await connection.receive() == PROBE
        with pytest.raises(ConnectionLostError):
            await connection.receive()


async def test_silence_ends_a_send_that_waits(ca: Path, alpha: Identity) -> None:
    """The other side takes nothing and says nothing: the one real silence, with the kernel's buffers full."""
    welcome = message_frame(Welcome(VERSION, (), alpha.crl_pem))
    async with answering(load_identity(ca / "beta.pem"), welcome) as beta, connect(beta, alpha) as connection:
        with trio.fail_after(20), pytest.raises(ConnectionLostError, match="host beta: nothing was heard of it"):
            await send_for_ever(connection)


async def send_for_ever(connection: Connection) -> None:
    while True:
        await connection.send_data(bytes(1 << 20))


async def test_a_frame_that_was_cut_short_is_the_last(autojump_clock: MockClock) -> None:
    send, receive = trio.testing.lockstep_stream_one_way_pair()
    _, silent = memory_stream_pair()
    connection = Connection(trio.StapledStream(send, silent), Peer("beta"))
    with trio.move_on_after(1):
        await connection.send(PROBE)
    assert connection.lost
    with pytest.raises(ConnectionLostError, match="in part only"):
        await connection.send(PROBE)
    await receive.aclose()
