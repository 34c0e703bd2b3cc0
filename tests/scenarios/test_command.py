"""The command `python -m scenarios`, where guests are not built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from scenarios import scenario
from scenarios.__main__ import main
from scenarios.scenario import HERE, names


@pytest.fixture
def without_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptions as they are, of files that are not there."""
    for name in names():
        (tmp_path / "of/all" / name).mkdir(parents=True)
        shutil.copy(HERE / name / "vne.toml", tmp_path / "of/all" / name)
        (tmp_path / "of/all" / name / "workload.py").touch()
    monkeypatch.setattr(scenario, "HERE", tmp_path / "of/all")


@pytest.mark.usefixtures("without_guests")
def test_list_tells_that_they_are_not_built() -> None:
    result = CliRunner().invoke(main, ["list"])
    assert result.exit_code == 0, result.output
    assert [line for line in result.output.splitlines() if line.endswith("(its guests are not built yet)")] == [
        f"{name} (its guests are not built yet)" for name in names()
    ]


@pytest.mark.usefixtures("without_guests")
def test_run_tells_what_builds_them() -> None:
    result = CliRunner().invoke(main, ["run", "postgres", "--page", "/nonexistent/page.html"])
    assert result.exit_code == 3
    assert "defaults.qemu" in result.output
    assert "scripts/images" in result.output


def test_list_counts_vms() -> None:
    result = CliRunner().invoke(main, ["list"])
    assert result.exit_code == 0, result.output
    assert "partition (3 VMs)" in result.output
