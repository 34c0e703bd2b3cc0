"""How much longer work takes with a snapshot every 10 s."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import trio
from attrs import frozen

import qsnap
from bench.guest import VNE, Guest, running_guests, temporary_place
from bench.report import Row, median
from bench.results.part import Part
from qsnap.model import Backing, Engine
from testbed.screen import Screen

VMS, MEMORY_MIB = 2, 512
GUEST = {"rate_mb": 100, "work": 1}
WORK_S, FIRST_S, PERIOD_S = 20.0, 5.0, 10.0
LOOK_S = 0.005
ENGINES = (Engine.RECORD, Engine.PRECOPY, Engine.BACKGROUND)


@frozen
class Work:
    """What each guest is to get done, in the probe's unit."""

    amounts: Sequence[int]

    async def run_time_s(self, guests: Sequence[Guest]) -> float:
        """How long it takes until all have done it."""
        goals = [guest.probe.sample().work + amount for guest, amount in zip(guests, self.amounts, strict=True)]
        begun_s = trio.current_time()
        while any(guest.probe.sample().work < goal for guest, goal in zip(guests, goals, strict=True)):
            await trio.sleep(LOOK_S)
        return trio.current_time() - begun_s


async def find_work(guests: Sequence[Guest]) -> Work:
    """What they do by themselves in `WORK_S`."""
    before = [guest.probe.sample().work for guest in guests]
    await trio.sleep(WORK_S)
    return Work([guest.probe.sample().work - start for guest, start in zip(guests, before, strict=True)])


async def keep_saving(engine: Engine, place: qsnap.Place, names: list[str]) -> None:
    """A snapshot every `PERIOD_S`, until cancelled."""
    begun_s = trio.current_time()
    for number in count():
        await trio.sleep_until(begun_s + FIRST_S + number * PERIOD_S)
        name = f"{engine.value}-{number}"
        with trio.CancelScope(shield=True):
            await qsnap.snapshot(VNE, name, engine=engine, place=place)
        names.append(name)


async def run_with_snapshots(engine: Engine, work: Work, guests: Sequence[Guest]) -> tuple[float, int]:
    """The run time, and how many snapshots were begun in it. They are removed when it is over."""
    names: list[str] = []
    place = guests[0].place
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_saving, engine, place, names)
        took_s = await work.run_time_s(guests)
        nursery.cancel_scope.cancel()
    for name in names:
        await qsnap.remove(VNE, name, place=place)
    return took_s, len(names)


async def measure(runs: int, screen: Screen) -> list[Row]:
    """Without snapshots and with those of each engine, in turn."""
    without_s: list[float] = []
    with_s: dict[Engine, list[float]] = {engine: [] for engine in ENGINES}
    saved: dict[Engine, list[int]] = {engine: [] for engine in ENGINES}
    with temporary_place() as place:
        guests = running_guests(place, vms=VMS, memory_mib=MEMORY_MIB, backing=Backing.HUGETLB, **GUEST)
        async with guests as running:
            work = await find_work(running)
            for run in range(runs):
                with screen.step(f"Working, with and without snapshots: run {run + 1} of {runs}"):
                    without_s.append(await work.run_time_s(running))
                    for engine in ENGINES:
                        took_s, snapshots = await run_with_snapshots(engine, work, running)
                        with_s[engine].append(took_s)
                        saved[engine].append(snapshots)
    return [run_row(engine.value, without_s, with_s[engine], saved[engine]) for engine in ENGINES]


def run_row(engine: str, without_s: Sequence[float], with_s: Sequence[float], snapshots: Sequence[int]) -> Row:
    """One line of the table."""
    return {
        "engine": engine,
        "snapshots_in_a_run": median(snapshots),
        "run_time_without_s": median(without_s),
        "run_time_with_s": median(with_s),
        "with_over_without": round(median(with_s) / median(without_s), 3),
        "spread_without_percent": round((max(without_s) - min(without_s)) / median(without_s) * 100, 1),
    }


PART = Part(
    "slowdown",
    "Slowdown of the work by a snapshot every 10 s",
    f"""\
{VMS} guests of {MEMORY_MIB} MiB in huge pages, each rewriting 100 MB/s and computing for the rest of its time, have
an amount of work to do that takes them {WORK_S:.0f} s. The run time is until all have done it, with a snapshot
{FIRST_S:.0f} s after the beginning and every {PERIOD_S:.0f} s from then on, over the same without. There are as
many processors as guests: what saves them takes its time from theirs. Runs with and without take turns; the
*spread* is that of the run times without.""",
    measure,
)
