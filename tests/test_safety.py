"""Names lead nowhere but into qsnap's own directories, and no word of a user's reaches a shell."""

from __future__ import annotations

import ast
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

import qsnap
from qsnap.cli import main
from qsnap.host.runtime import Runtime
from tests.host.storing import save
from tests.samples import snapshot

ROOT = Path(__file__).resolve().parents[1]
BAD_NAMES = ["../lab", "..", ".", "", "/etc", "lab/../lab", "lab/s1", "Lab", "-lab", "lab\n", "lab;id", "x" * 65]
CALLS: dict[str, Callable[..., Awaitable[Any]]] = {
    "up": lambda name, place: qsnap.up(evolve(snapshot().vne, name=name), place=place),
    "status": qsnap.status,
    "down": qsnap.down,
    "snapshot": qsnap.snapshot,
    **{each.__name__: partial(each, name="s1") for each in (qsnap.restore, qsnap.show, qsnap.verify)},
    **{each.__name__: partial(each, name="s1") for each in (qsnap.remove, qsnap.convert)},
    **{
        f"{each.__name__} of lab": lambda name, place, each=each: each("lab", name, place=place)
        for each in (qsnap.restore, qsnap.show, qsnap.verify, qsnap.remove, qsnap.convert)
    },
}


@pytest.fixture
async def place(tmp_path: Path) -> qsnap.Place:
    place = qsnap.Place(tmp_path / "in/run", tmp_path / "in/store")
    place.run.mkdir(parents=True)
    await save(place.snapshots())
    return place


def outside(place: qsnap.Place) -> set[Path]:
    """Everything around the two directories, and what is in the store."""
    return {path for path in place.run.parents[1].rglob("*") if place.run not in path.parents}


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_names_lead_nowhere(call: Callable[..., Awaitable[Any]], name: str, place: qsnap.Place) -> None:
    before = outside(place)
    with pytest.raises(qsnap.StateError, match="is not a name"):
        await call(name, place=place)
    assert outside(place) == before
    assert {path.name for path in place.run.iterdir()} <= {"lab.lock"}


@pytest.mark.parametrize("name", ["../lab", "/etc", "lab;id"])
@pytest.mark.parametrize("command", ["ps", "down", "snapshot", "restore", "show", "verify", "rm", "convert"])
def test_names_on_the_command_line(command: str, name: str, tmp_path: Path) -> None:
    directories = ["--run-dir", str(tmp_path / "in/run"), "--store", str(tmp_path / "in/store")]
    (tmp_path / "in").mkdir()
    words = [command, name] if command in ("ps", "down", "snapshot") else [command, name, "s1"]
    assert main([*words, *directories]) == 4
    assert {path.name for path in (tmp_path / "in").rglob("*")} <= {"run"}


def test_the_check_of_names_is_what_refuses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without it, a lock is made outside."""
    monkeypatch.setattr("qsnap.host.runtime.check_names", lambda *names: None)
    with Runtime(tmp_path / "run").locked("../lab"):
        assert (tmp_path / "lab.lock").exists()


SHELLS = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}


def shell_uses(source: str) -> list[int]:
    """The lines that run something through a shell."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if getattr(call.func, "attr", getattr(call.func, "id", "")) in SHELLS
        or any(keyword.arg == "shell" for keyword in call.keywords)
    ]


def test_nothing_runs_through_a_shell() -> None:
    sources = [path for part in ("qsnap", "testbed", "bench") for path in (ROOT / part).rglob("*.py")]
    assert len(sources) > 50
    assert {str(path): found for path in sources if (found := shell_uses(path.read_text()))} == {}


@pytest.mark.parametrize("use", ["os.system('x')", "run('x', shell=True)", "subprocess.getoutput('x')"])
def test_a_shell_would_be_found(use: str) -> None:
    assert shell_uses(f"x = 1\n{use}\n") == [2]
