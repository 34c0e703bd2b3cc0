"""How long a snapshot pauses a 512 MiB guest that dirties 0, 100 and 1000 MB/s, next to QEMU alone.

Run by `scripts/bench downtime [--json] [--runs N]`. The guest has a disk and a tap; medians of at least 5 runs. The
rival is QEMU's own background snapshot of the same guest in the same run, read by a reader that throws it away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import trio

import qsnap
from bench.guest import RATES, running_guest, temporary_place
from bench.report import Bar, median, report
from qsnap import Backing, Engine
from qsnap.host.capture import BACKGROUND_CAPABILITIES, set_capabilities
from qsnap.host.qmp import open_loop, open_qmp

MEMORY_MIB = 512
KINDS = (
    (Engine.AUTO, Backing.HUGETLB),
    (Engine.AUTO, Backing.ANONYMOUS),
    (Engine.BACKGROUND, Backing.ANONYMOUS),
    (Engine.PRECOPY, Backing.HUGETLB),
)
PAUSE_LIMIT_MS = {Backing.HUGETLB: 4.0, Backing.ANONYMOUS: 10.0}  #: of the engine that auto takes


def runs() -> int:
    """How often each figure is taken: 5, or what follows `--runs`."""
    return int(sys.argv[sys.argv.index("--runs") + 1]) if "--runs" in sys.argv else 5


async def save_once(place: qsnap.Place, engine: Engine) -> qsnap.model.VMSnapshot:
    """One snapshot, removed again."""
    saved = await qsnap.snapshot("bench", "one", engine=engine, place=place)
    await qsnap.remove("bench", "one", place=place)
    return saved.vms[0]


async def qemu_alone(place: qsnap.Place) -> tuple[float, float]:
    """(pause, total) in ms of QEMU's own background snapshot into a reader that keeps nothing."""
    path = place.runtime().qmp_path("bench", "vm1")
    async with open_loop(), open_qmp(path, vm="vm1") as qmp:
        await set_capabilities(qmp, BACKGROUND_CAPABILITIES)
        await qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
        inlet, outlet = os.pipe()
        await qmp.send_fd("null", outlet)
        os.close(outlet)
        since, started = len(qmp.events), trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read_all, inlet)
            await qmp.execute("migrate", {"uri": "fd:null"})
            await qmp.wait_event(lambda event: event.data.get("status") == "completed", since=since)
        total_ms = (trio.current_time() - started) * 1e3
        instants = {event.name: event.instant_s for event in qmp.events[since:]}
        await set_capabilities(qmp, frozenset())
    return (instants["RESUME"] - instants["STOP"]) * 1e3, total_ms


def read_all(fd: int) -> None:
    """Read to the end and keep nothing."""
    with open(fd, "rb", buffering=0) as stream:
        buffer = bytearray(1 << 20)
        while stream.readinto(buffer):
            pass


def row(rate: int, backing: Backing, what: str, pauses: Sequence[float], totals: Sequence[float]) -> dict[str, Any]:
    """One line of the table."""
    return {
        "rate_mb_s": rate,
        "ram": backing.value,
        "what": what,
        "pause_ms": median(pauses),
        "pause_max_ms": round(max(pauses), 2),
        "total_ms": median(totals),
    }


async def measure(rate: int, backing: Backing, engines: Sequence[Engine]) -> tuple[list[dict[str, Any]], list[Bar]]:
    """All rows of one guest."""
    rows, bars = [], []
    with temporary_place() as place:
        async with running_guest(place, memory_mib=MEMORY_MIB, rate=rate, backing=backing):
            for engine in engines:
                taken = [await save_once(place, engine) for _ in range(runs())]
                pauses = [vm.measurements.downtime_ms for vm in taken]
                what = f"qsnap {engine.value}" + (f" ({taken[0].engine.value})" if engine is Engine.AUTO else "")
                rows.append(row(rate, backing, what, pauses, [vm.measurements.total_ms for vm in taken]))
                if engine is Engine.AUTO:
                    name = f"pause of auto, {backing.value}, {rate} MB/s"
                    bars.append(Bar(name, median(pauses), PAUSE_LIMIT_MS[backing]))
            alone = [await qemu_alone(place) for _ in range(runs())]
            rows.append(row(rate, backing, "QEMU alone (background)", *zip(*alone, strict=True)))
    return rows, bars


async def main() -> int:
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    for rate in RATES:
        for backing in (Backing.HUGETLB, Backing.ANONYMOUS):
            more_rows, more_bars = await measure(rate, backing, [e for e, b in KINDS if b is backing])
            rows += more_rows
            bars += more_bars
    return report(rows, bars)


if __name__ == "__main__":
    sys.exit(trio.run(main))
