"""What fuzzing has found worth keeping, and every input that once failed, without the fuzzer."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from tests.fuzz import planted, stream
from tests.wire import building as b

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(CORPUS.glob("*/*"))
TARGETS = {"description", "journal", "manifest", "messages", "qmp", "state", "stream"}


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_input(path: Path) -> None:
    import_module(f"tests.fuzz.{path.parent.name}").check(path.read_bytes())


def test_every_target_has_a_small_corpus() -> None:
    assert {path.parent.name for path in INPUTS} == TARGETS
    assert sum(path.stat().st_size for path in INPUTS) < 500_000


def test_a_check_can_fail() -> None:
    data = b.header() + b.setup({"x" * 201: b.PAGE})
    stream.check(data)
    with pytest.raises(IndexError, match="planted"):
        planted.check(data)
