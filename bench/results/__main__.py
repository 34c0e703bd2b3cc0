"""Measure after the papers and make docs/results.md, or some of its parts: scripts/bench results [--only PART,...]."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import trio

from bench.guest import QEMU, ROOT
from bench.report import machine
from bench.results import breakdown, engines, programs, scaling, sequence, slowdown
from bench.results.drawing import svg
from bench.results.page import Data, assemble
from bench.results.part import Part, encode_rows, parse_rows
from qsnap.cli.output import INTERRUPTED
from qsnap.cli.signals import run_until_signal
from qsnap.host.qemu import kvm_works
from testbed.screen import Screen

PARTS = (
    engines.PART,
    sequence.PART,
    scaling.PART,
    breakdown.PART,
    breakdown.SWARM_PART,
    slowdown.PART,
    programs.PART,
)
RUNS = 3
PAGE = ROOT / "docs/results.md"
DATA = ROOT / "docs/results"
MEASURED = DATA / "measured.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, then make the page of all that there is."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(names), help=f"parts to measure: {','.join(names)} (default all)")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each figure, for its median (default {RUNS})")
    parser.add_argument("--page", action="store_true", help="measure nothing: the figures and the page out of the data")
    options = parser.parse_args(arguments)
    chosen = [] if options.page else options.only.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"no part is called {min(unknown)}: there are {', '.join(names)}")
    screen = Screen()
    DATA.mkdir(exist_ok=True)
    for part in PARTS:
        if part.name in chosen:
            screen.say(part.title, "bold")
            try:
                measure(part, 1 if part.once else options.runs, screen)
            except KeyboardInterrupt:
                return INTERRUPTED
            write_page()
    write_page()
    screen.say(f"The page: {PAGE}", "dim")
    return 0


def measure(part: Part, runs: int, screen: Screen) -> None:
    """Measure a part and keep its data."""
    before = machine()  # its load is that of the others
    rows = run_until_signal(partial(part.measure, runs, screen))
    told = load_measured()
    told[part.name] = {
        "date": datetime.now(UTC).date().isoformat(),
        "runs": runs,
        "qemu": qemu_version(),
        "accelerator": "KVM" if trio.run(kvm_works, QEMU) else "TCG",
        **before,
    }
    (DATA / f"{part.name}.csv").write_text(encode_rows(rows))
    MEASURED.write_text(json.dumps(told, indent=1) + "\n")


def load_measured() -> dict[str, Any]:
    """On what each part was measured."""
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {}


def qemu_version() -> str:
    """As QEMU tells it."""
    told = subprocess.run([QEMU, "--version"], check=True, capture_output=True, text=True).stdout
    return told.split()[3]


def write_page() -> None:
    """The figures and the page, out of the data of all parts that there are."""
    data = {
        name: Data(parse_rows((DATA / f"{name}.csv").read_text()), measured)
        for name, measured in load_measured().items()
    }
    for part in PARTS:
        if part.name in data and part.draw is not None:
            (DATA / f"{part.name}.svg").write_bytes(svg(part.draw(data[part.name].rows)))
    PAGE.write_text(assemble(PARTS, data))


if __name__ == "__main__":
    sys.exit(main())
