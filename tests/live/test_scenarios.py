"""The scenarios, short: programs on few VMs, a snapshot or two in the middle of their work, and their restores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from attrs import define, evolve

import qsnap
from qsnap.host.qemu import find_processes
from scenarios.lab import open_lab
from scenarios.running import Options, run_scenario
from scenarios.scenario import load, names
from scenarios.web.workload import Web
from testbed.fleet import INITIATOR, open_fleet
from testbed.hosts import hosts_in_namespaces
from testbed.screen import Screen

#: they take minutes, and images that take minutes to build
LONG = {"ipyparallel", "mpi_hpcc", "mpi_lammps", "postgres", "r_snow"}


@pytest.mark.parametrize("name", sorted({*names()} - LONG))
async def test_scenario(name: str) -> None:
    scenario = load(name)
    many = scenario.epochs or scenario.judge is not None  # of which two can be mixed
    last = qsnap.Engine.RECORD if scenario.epochs else qsnap.Engine.PRECOPY
    engines = (qsnap.Engine.BACKGROUND, last) if many else (qsnap.Engine.AUTO,)
    options = Options(engines=engines, cuts=(qsnap.Cut.COLOUR,), snapshots=len(engines), short=True)
    result = await run_scenario(scenario, options, Screen())
    assert result.failure is None, result.failure
    assert [finding for finding in result.findings if not finding.held] == []


@define
class Failing(Web):
    """Has a command that fails, once the clients ask."""

    async def progress(self) -> dict[str, float]:
        await self.shells["server"].run("echo no more >&2; exit 7")
        return {}


async def test_a_workload_that_fails() -> None:
    """It fails the scenario, with consoles and logs at hand, and leaves nothing up."""
    scenario = evolve(load("web"), make=lambda shells, short: Failing(shells, 50))
    result = await run_scenario(scenario, Options(short=True), Screen())
    assert not result.held
    assert result.failure is not None
    assert "server: `echo no more >&2; exit 7` ended with 7: no more" in result.failure.message
    assert set(result.failure.consoles) == set(result.failure.logs) == {"server", "client-1"}
    assert "guest-shell is ready" in result.failure.consoles["server"]
    assert "AH00094: Command line" in result.failure.logs["server"]


async def test_one_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with open_lab(load("partition").vne(), tmp_path, shells=False) as lab:
            await lab.up()
            scope.cancel()
            await trio.sleep_forever()
    assert not find_processes([str(tmp_path)])


async def test_a_signal_from_the_terminal_leaves_agents_be(memory_path: Path) -> None:
    """Ctrl-C goes to a whole process group: the agents would end, and nobody could take their VMs down."""
    async with hosts_in_namespaces(("alpha", INITIATOR)) as hosts, open_fleet(memory_path, hosts) as fleet:
        assert os.getpgid(fleet.agents["alpha"].pid) != os.getpgid(0)
