"""Identities: issued, read, revoked; and what is wrong with those that cannot be used."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from qsnap.errors import HostError, IdentityError, QsnapError, StateError
from qsnap.fleet.identity import Identity, Peer, adopt_crl, crl_number, load_identity, now_utc, peer_of, read_identity
from qsnap.fleet.pki import CRL, init_ca, issue, issued, revoke


def blocks(identity: Path) -> list[str]:
    """The four PEM blocks of an identity."""
    return [block + "\n" for block in identity.read_text().replace("-----\n-----", "-----\n\n-----").split("\n\n")]


def current_crl(ca: Path) -> x509.CertificateRevocationList:
    return x509.load_pem_x509_crl((ca / CRL).read_bytes())


def test_an_identity_says_who_and_what_for(ca: Path) -> None:
    beta = load_identity(ca / "beta.pem")
    certificate = beta.certificate
    assert beta.name == "beta"
    assert peer_of(certificate) == Peer("beta", ("lab-*", "demo"))
    assert certificate.subject.rfc4514_string() == "CN=beta"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert timedelta(days=729) < beta.expires - now_utc() <= timedelta(days=730)


def test_no_identity_outlives_its_ca(ca: Path) -> None:
    identity = issue(ca, "delta", days=100_000)
    assert identity.expires == identity.authority.not_valid_after_utc


@pytest.mark.parametrize(
    ("patterns", "vne", "allowed"),
    [
        ((), "anything", True),
        (("lab-*",), "lab-7", True),
        (("lab-*",), "lab", False),
        (("lab-*",), "my-lab-7", False),
        (("a", "b?"), "b1", True),
        (("a", "b?"), "c", False),
    ],
)
def test_which_vnes_a_peer_may_use(patterns: tuple[str, ...], vne: str, allowed: bool) -> None:
    assert Peer("alpha", patterns).may_use(vne) is allowed


def test_all_that_is_written_is_private(ca: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    init_ca(fresh)
    issue(fresh, "alpha")
    revoke(fresh, "alpha")
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in fresh.iterdir()} == dict.fromkeys(
        ("ca.pem", "crl.pem", "issued.json", "alpha.pem"), 0o600
    )


def test_issuing_again_revokes_nothing(ca: Path, alpha: Identity) -> None:
    again = issue(ca, "alpha", file=ca / "again.pem")
    assert again.certificate.serial_number != alpha.certificate.serial_number
    assert [each.name for each in issued(ca)] == ["alpha", "beta", "gamma", "alpha"]
    assert {int(each.serial, 16) for each in issued(ca)} > {
        alpha.certificate.serial_number,
        again.certificate.serial_number,
    }
    load_identity(alpha.path)


def test_revoking_revokes_all_of_a_name(ca: Path, alpha: Identity) -> None:
    again = issue(ca, "alpha", file=ca / "again.pem")
    beta = read_identity(ca / "beta.pem")
    before = crl_number(current_crl(ca))
    assert revoke(ca, "alpha", [beta.path]) == 2
    assert crl_number(current_crl(ca)) == before + 1
    beta = load_identity(beta.path)
    assert [beta.revokes(each.certificate) for each in (alpha, again, beta)] == [True, True, False]
    assert [each.name for each in issued(ca) if each.revoked] == ["alpha", "alpha"]
    revoke(ca, "beta")
    assert crl_number(current_crl(ca)) == before + 2
    assert len(current_crl(ca)) == 3
    assert issue(ca, "alpha", file=ca / "third.pem").crl == current_crl(ca)


def test_a_newer_crl_replaces_an_older_one_only(ca: Path, alpha: Identity) -> None:
    older = alpha.crl_pem
    revoke(ca, "gamma")
    newer = (ca / CRL).read_text()
    fresh = adopt_crl(alpha, newer + "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    assert fresh == load_identity(alpha.path)
    assert alpha.path.read_text() == alpha.secret + newer  # and nothing of what came with it
    assert adopt_crl(alpha, newer) == fresh  # somebody else has done it meanwhile
    assert adopt_crl(fresh, older) is fresh
    assert load_identity(alpha.path) == fresh


def test_a_crl_of_somebody_else_changes_nothing(alpha: Identity, tmp_path: Path) -> None:
    other = tmp_path / "other"
    init_ca(other)
    issue(other, "alpha")
    revoke(other, "alpha")
    before = alpha.path.read_bytes()
    for crl in ((other / CRL).read_text(), "", "\N{BULLET}", alpha.secret, alpha.crl_pem[:200]):
        with pytest.raises(IdentityError, match="not of our CA"):
            adopt_crl(alpha, crl)
    assert alpha.path.read_bytes() == before


def expired(ca: Path) -> Path:
    return issue(ca, "late", days=0).path


def revoked(ca: Path) -> Path:
    revoke(ca, "alpha", [ca / "alpha.pem"])
    return ca / "alpha.pem"


def readable(ca: Path) -> Path:
    (ca / "alpha.pem").chmod(0o640)
    return ca / "alpha.pem"


def without(number: int) -> Callable[[Path], Path]:
    """An identity that lacks one of its blocks."""

    def make(ca: Path) -> Path:
        path = ca / "alpha.pem"
        path.write_text("".join(block for i, block in enumerate(blocks(path)) if i != number))
        return path

    return make


def mixed(number: int, *, foreign: bool = False) -> Callable[[Path], Path]:
    """An identity with a block of another identity, of this CA or of a foreign one."""

    def make(ca: Path) -> Path:
        path, other = ca / "alpha.pem", ca / "beta.pem"
        if foreign:
            init_ca(ca / "foreign")
            other = issue(ca / "foreign", "alpha").path
        parts = blocks(path)
        parts[number] = blocks(other)[number]
        path.write_text("".join(parts))
        return path

    return make


def damaged(ca: Path) -> Path:
    path = ca / "alpha.pem"
    path.write_text(path.read_text().replace("A", "B", 20))
    return path


def no_text(ca: Path) -> Path:
    (ca / "alpha.pem").write_bytes(b"\xff" * 100)
    return ca / "alpha.pem"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (expired, "expired at 20"),
        (revoked, "the identity of alpha is revoked"),
        (readable, r"others may read it \(mode 640\)"),
        (without(0), "not an identity: it holds certificate, certificate, x509 crl instead of a private key"),
        (without(1), "not an identity: it holds private key, certificate, x509 crl instead"),
        (without(3), "not an identity: it holds private key, certificate, certificate instead"),
        (mixed(0), "the private key is not that of the certificate"),
        (mixed(2, foreign=True), "not an identity"),
        (mixed(3, foreign=True), "the revocation list is not of the CA"),
        (damaged, "not an identity"),
        (no_text, "not an identity"),
    ],
)
def test_an_identity_that_cannot_be_used(ca: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(ca)
    with pytest.raises(IdentityError, match=message) as caught:
        load_identity(path)
    assert caught.value.where == str(path)
    assert caught.value.advice


def test_an_identity_that_is_not_there(ca: Path) -> None:
    with pytest.raises(HostError, match=r"none\.pem: No such file"):
        load_identity(ca / "none.pem")


def test_a_second_ca_in_the_same_place_is_refused(ca: Path) -> None:
    before = {file.name: file.read_bytes() for file in ca.iterdir()}
    with pytest.raises(StateError, match="there is a certificate authority"):
        init_ca(ca)
    assert {file.name: file.read_bytes() for file in ca.iterdir()} == before


@pytest.mark.parametrize("name", ["", "Alpha", "-a", "a.b", "a/b", "../a", "a" * 33, "a\n", "*"])
def test_what_cannot_name_a_host(ca: Path, name: str) -> None:
    with pytest.raises(StateError, match="cannot name a host"):
        issue(ca, name)
    assert len(issued(ca)) == 3


@pytest.mark.parametrize("pattern", ["", "a b", "\N{BULLET}", "a/b", "a\n", "x" * 65])
def test_what_is_no_pattern(ca: Path, pattern: str) -> None:
    with pytest.raises(StateError, match="is no pattern of VNEs"):
        issue(ca, "delta", ["lab", pattern])


def test_no_file_is_overwritten(ca: Path) -> None:
    before = (ca / "ca.pem").read_bytes()
    with pytest.raises(StateError, match="the file exists"):
        issue(ca, "delta", file=ca / "ca.pem")
    assert (ca / "ca.pem").read_bytes() == before
    assert len(issued(ca)) == 3


def test_nobody_of_that_name(ca: Path) -> None:
    with pytest.raises(StateError, match="no identity was issued to 'delta'") as caught:
        revoke(ca, "delta")
    assert caught.value.advice == "Known: alpha, beta, gamma."


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'[{"name":1}]', b"\xff"])
def test_a_damaged_list_of_what_was_issued(ca: Path, content: bytes) -> None:
    (ca / "issued.json").write_bytes(content)
    for call in (lambda: issue(ca, "delta"), lambda: revoke(ca, "alpha")):
        with pytest.raises(IdentityError, match="not a list of certificates"):
            call()
    assert not (ca / "delta.pem").exists()


@pytest.mark.parametrize("name", ["ca.pem", "crl.pem"])
def test_a_damaged_ca(ca: Path, name: str) -> None:
    (ca / name).write_bytes(b"nothing")
    with pytest.raises(IdentityError, match=f"{name}: damaged"):
        revoke(ca, "alpha")


@pytest.mark.parametrize("there", [True, False])
def test_no_ca(tmp_path: Path, there: bool) -> None:
    directory = tmp_path / "none"
    if there:
        directory.mkdir()
    for call in (lambda: issue(directory, "alpha"), lambda: revoke(directory, "alpha")):
        with pytest.raises(IdentityError, match="there is no certificate authority") as caught:
            call()
        assert caught.value.advice == f"Make one: qsnap pki init {directory}"


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="Not a directory"):
        init_ca(tmp_path / "file" / "ca")


def test_the_record_is_for_people_too(ca: Path) -> None:
    beta = json.loads((ca / "issued.json").read_text())[1]
    assert (beta["name"], beta["vnes"], beta["revoked"]) == ("beta", ["lab-*", "demo"], False)


def test_a_moved_ca_goes_on(ca: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(ca, tmp_path / "elsewhere"))
    assert isinstance(issue(moved, "delta"), Identity)
    with pytest.raises(QsnapError):
        issue(ca, "epsilon")
