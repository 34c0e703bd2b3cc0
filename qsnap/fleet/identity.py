"""Identities: who a host is, in one file.

An *identity* is a PEM file of mode 0600: private key, certificate, the CA's certificate, and the CA's certificate
revocation list (CRL). The certificate names its host, and as URIs `qsnap:vne:PATTERN` the VNEs that its bearer may use.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from attrs import evolve, field, frozen
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from qsnap.errors import HostError, IdentityError
from qsnap.host.store.files import replace_file

VNE_URI = "qsnap:vne:"

_PEM_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\n.*?-----END \1-----\n", re.DOTALL)
_REISSUE = "Issue a new one: qsnap pki issue DIR NAME"


@frozen
class Peer:
    """Whom a certificate names. `vnes` are patterns of the VNEs that it may use; none means all."""

    name: str
    vnes: tuple[str, ...] = ()

    def may_use(self, vne: str) -> bool:
        """Whether it may do anything to the VNE of this name."""
        return not self.vnes or any(fnmatchcase(vne, pattern) for pattern in self.vnes)


@frozen
class Identity:
    """What an identity file holds. `secret` is its private key and both certificates, as PEM."""

    path: Path
    secret: str = field(repr=False)
    certificate: x509.Certificate = field(repr=False)
    authority: x509.Certificate = field(repr=False)
    crl: x509.CertificateRevocationList = field(repr=False)

    @property
    def name(self) -> str:
        """The host that it is of."""
        return peer_of(self.certificate).name

    @property
    def expires(self) -> datetime:
        """When it ceases to be accepted."""
        return self.certificate.not_valid_after_utc

    @property
    def crl_pem(self) -> str:
        """The CRL, as it is sent to others."""
        return self.crl.public_bytes(Encoding.PEM).decode()

    def revokes(self, certificate: x509.Certificate) -> bool:
        """Whether its CRL has the certificate."""
        return self.crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None


def read_identity(path: Path) -> Identity:
    """Read an identity, be it still valid or not.

    Raises:
        IdentityError: it is incomplete or inconsistent, or others may read it.
        HostError: it cannot be read.
    """
    with explained(path), open(path, "rb") as stream:
        mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
        data = stream.read()
    if mode & 0o077:
        raise IdentityError(f"others may read it (mode {mode:o})", where=str(path), advice=f"chmod 600 {path}")
    try:
        return _parse_identity(path, data)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        reason = str(error) or "a signature is wrong"
        raise IdentityError(f"not an identity: {reason[:200]}", where=str(path), advice=_REISSUE) from error


def load_identity(path: Path) -> Identity:
    """Read an identity that is to be used. Raises what `read_identity` does, and IdentityError if it is not valid."""
    identity = read_identity(path)
    if identity.expires <= now_utc():
        raise IdentityError(f"expired at {identity.expires:%Y-%m-%d %H:%M} UTC", where=str(path), advice=_REISSUE)
    if identity.revokes(identity.certificate):
        raise IdentityError(f"the identity of {identity.name} is revoked", where=str(path), advice=_REISSUE)
    return identity


def peer_of(certificate: x509.Certificate) -> Peer:
    """Whom a certificate names. IdentityError if it was not made by `issue`."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (name,) = names.get_values_for_type(x509.DNSName)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise IdentityError("a certificate that names no host", advice=_REISSUE) from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return Peer(name, tuple(uri.removeprefix(VNE_URI) for uri in uris if uri.startswith(VNE_URI)))


def adopt_crl(identity: Identity, crl_pem: str) -> Identity:
    """Take over a CRL that is newer than that of the identity, in its file too. Any other changes nothing.

    Raises:
        IdentityError: it is no CRL, or not of the identity's CA.
        HostError: the file cannot be written.
    """
    try:
        crl = x509.load_pem_x509_crl(crl_pem.encode())
        number = crl_number(crl)
        signed = _signed(crl, identity.authority)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        signed = False
    if not signed:
        raise IdentityError("a revocation list that is not of our CA", where=str(identity.path))
    if number <= crl_number(identity.crl):
        return identity
    with locked(identity.path.parent):
        current = read_identity(identity.path)
        if number > crl_number(current.crl):
            current = evolve(current, crl=crl)
            write_file(current.path, (current.secret + current.crl_pem).encode())
    return current


def crl_number(crl: x509.CertificateRevocationList) -> int:
    """The number of a CRL: a newer one has a higher one."""
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def _parse_identity(path: Path, data: bytes) -> Identity:
    blocks = [(found[1], found[0]) for found in _PEM_BLOCK.finditer(data.decode("ascii"))]
    kinds = [kind for kind, _ in blocks]
    if kinds != ["PRIVATE KEY", "CERTIFICATE", "CERTIFICATE", "X509 CRL"]:
        held = ", ".join(kinds).lower() or "nothing"
        raise ValueError(f"it holds {held} instead of a private key, two certificates and a revocation list")
    key_pem, *chain, crl_pem = (pem.encode() for _, pem in blocks)
    certificate, authority = map(x509.load_pem_x509_certificate, chain)
    crl = x509.load_pem_x509_crl(crl_pem)
    crl_number(crl)
    peer_of(certificate)
    certificate.verify_directly_issued_by(authority)
    if load_pem_private_key(key_pem, None).public_key() != certificate.public_key():
        raise ValueError("the private key is not that of the certificate")
    if not _signed(crl, authority):
        raise ValueError("the revocation list is not of the CA")
    return Identity(path, "".join(pem for _, pem in blocks[:3]), certificate, authority, crl)


def _signed(crl: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    return crl.is_signature_valid(authority.public_key())  # type: ignore[arg-type]


def now_utc() -> datetime:
    """The time to the second, as certificates have it."""
    return datetime.now(UTC).replace(microsecond=0)


def read_file(path: Path) -> bytes:
    """What is in a file. HostError if it cannot be read."""
    with explained(path):
        return path.read_bytes()


def write_file(path: Path, data: bytes) -> None:
    """Replace a file durably by a private one. HostError if that cannot be done."""
    with explained(path):
        replace_file(path, data)


@contextmanager
def explained(where: Path) -> Iterator[None]:
    """Turn an OSError into a HostError that says where."""
    try:
        yield
    except OSError as error:
        advice = "Is the path right, and does it belong to you?"
        raise HostError(error.strerror or str(error), where=str(where), advice=advice) from error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep others from changing the files in `directory` meanwhile."""
    with explained(directory):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
