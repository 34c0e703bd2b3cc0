"""The commands below `qsnap pki`: identities of hosts."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from qsnap.cli import tables
from qsnap.cli.group import Group
from qsnap.cli.output import Answer
from qsnap.fleet.pki import IDENTITY_DAYS, init_ca, issue, revoke

directory = click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")


@click.group(
    cls=Group,
    examples=("qsnap pki init ca", "qsnap pki issue ca alpha", "qsnap pki issue ca beta", "qsnap pki revoke ca beta"),
)
def pki() -> None:
    """Make identities, by which hosts know each other.

    A VNE that is spread over hosts needs one for each of them. DIR is a directory that only you may read: whoever has
    it can issue identities.
    """


@pki.command(example="qsnap pki init ca")
@directory
def init(directory: Path) -> Answer:
    """Make a certificate authority in DIR."""
    init_ca(directory)
    hint = ("An identity for the host alpha", shlex.join(["qsnap", "pki", "issue", str(directory), "alpha"]))
    return Answer({"directory": str(directory)}, tables.with_next(f"A certificate authority is in {directory}.", hint))


@pki.command("issue", example="qsnap pki issue ca alpha --vne 'lab-*'")
@directory
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="The identity.  [DIR/NAME.pem]")
@click.option("--vne", "vnes", multiple=True, metavar="PATTERN", help="It may use these VNEs only; give one or more.")
@click.option("--days", type=click.IntRange(1), default=IDENTITY_DAYS, show_default=True, help="How long it is valid.")
def issue_(directory: Path, name: str, output: Path | None, vnes: tuple[str, ...], days: int) -> Answer:
    """Issue an identity to the host NAME, as it is called in [hosts] of a description."""
    identity = issue(directory, name, vnes, file=output, days=days)
    path = identity.path
    value = {"name": name, "file": str(path), "vnes": vnes, "expires": identity.expires.isoformat()}
    text = f"{path} is the identity of {name} until {identity.expires:%Y-%m-%d}. Keep it secret."
    hints = [
        (f"Move it to {name}", shlex.join(["scp", "-p", str(path), f"{name}:"])),
        ("Start its agent there", shlex.join(["qsnap", "agent", "--identity", path.name])),
    ]
    return Answer(value, tables.with_next(text, *hints))


@pki.command("revoke", example="qsnap pki revoke ca beta alpha.pem")
@directory
@click.argument("name")
@click.argument("identities", nargs=-1, type=click.Path(path_type=Path), metavar="[IDENTITY...]")
def revoke_(directory: Path, name: str, identities: tuple[Path, ...]) -> Answer:
    """Revoke all identities that were issued to the host NAME.

    Each IDENTITY file takes note of it. Every host that is connected to, or connects, with one of them does so too.
    """
    count = revoke(directory, name, identities)
    text = f"{name} is revoked: {count} {'identity' if count == 1 else 'identities'}."
    words = ["qsnap", "pki", "revoke", str(directory), name]
    hints = [
        ("Tell a host", shlex.join([*words, "IDENTITY"])),
        ("A new one for it", shlex.join(["qsnap", "pki", "issue", str(directory), name, "-o", f"{name}-new.pem"])),
    ]
    return Answer({"name": name, "revoked": count}, tables.with_next(text, *hints))
