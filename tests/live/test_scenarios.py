"""The scenarios, short: real programs on few VMs, one snapshot in the middle of their work, and the restore of it."""

from __future__ import annotations

import pytest

import qsnap
from scenarios.running import Options, run_scenario
from scenarios.scenario import load, names
from testbed.screen import Screen


@pytest.mark.parametrize("name", names())
async def test_scenario(name: str) -> None:
    options = Options(engines=(qsnap.Engine.AUTO,), cuts=(qsnap.Cut.COLOUR,), snapshots=1, short=True)
    result = await run_scenario(load(name), options, Screen())
    assert result.failure is None, result.failure
    assert [finding for finding in result.findings if not finding.held] == []
