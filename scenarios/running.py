"""Runs a scenario the three ways: uninterrupted, saved while it works, and from each snapshot again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import trio
from attrs import define, field, frozen

import qsnap
from scenarios.checks import check_history
from scenarios.controls import Control, check_controls, run_controls
from scenarios.history import Finding, History, Run, Sample, Saved, Way
from scenarios.lab import Lab, open_lab
from scenarios.scenario import Scenario, Workload
from testbed.screen import Screen
from testbed.shell import GuestShell, GuestShellError

ENGINES = (qsnap.Engine.BACKGROUND, qsnap.Engine.PRECOPY, qsnap.Engine.RECORD)
WORK_S = 240.0
POLL_S = 0.5
LOGS_S = 10.0


@frozen
class Options:
    """How a scenario is to be run. Snapshots take `engines` and `cuts` in turn, and in the end all pairs."""

    vms: int = 0
    hosts: str = ""
    engines: tuple[qsnap.Engine, ...] = ENGINES
    cuts: tuple[qsnap.Cut, ...] = (qsnap.Cut.COLOUR, qsnap.Cut.BARRIER)
    snapshots: int = 3
    short: bool = False

    def plan(self) -> Iterator[tuple[float, qsnap.Engine, qsnap.Cut]]:
        """The shares of the work at which a snapshot is taken, and how."""
        turns = [
            (engine, self.cuts[(number + shift) % len(self.cuts)])
            for shift in range(len(self.cuts))
            for number, engine in enumerate(self.engines)
        ]
        for number, (engine, cut) in enumerate(islice(cycle(turns), self.snapshots), start=1):
            yield 0.1 + 0.8 * number / (self.snapshots + 1), engine, cut


@frozen
class Failure:
    """Why a scenario came to no end, and what was said meanwhile, by guest."""

    message: str
    consoles: dict[str, str]
    logs: dict[str, str]


@frozen
class Result:
    """What a scenario came to."""

    scenario: str
    claim: str
    vne: qsnap.VNE
    options: Options
    started_s: float  #: since the Unix epoch
    took_s: float
    runs: tuple[Run[Any], ...]
    findings: tuple[Finding, ...] = ()
    controls: tuple[Control, ...] = ()
    failure: Failure | None = None

    @property
    def held(self) -> bool:
        """Whether the claim of the scenario holds."""
        return self.failure is None and bool(self.findings) and all(finding.held for finding in self.findings)


async def run_scenario(scenario: Scenario, options: Options, screen: Screen) -> Result:
    """Run it and judge. What fails in the guests is in the result; QsnapError for what cannot be begun."""
    vne = scenario.vne(options.vms or (scenario.short_vms if options.short else 0))
    started_s, begun_s = time.time(), trio.current_time()
    course = Course(scenario, options, vne, screen)
    failure = None
    try:
        await course.run()
    except Exception:
        if course.failure is None:
            raise
        failure = course.failure
        screen.fault(failure.message)
    took_s = trio.current_time() - begun_s
    result = (scenario.name, scenario.claim, vne, options, started_s, took_s, tuple(course.runs))
    if failure is not None:
        return Result(*result, failure=failure)
    history = History(tuple(course.runs))

    def check(history: History[Any]) -> tuple[Finding, ...]:
        return (*check_history(history), *scenario.check(history))

    findings = check(history)
    controls = run_controls(check, history, course.spoiled)
    return Result(*result, findings=(*findings, check_controls(findings, controls)), controls=controls)


@define
class Course:
    """A scenario on its way: the runs so far, and where it failed."""

    scenario: Scenario
    options: Options
    vne: qsnap.VNE
    screen: Screen
    runs: list[Run[Any]] = field(factory=list)
    spoiled: Any = None
    failure: Failure | None = None

    async def run(self) -> None:
        """All runs. A lab is fresh for the first, and serves all others: a restore needs the store of the snapshots."""
        async with self.lab() as (lab, workload):
            self.runs.append(await self.uninterrupted(lab, workload))
        async with self.lab() as (lab, workload):
            snapshotted = await self.snapshotted(lab, workload)
            self.runs.append(snapshotted)
            for saved in snapshotted.saved:
                self.runs.append(await self.restored(lab, workload, saved))
            await workload.spoil()
            self.spoiled = await workload.outcome()

    @asynccontextmanager
    async def lab(self) -> AsyncIterator[tuple[Lab, Workload]]:
        """A lab with nothing up, and its workload; what is said in it when something fails is kept."""
        with tempfile.TemporaryDirectory(prefix="qsnap-", dir="/var/tmp") as root:
            async with open_lab(self.vne, Path(root), hosts=self.options.hosts) as lab:
                workload = self.scenario.make(lab.shells, self.options.short)
                try:
                    yield lab, workload
                except Exception as error:
                    self.failure = Failure(_text(error), lab.consoles(), await _logs(workload, lab.shells))
                    raise

    async def uninterrupted(self, lab: Lab, workload: Workload) -> Run[Any]:
        """The work, and nothing else."""
        boots = await self.start(lab, workload)
        samples, _ = await self.watch(lab, workload, Way.UNINTERRUPTED.value, ())
        return Run(Way.UNINTERRUPTED, await workload.outcome(), boots, samples)

    async def snapshotted(self, lab: Lab, workload: Workload) -> Run[Any]:
        """The work, and the snapshots in its middle."""
        boots = await self.start(lab, workload)
        plan = tuple(self.options.plan())
        samples, saved = await self.watch(lab, workload, Way.SNAPSHOTTED.value, plan)
        return Run(Way.SNAPSHOTTED, await workload.outcome(), boots, samples, saved, len(plan))

    async def restored(self, lab: Lab, workload: Workload, saved: Saved) -> Run[Any]:
        """All VMs are killed and brought back; then the rest of the work."""
        await lab.kill()
        report = await lab.restore(saved.name)
        samples, _ = await self.watch(lab, workload, f"restored from {saved.name}", ())
        boots = await lab.boots()
        outcome = await workload.outcome()
        return Run(Way.RESTORED, outcome, boots, samples, origin=saved.name, ready_ms=report.ready_ms)

    async def start(self, lab: Lab, workload: Workload) -> dict[str, str]:
        """Boot, and set the work going. Returns how the guests are told from what they are after another boot."""
        with self.screen.step(f"Booting {len(lab.vne.vms)} guests") as done:
            await lab.up()
            boots = await lab.boots()
            done.append(f"{len(lab.vne.vms)} guests have booted")
        with self.screen.step("Setting them to work") as done:
            await workload.start()
            done.append("They are at work")
        return boots

    async def watch(
        self, lab: Lab, workload: Workload, title: str, plan: Sequence[tuple[float, qsnap.Engine, qsnap.Cut]]
    ) -> tuple[tuple[Sample, ...], tuple[Saved, ...]]:
        """Look on until all is done, and take the snapshots of the plan when it is time for them."""
        begun_s = trio.current_time()
        samples: list[Sample] = []
        saved: list[Saved] = []

        async def look() -> Sample:
            at_s = trio.current_time() - begun_s
            samples.append(Sample(at_s, await workload.progress()))
            return samples[-1]

        with self.screen.bar(title) as show, trio.fail_after(WORK_S):
            while min((now := await look()).done.values()) < 1:
                show(now.mean)
                if len(saved) < len(plan) and now.mean >= plan[len(saved)][0]:
                    _, engine, cut = plan[len(saved)]
                    name = f"{engine.value}-{cut.value}-{len(saved) + 1}"
                    taken = await lab.snapshot(name, engine, cut)
                    saved.append(_describe(taken, now, await look()))
                    self.screen.mark(
                        f"Saved {name} at {now.mean:.0%} of the work", f"{saved[-1].downtime_ms:.1f} ms of downtime"
                    )
                else:
                    await trio.sleep(POLL_S)
        self.screen.mark(f"The work is done, {title}", f"{samples[-1].at_s:.1f} s")
        return tuple(samples), tuple(saved)


def _describe(taken: qsnap.Snapshot, before: Sample, after: Sample) -> Saved:
    figures = [vm.measurements for vm in taken.vms]
    return Saved(
        taken.name,
        ", ".join(sorted({vm.engine.value for vm in taken.vms})),
        taken.cut.value,
        before,
        after,
        max(each.downtime_ms for each in figures),
        taken.discrepancy_ms,
        max(each.total_ms for each in figures),
        sum(each.image_bytes for each in figures),
    )


async def _logs(workload: Workload, shells: Mapping[str, GuestShell]) -> dict[str, str]:
    """What the programs said, of those guests that still answer."""
    said: dict[str, str] = {}

    async def ask(name: str, shell: GuestShell) -> None:
        try:
            said[name] = await shell.run(workload.logs, limit_s=LOGS_S)
        except GuestShellError as error:
            said[name] = str(error)

    async with trio.open_nursery() as nursery:
        for name, shell in shells.items():
            nursery.start_soon(ask, name, shell)
    return said


def _text(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "\n".join(_text(each) for each in error.exceptions)
    return str(error) or type(error).__name__
