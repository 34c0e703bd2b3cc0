"""The form that all benchmarks share: the machine, rows of figures, and bars that hold or do not."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, field, frozen
from rich.console import Console
from rich.table import Table


@frozen
class Bar:
    """A limit that a figure must keep."""

    name: str
    value: float
    limit: float
    holds: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "holds", self.value <= self.limit)


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory_kib = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory_kib[1]) / (1 << 20), 1) if memory_kib else None,
        "kernel": platform.release(),
        "load": round(os.getloadavg()[0], 1),
    }


def median(values: Sequence[float]) -> float:
    """The median, rounded to what is worth reading."""
    return round(statistics.median(values), 2)


def report(rows: Sequence[dict[str, Any]], bars: Sequence[Bar]) -> int:
    """Print everything, as JSON where `--json` was given. Returns the exit status: 1 where a bar does not hold."""
    if "--json" in sys.argv:
        print(json.dumps({"machine": machine(), "rows": list(rows), "bars": [asdict(bar) for bar in bars]}, indent=1))
    else:
        _print_tables(rows, bars)
    return 0 if all(bar.holds for bar in bars) else 1


def _print_tables(rows: Sequence[dict[str, Any]], bars: Sequence[Bar]) -> None:
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    for bar in bars:
        console.print(f"{'holds' if bar.holds else 'BROKEN'}: {bar.name}: {bar.value} (limit {bar.limit})")
