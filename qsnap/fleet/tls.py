"""TLS 1.3 between hosts that have identities of the same CA, and what OpenSSL's complaints mean."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from qsnap.errors import ConnectionLostError, IdentityError, ProtocolError, QsnapError
from qsnap.fleet.identity import Identity

FAREWELL_S = 1.0  #: for the other side to read why it is refused

_VERIFY_CODES = {  # X509_V_ERR_... -> what is wrong with a certificate, what to do
    9: ("is not valid yet", "Set the clocks of both hosts."),
    10: ("has expired", "Issue a new one: qsnap pki issue DIR NAME"),
    18: ("is not of our CA", "Give all hosts identities of one CA: qsnap pki issue DIR NAME"),
    19: ("is not of our CA", "Give all hosts identities of one CA: qsnap pki issue DIR NAME"),
    20: ("is not of our CA", "Give all hosts identities of one CA: qsnap pki issue DIR NAME"),
    23: ("is revoked", "Issue a new one: qsnap pki issue DIR NAME"),
    62: ("is of another host", "Is the address in [hosts] that of this host, and its agent's identity its own?"),
}
_ALERTS = {  # the end of OpenSSL's name of an alert -> the same
    "CERTIFICATE_EXPIRED": _VERIFY_CODES[10],
    "CERTIFICATE_REVOKED": _VERIFY_CODES[23],
    "UNKNOWN_CA": _VERIFY_CODES[20],
    "BAD_CERTIFICATE": ("is not accepted", "See the log of its agent."),
    "CERTIFICATE_REQUIRED": ("is missing", "It takes an identity: qsnap pki issue DIR NAME"),
}
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "UNSUPPORTED_PROTOCOL")


class _Context(ssl.SSLContext):
    """Keeps hold of what OpenSSL has to send: when a handshake fails that is the reason, which trio does not send."""

    outgoing: ssl.MemoryBIO

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        self.outgoing = outgoing
        return super().wrap_bio(incoming, outgoing, *args, **kwargs)


async def secure(
    transport: trio.SocketStream, identity: Identity, *, server: str = ""
) -> trio.SSLStream[trio.SocketStream]:
    """The transport with TLS on it, once both sides have verified each other; closed if they do not.

    `server` is the host that the other side has to be, where it is the one that was connected to.

    Raises:
        IdentityError: a certificate is not accepted.
        ProtocolError: the other side does not speak TLS 1.3.
        ConnectionLostError: it has ended the connection.
    """
    context = make_context(identity, ssl.PROTOCOL_TLS_CLIENT if server else ssl.PROTOCOL_TLS_SERVER)
    stream = trio.SSLStream(transport, context, server_hostname=server or None, server_side=not server)
    try:
        await _shake_hands(stream, context, server)
    except BaseException:
        await trio.aclose_forcefully(transport)
        raise
    return stream


async def _shake_hands(stream: trio.SSLStream[trio.SocketStream], context: _Context, server: str) -> None:
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        await _send_last(stream.transport_stream, context.outgoing.read())
        raise translated(error, server) from error


def make_context(identity: Identity, protocol: int) -> _Context:
    """TLS 1.3 that shows the identity, and accepts those that the same CA has issued and not revoked."""
    context = _Context(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # a session that is resumed would not be verified again
    with _in_memory(identity.secret) as path:
        context.load_cert_chain(path)
    with _in_memory(identity.authority.public_bytes(Encoding.PEM).decode() + identity.crl_pem) as path:
        context.load_verify_locations(path)
    return context


def certificate_of(stream: trio.SSLStream[trio.SocketStream]) -> x509.Certificate:
    """The verified certificate of the other side."""
    return x509.load_der_x509_certificate(stream.getpeercert(binary_form=True))


def translated(error: BaseException, peer: str) -> QsnapError:
    """What a broken connection to the host `peer` (empty: not known yet) means."""
    where = f"host {peer}" if peer else ""
    cause = error.__cause__
    reason = getattr(cause, "reason", None) or ""
    if isinstance(cause, ssl.SSLCertVerificationError):
        what, advice = _VERIFY_CODES.get(cause.verify_code, (f"is refused: {cause.verify_message}", ""))
        return IdentityError(f"its certificate {what}", where=where, advice=advice)
    for alert, (what, advice) in _ALERTS.items():
        if reason.endswith(f"ALERT_{alert}"):
            return IdentityError(f"it says that our certificate {what}", where=where, advice=advice)
    if reason in _NOT_TLS:
        advice = "Is this the port of an agent, and not of another program?"
        return ProtocolError("it does not speak TLS 1.3", where=where, advice=advice)
    what = "it has closed the connection"
    if not isinstance(cause, ssl.SSLEOFError):
        what = f"the connection broke: {getattr(cause, 'strerror', None) or error}"
    return ConnectionLostError(what, where=where, advice="See the log of its agent.")


async def _send_last(transport: trio.SocketStream, alert: bytes) -> None:
    """Say why it ends, and wait until that is read: what is unread on our side would make the kernel drop it."""
    with trio.move_on_after(FAREWELL_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await transport.send_all(alert)
        await transport.send_eof()
        while await transport.receive_some():
            pass


@contextmanager
def _in_memory(text: str) -> Iterator[str]:
    """The path of a file in memory, for what `ssl` reads from files only."""
    with open(os.memfd_create("qsnap"), "w") as stream:
        stream.write(text)
        stream.flush()
        yield f"/proc/self/fd/{stream.fileno()}"
