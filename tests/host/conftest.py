"""Fixtures of the tests of the rim."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsnap.host.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def home(store: Store) -> Path:
    """The directory of the VNE called lab."""
    return store.root / "lab"
