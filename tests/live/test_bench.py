"""Each benchmark runs to its end, in its smallest form: figures are not judged here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import trio

from bench.guest import VNE, running_guests, temporary_place
from bench.vne import GUEST, count_timeouts
from qsnap.rules.colouring import tap_name
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


async def test_a_cut_cable_makes_tcp_time_out() -> None:
    """The count by which benchmarks say that there was none: of the guests' kernels, read from outside."""
    with temporary_place() as place:
        async with running_guests(place, vms=2, memory_mib=96, **GUEST) as guests:
            netns = place.runtime().load(VNE).netns
            before = count_timeouts(guests)
            for state in ("down", "up"):
                await trio.run_process(["ip", "-n", netns, "link", "set", tap_name(0, 0), state])
                await trio.sleep(2)
            assert count_timeouts(guests) > before
