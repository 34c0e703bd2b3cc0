"""The form that all benchmarks share: their options, the machine, rows of figures, and bars that hold or do not."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrs import asdict, field, frozen
from rich.console import Console
from rich.table import Table

from qsnap.cli.output import INTERRUPTED
from qsnap.cli.signals import run_until_signal

RUNS = 5
COLUMNS = 160  #: where there is no terminal to tell


@frozen
class Bar:
    """A limit that a figure must keep."""

    name: str
    value: float
    limit: float
    holds: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "holds", self.value <= self.limit)


@frozen
class Options:
    """How often each figure is taken; `quick` keeps to the smallest case, to see that the benchmark itself works."""

    runs: int = RUNS
    quick: bool = False


@frozen
class Report:
    """Rows with the same keys, and bars."""

    rows: Sequence[dict[str, Any]]
    bars: Sequence[Bar] = ()


Row = dict[str, Any]
Benchmark = Callable[[Options], Awaitable[Report]]


def run(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark and print its report. Returns the exit status: 1 where a bar does not hold."""
    module = sys.modules[benchmark.__module__]
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="machine, rows and bars as one JSON object")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each figure, for its median (default {RUNS})")
    parser.add_argument("--quick", action="store_true", help="the smallest case only")
    options = parser.parse_args(arguments)
    before = machine()  # its load is that of the others
    try:
        report = run_until_signal(partial(benchmark, Options(options.runs, options.quick)))
    except KeyboardInterrupt:
        return INTERRUPTED
    if options.json:
        print(json.dumps({"machine": before, **asdict(report)}, indent=1))
    else:
        _print_tables(before, report)
    return 0 if all(bar.holds for bar in report.bars) else 1


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


def _print_tables(before: dict[str, object], report: Report) -> None:
    console = Console(width=None if sys.stdout.isatty() else COLUMNS)
    console.print(", ".join(f"{name} {value}" for name, value in before.items()))
    table = Table(*report.rows[0])
    for row in report.rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    for bar in report.bars:
        console.print(f"{'holds' if bar.holds else 'BROKEN'}: {bar.name}: {bar.value} (limit {bar.limit})")
