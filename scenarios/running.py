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
from scenarios.controls import Control, Damage, check_controls, run_controls
from scenarios.history import Finding, History, Run, Sample, Saved, Way
from scenarios.lab import Lab, open_lab
from scenarios.scenario import Scenario, Workload
from testbed.screen import Screen
from testbed.shell import GuestShell, GuestShellError

ENGINES = (qsnap.Engine.BACKGROUND, qsnap.Engine.PRECOPY, qsnap.Engine.RECORD)
WORK_S = 600.0  #: for each VM: many share few processors
POLL_S = 0.5
LOGS_S = 10.0
MIXED_S = 30.0  #: beyond twice what is left to do, for programs whose VMs do not belong together


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
            yield 0.1 + 0.6 * number / (self.snapshots + 1), engine, cut


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
    vne = scenario.vne(options.vms or (scenario.short_vms if options.short else scenario.usual_vms))
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
    assert course.damage is not None
    controls = run_controls(check, history, course.damage)
    return Result(*result, findings=(*findings, check_controls(findings, controls)), controls=controls)


@define
class Course:
    """A scenario on its way: the runs so far, and where it failed."""

    scenario: Scenario
    options: Options
    vne: qsnap.VNE
    screen: Screen
    runs: list[Run[Any]] = field(factory=list)
    damage: Damage[Any] | None = None
    kept: dict[str, qsnap.Snapshot] = field(factory=dict)  #: what is there to be restored, by name, in order
    failure: Failure | None = None

    async def run(self) -> None:
        """All runs. A lab is fresh for the first, and serves all others: a restore needs the store of the snapshots."""
        async with self.lab() as (lab, workload):
            self.runs.append(await self.uninterrupted(lab, workload))
        async with self.lab() as (lab, workload):
            self.runs.append(await self.snapshotted(lab, workload))
            for name in self.kept:
                self.runs.append(await self.restored(lab, workload, name))
            self.damage = await self.do_damage(lab, workload)

    @asynccontextmanager
    async def lab(self) -> AsyncIterator[tuple[Lab, Workload]]:
        """A lab with nothing up, and its workload; what is said in it when something fails is kept."""
        with tempfile.TemporaryDirectory(prefix="qsnap-", dir="/var/tmp") as root:
            where = open_lab(self.vne, Path(root), hosts=self.options.hosts, shells=self.scenario.shells)
            async with where as lab:
                workload = self.scenario.make(lab.guests, self.options.short)
                try:
                    yield lab, workload
                except Exception as error:
                    self.failure = Failure(_text(error), lab.consoles(), await _logs(workload, lab.guests))
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

    async def restored(self, lab: Lab, workload: Workload, name: str) -> Run[Any]:
        """All VMs are killed and brought back; then the rest of the work."""
        await lab.kill()
        report = await lab.restore(name)
        return await self.go_on(lab, workload, name, report.ready_ms)

    async def go_on(self, lab: Lab, workload: Workload, origin: str, ready_ms: float) -> Run[Any]:
        """The rest of the work after a restore."""
        samples, _ = await self.watch(lab, workload, f"restored from {origin}", ())
        boots = await lab.boots()
        return Run(Way.RESTORED, await workload.outcome(), boots, samples, origin=origin, ready_ms=ready_ms)

    async def do_damage(self, lab: Lab, workload: Workload) -> Damage[Any]:
        """Make several things wrong, one after the other, for the controls."""
        await workload.spoil()
        outcome, mixed = await workload.outcome(), None
        verdicts: list[tuple[str, Any]] = []
        if not self.kept:  # the work was done before it was time for one, which is a finding
            return Damage(outcome)
        kept, vm = list(self.kept.values()), lab.vne.vms[-1].name
        first, last = kept[0], kept[-1]
        if first is not last and self.scenario.judge is not None:
            for wrong, images in lab.wrong_images(first, last, vm):
                verdicts.append((wrong, await self.judged(images)))
        if first is not last and self.scenario.epochs:
            with self.screen.step(f"Restoring {vm} from {last.name}, the others from {first.name}") as done:
                mixed = await self.mixed(lab, workload, first.name, last.name, vm)
                done.append(f"{vm} was restored from {last.name}, the others from {first.name}")
        lab.flip(last, vm)
        try:
            await lab.verify(last.name)
        except qsnap.IntegrityError as error:
            return Damage(outcome, mixed, tuple(verdicts), str(error))
        return Damage(outcome, mixed, tuple(verdicts))

    async def mixed(self, lab: Lab, workload: Workload, most: str, one: str, vm: str) -> Run[Any] | str:
        """One VM is restored from another snapshot than the others. Why that comes to no end, if it does not."""
        await lab.mix("mixed", most, one, vm)
        await lab.kill()
        report = await lab.restore("mixed")
        left_s = next(run.samples[-1].at_s for run in self.runs if run.origin == most)
        try:
            with trio.fail_after(2 * left_s + MIXED_S):
                return await self.go_on(lab, workload, most, report.ready_ms)
        except Exception as error:  # what programs may do then has no bounds
            return _text(error)

    async def judged(self, images: Mapping[str, Sequence[Path]]) -> Any:
        """What the images of a snapshot say to this scenario."""
        if self.scenario.judge is None:
            return None
        return await trio.to_thread.run_sync(self.scenario.judge, images)

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

        with self.screen.bar(title) as show, trio.fail_after(WORK_S * len(self.vne.vms)):
            while min((now := await look()).done.values()) < 1:
                show(now.mean)
                if len(saved) < len(plan) and now.mean >= plan[len(saved)][0]:
                    _, engine, cut = plan[len(saved)]
                    name = f"{engine.value}-{cut.value}-{len(saved) + 1}"
                    taken = await lab.snapshot(name, engine, cut)
                    after = await look()
                    if self.scenario.judge is not None:
                        await self.make_room(lab, engine, cut)
                        taken = await lab.flatten(taken)
                    self.kept[name] = taken
                    saved.append(_describe(taken, now, after, await self.judged(lab.images(taken))))
                    self.screen.mark(
                        f"Saved {name} at {now.mean:.0%} of the work", f"{saved[-1].downtime_ms:.1f} ms of downtime"
                    )
                else:
                    await trio.sleep(POLL_S)
        self.screen.mark(f"The work is done, {title}", f"{samples[-1].at_s:.1f} s")
        return tuple(samples), tuple(saved)

    async def make_room(self, lab: Lab, engine: qsnap.Engine, cut: qsnap.Cut) -> None:
        """Remove the snapshot before of this engine with this cut, which was judged."""
        for name in [name for name in self.kept if name.startswith(f"{engine.value}-{cut.value}-")]:
            await lab.remove(name)
            del self.kept[name]


def _describe(taken: qsnap.Snapshot, before: Sample, after: Sample, verdict: Any) -> Saved:
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
        verdict,
    )


async def _logs(workload: Workload, guests: Mapping[str, Any]) -> dict[str, str]:
    """What the programs said, of those guests that still answer."""
    said: dict[str, str] = {}

    async def ask(name: str, shell: GuestShell) -> None:
        try:
            said[name] = await shell.run(workload.logs, limit_s=LOGS_S)
        except GuestShellError as error:
            said[name] = str(error)

    async with trio.open_nursery() as nursery:
        for name, guest in guests.items():
            if isinstance(guest, GuestShell):  # what a test guest says is on its console
                nursery.start_soon(ask, name, guest)
    return said


def _text(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "\n".join(_text(each) for each in error.exceptions)
    return str(error) or type(error).__name__
