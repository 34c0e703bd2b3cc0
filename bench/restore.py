"""How long a 512 MiB guest takes to run again, mapped and eagerly, next to the same QEMU's start to its greeting.

Run by `scripts/bench restore [--json] [--runs N]`; medians of at least 5 runs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trio

import qsnap
from bench.downtime import MEMORY_MIB, runs
from bench.guest import QEMU, RATES, running_guest, temporary_place
from bench.report import median, report
from qsnap import Backing, RamMode
from qsnap.host.qmp import open_loop, open_qmp


async def start_to_greeting() -> float:
    """Milliseconds from starting a bare QEMU to its first QMP greeting: nothing that starts one can be faster."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = f"{directory}/qmp.sock"
        command = [QEMU, "-S", "-display", "none", "-nodefaults", "-m", f"{MEMORY_MIB}M"]
        started = time.perf_counter()
        process = await trio.lowlevel.open_process([*command, "-qmp", f"unix:{path},server=on,wait=off"])
        try:
            while not Path(path).exists():
                await trio.sleep(0.001)
            async with open_loop(), open_qmp(path, vm="bare"):
                return (time.perf_counter() - started) * 1e3
        finally:
            process.kill()
            await process.wait()


async def measure(rate: int) -> list[dict[str, Any]]:
    """Rows for one dirty rate: it decides how much of the image is not empty."""
    rows = []
    with temporary_place() as place:
        async with running_guest(place, memory_mib=MEMORY_MIB, rate=rate, backing=Backing.ANONYMOUS):
            saved = await qsnap.snapshot("bench", "one", place=place)
        for mode in (RamMode.MAP, RamMode.EAGER):
            times = []
            for _ in range(runs()):
                times.append((await qsnap.restore("bench", "one", ram=mode, place=place)).ready_ms)
                await qsnap.down("bench", place=place)
            rows.append(
                {
                    "rate_mb_s": rate,
                    "what": f"qsnap restore, {mode.value}",
                    "image_mib": saved.vms[0].measurements.image_bytes >> 20,
                    "running_after_ms": median(times),
                }
            )
    return rows


async def main() -> int:
    rows = [row for rate in RATES for row in await measure(rate)]
    bare = [await start_to_greeting() for _ in range(runs())]
    rows.append({"rate_mb_s": "", "what": "QEMU start to greeting", "image_mib": "", "running_after_ms": median(bare)})
    return report(rows, [])


if __name__ == "__main__":
    sys.exit(trio.run(main))
