"""The certificate authority (CA) of hosts: a directory that identities are issued from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from attrs import evolve, frozen
from cattrs.preconf.json import make_converter
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from qsnap.config.readers import NAME
from qsnap.errors import HostError, IdentityError, StateError
from qsnap.fleet.identity import (
    VNE_URI,
    Identity,
    adopt_crl,
    crl_number,
    explained,
    locked,
    now_utc,
    read_file,
    read_identity,
    write_file,
)

AUTHORITY = "ca.pem"  #: key and certificate
CRL = "crl.pem"
ISSUED = "issued.json"

IDENTITY_DAYS = 2 * 365
AUTHORITY_DAYS = 10 * 365  #: of its CRL too: an older one that a host still has is not refused for its age
SKEW = timedelta(days=1)  #: clocks of hosts may differ: what is issued is valid from so long before

_PATTERN = re.compile(r"[a-z0-9*?\[\]!._-]{1,64}")
_converter = make_converter()


def init_ca(directory: Path) -> None:
    """Make a certificate authority in `directory`, which is made too.

    Raises:
        StateError: there is one.
        HostError: it cannot be written.
    """
    with explained(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(directory):
        if (directory / AUTHORITY).exists():
            raise StateError("there is a certificate authority", where=str(directory), advice="Name a new directory.")
        key = ec.generate_private_key(ec.SECP256R1())
        now = now_utc()
        builder = _builder("qsnap CA", "qsnap CA", key.public_key(), now + timedelta(days=AUTHORITY_DAYS))
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        authority = _Authority(key, certificate)
        write_file(directory / CRL, _signed_crl(authority, (), 1))
        write_file(directory / ISSUED, b"[]")
        write_file(directory / AUTHORITY, _key_pem(key) + certificate.public_bytes(Encoding.PEM))


def issue(
    directory: Path, name: str, vnes: Iterable[str] = (), *, file: Path | None = None, days: int = IDENTITY_DAYS
) -> Identity:
    """Issue an identity to the host `name`, into `file` (default: DIRECTORY/NAME.pem), which must not exist yet.

    `vnes` are the patterns (fnmatch) of the VNEs that it may use; none means all. Older identities of that name stay
    valid.

    Raises:
        StateError: `name` or a pattern cannot be one, or the file exists.
        IdentityError: the directory holds no certificate authority.
        HostError: it cannot be written.
    """
    vnes = tuple(vnes)
    _check_words(name, vnes)
    path = file or directory / f"{name}.pem"
    authority = _read_authority(directory)
    with locked(directory):
        if path.exists():
            raise StateError("the file exists", where=str(path), advice="Remove it, or name another: -o FILE")
        key = ec.generate_private_key(ec.SECP256R1())
        expires = min(now_utc() + timedelta(days=min(days, AUTHORITY_DAYS)), authority.certificate.not_valid_after_utc)
        certificate = _signed_certificate(authority, key, name, vnes, expires)
        entry = Issued(name, f"{certificate.serial_number:x}", vnes, expires.isoformat())
        _write_issued(directory, (*issued(directory), entry))
        crl = (directory / CRL).read_bytes()
        chain = certificate.public_bytes(Encoding.PEM) + authority.certificate.public_bytes(Encoding.PEM)
        write_file(path, _key_pem(key) + chain + crl)
    return read_identity(path)


def revoke(directory: Path, name: str, identities: Iterable[Path] = ()) -> int:
    """Revoke every certificate of the host `name`, and return how many those are.

    The new CRL goes into `identities` at once; from there every connection carries it on to the other hosts.

    Raises:
        StateError: none was issued to that name.
        IdentityError: the directory holds no certificate authority, or an identity is not of it.
        HostError: it cannot be written.
    """
    authority = _read_authority(directory)
    with locked(directory):
        known = issued(directory)
        count = sum(each.name == name for each in known)
        if not count:
            names = ", ".join(dict.fromkeys(each.name for each in known)) or "none"
            raise StateError(f"no identity was issued to {name!r}", where=str(directory), advice=f"Known: {names}.")
        known = tuple(evolve(each, revoked=each.revoked or each.name == name) for each in known)
        _write_issued(directory, known)
        number = crl_number(_read_crl(directory)) + 1
        crl = _signed_crl(authority, (int(each.serial, 16) for each in known if each.revoked), number)
        write_file(directory / CRL, crl)
    for path in identities:
        adopt_crl(read_identity(path), crl.decode())
    return count


@frozen
class Issued:
    """A certificate that a CA has issued. `serial` is hexadecimal, `expires` in ISO 8601."""

    name: str
    serial: str
    vnes: tuple[str, ...]
    expires: str
    revoked: bool = False


def issued(directory: Path) -> tuple[Issued, ...]:
    """The certificates that the CA in `directory` has issued, the oldest first."""
    path = directory / ISSUED
    try:
        return _converter.loads(read_file(path).decode(), tuple[Issued, ...])
    except HostError:
        raise
    except Exception as error:  # cattrs lets through nearly anything that a value of the wrong kind can raise
        raise IdentityError("not a list of certificates", where=str(path), advice="Put back a copy of it.") from error


@frozen
class _Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def _read_authority(directory: Path) -> _Authority:
    path = directory / AUTHORITY
    try:
        data = read_file(path)
        key = load_pem_private_key(data, None)
        certificate = x509.load_pem_x509_certificate(data)
    except HostError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        advice = f"Make one: qsnap pki init {directory}"
        raise IdentityError("there is no certificate authority", where=str(directory), advice=advice) from None
    except (ValueError, TypeError) as error:
        raise IdentityError("damaged", where=str(path), advice="Put back a copy of it.") from error
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return _Authority(key, certificate)


def _read_crl(directory: Path) -> x509.CertificateRevocationList:
    try:
        return x509.load_pem_x509_crl(read_file(directory / CRL))
    except ValueError as error:
        raise IdentityError("damaged", where=str(directory / CRL), advice="Put back a copy of it.") from error


def _signed_certificate(
    authority: _Authority, key: ec.EllipticCurvePrivateKey, name: str, vnes: tuple[str, ...], expires: datetime
) -> x509.Certificate:
    uris = (x509.UniformResourceIdentifier(VNE_URI + pattern) for pattern in vnes)
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        _builder(name, "qsnap CA", key.public_key(), expires)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(usages, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name), *uris]), critical=False)
        .add_extension(_authority_key(authority), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def _signed_crl(authority: _Authority, serials: Iterable[int], number: int) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now_utc() - SKEW)
        .next_update(authority.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority_key(authority), critical=False)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now_utc() - SKEW).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePublicKey, expires: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now_utc() - SKEW)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _authority_key(authority: _Authority) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _check_words(name: str, vnes: tuple[str, ...]) -> None:
    if not re.fullmatch(NAME, name):
        advice = "Take the name of the host in [hosts]: 1 to 32 of a-z, 0-9 and -, not starting with -."
        raise StateError(f"{name[:80]!r} cannot name a host", advice=advice)
    for pattern in vnes:
        if not _PATTERN.fullmatch(pattern):
            raise StateError(f"{pattern[:80]!r} is no pattern of VNEs", advice="For example: --vne 'lab-*'")


def _write_issued(directory: Path, known: tuple[Issued, ...]) -> None:
    write_file(directory / ISSUED, _converter.dumps(known, indent=1).encode())
