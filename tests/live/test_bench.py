"""Each benchmark runs to its end, in its smallest form: figures are not judged here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.live.lab import ROOT


@pytest.mark.parametrize("name", ["cost", "downtime", "fleet", "receiver", "restore", "scale", "vne"])
def test_a_benchmark_reports(name: str) -> None:
    command = [sys.executable, "-m", f"bench.{name}", "--quick", "--runs", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"machine", "rows", "bars"}
    assert report["rows"]
    assert all(row.keys() == report["rows"][0].keys() for row in report["rows"])
    assert all(set(bar) == {"name", "value", "limit", "holds"} for bar in report["bars"])
    assert done.returncode == (0 if all(bar["holds"] for bar in report["bars"]) else 1)
