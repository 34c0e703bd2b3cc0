"""After VPC's Table I: saving a virtual cluster that is idle, serves web pages, or computes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import trio

from bench.guest import memory_directory
from bench.report import Row, median
from bench.results.part import Part
from bench.ways import SNAPSHOT
from qsnap.model import Cut, Engine, Snapshot
from scenarios.lab import Lab, open_lab
from scenarios.scenario import Scenario, Workload, load
from testbed.screen import Screen
from testbed.tasks import together

ENGINES = (Engine.RECORD, Engine.PRECOPY, Engine.BACKGROUND)
COMPUTE = "setsid bash -c 'while :; do ((n += n ^ 1)); done' >/dev/null 2>&1 & echo $! >/run/loop.pid"
STOP_COMPUTING = "kill $(</run/loop.pid)"
SETTLE_S = 2.0


async def measure(runs: int, screen: Screen) -> list[Row]:
    """One cluster and its three kinds of work, one after the other."""
    scenario = load("web")
    rows: list[Row] = []
    with memory_directory() as root:
        async with open_lab(scenario.vne(), root) as lab:
            with screen.step("Booting a web server and two clients"):
                await lab.up()
            with screen.step("Saving them idle"):
                rows += await measure_work("idle", lab, runs)
            with screen.step("Saving them while they compute"):
                await _run_everywhere(lab, COMPUTE)
                rows += await measure_work("busy loop", lab, runs)
                await _run_everywhere(lab, STOP_COMPUTING)
            with screen.step("Saving them while Apache serves"):
                rows += await measure_apache(lab, scenario, runs)
    return rows


async def _run_everywhere(lab: Lab, command: str) -> None:
    await together(partial(guest.run, command) for guest in lab.guests.values())


async def measure_apache(lab: Lab, scenario: Scenario, runs: int) -> list[Row]:
    """The load of the scenario goes on by itself, for longer than the snapshots should take."""
    workload: Workload = scenario.make(lab.guests, False)
    await workload.start()
    rows = await measure_work("Apache", lab, runs)
    if min((await workload.progress()).values()) >= 1:
        raise RuntimeError("the load on Apache was over before the last snapshot")
    return rows


async def measure_work(work: str, lab: Lab, runs: int) -> list[Row]:
    """Snapshots by all engines in turn."""
    await trio.sleep(SETTLE_S)
    saved: dict[Engine, list[Snapshot]] = {engine: [] for engine in ENGINES}
    for _ in range(runs):
        for engine in ENGINES:
            saved[engine].append(await lab.snapshot(SNAPSHOT, engine, Cut.COLOUR))
            await lab.remove(SNAPSHOT)
    return [work_row(work, engine, saved[engine]) for engine in ENGINES]


def work_row(work: str, engine: Engine, saved: Sequence[Snapshot]) -> Row:
    """The medians over snapshots of what the VMs took together."""
    taken = [[vm.measurements for vm in snapshot.vms] for snapshot in saved]
    return {
        "work": work,
        "engine": engine.value,
        "duration_ms": median([max(each.total_ms for each in vms) for vms in taken]),
        "longest_downtime_ms": median([max(each.downtime_ms for each in vms) for vms in taken]),
        "most_iterations": median([max(each.iterations for each in vms) for vms in taken]),
        "pages_in_last_iteration": median([sum(each.last_iteration_pages for each in vms) for vms in taken]),
        "size_mib": median([sum(each.image_bytes for each in vms) / (1 << 20) for vms in taken]),
    }


PART = Part(
    "vpc",
    "Idle, Apache, and a busy loop (after VPC, Table I)",
    """\
Three Debian guests, of 256, 160 and 160 MiB in 4 KiB pages, saved together with a coloured cut. *Idle*: only what
starts by itself. *Apache*: the load of the scenario [web](../scenarios/web), two clients that each ask 40 times a
second for files of 512 B to 256 KiB. *Busy loop*: a shell in each guest that computes and writes little memory, in
place of NPB's EP. Pages and size are those of the three VMs together, the rest those of the VM that took most.""",
    measure,
)
