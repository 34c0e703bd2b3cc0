"""Certificate authorities with identities."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qsnap.fleet.identity import Identity, read_identity
from qsnap.fleet.pki import init_ca, issue


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA that has issued alpha, beta and gamma. Never changed: `ca` is a copy."""
    directory = tmp_path_factory.mktemp("authority") / "ca"
    init_ca(directory)
    for name, vnes in (("alpha", ()), ("beta", ("lab-*", "demo")), ("gamma", ())):
        issue(directory, name, vnes)
    return directory


@pytest.fixture
def ca(authority: Path, tmp_path: Path) -> Path:
    """The directory of a CA, with alpha.pem, beta.pem and gamma.pem."""
    return Path(shutil.copytree(authority, tmp_path / "ca"))


@pytest.fixture
def alpha(ca: Path) -> Identity:
    return read_identity(ca / "alpha.pem")
