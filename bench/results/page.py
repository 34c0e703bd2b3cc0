"""docs/results.md out of the data of its parts. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from bench.report import Row
from bench.results.part import Part
from bench.tables import table

HEAD = """\
# Results

Tables and figures after those of the papers that qsnap follows, made by one command: `scripts/bench results`, or
`scripts/bench results --only table1,figure4` for some of them. The data of each lies beside this page, as CSV. How
qsnap does next to other ways to save a VM, and what limits it, is told in [benchmarks.md](benchmarks.md).

Where it says TCG, guests are emulated: with KVM they run much faster, and write more memory in the time that saving
takes. Absolute times are worth little on another machine; the rows of one table can be held against each other.
Numbers are medians, but where it says otherwise. [At the end](#what-the-papers-say-of-themselves) are the papers' own
figures, from other hardware.
"""
#: of their abstracts, but for the two rows on VNsnap that give numbers
PAPERS = """\
## What the papers say of themselves

From other hardware, other hypervisors and other guests, so that no figure here can be held against one above; they
tell what was thought good. Most are what the abstracts give: the rows of the papers' tables were not at hand.

| paper | what | figure |
|---|---|---|
| VNsnap (DSN 2009; Xen) | downtime of a whole VNE | seconds |
| | disruption of TCP, 2 to 16 VMs | 0.0 to 3.8 s |
| | memory its VNsnap-memory needs, of the guest's | 100 % |
| VPC (SBAC-PAD 2012; Xen) | downtime of one VM under NPB, less than VNsnap's | by up to 45 % |
| | downtime of the whole cluster under NPB, less than VNsnap's | by up to 50 % |
| | memory it needs, of the guest's | at most 9 % |
| | work that the guests lose | below 16 % |
| DMTCP (arXiv 1212.1787; KVM, Lguest) | checkpoint, and restart, of one VM: forked, mapped, disks on Btrfs | 0.2 s |
| DMTCP (Cluster 2013) | checkpoint of a network of VMs, by the same means | a fraction of a second |
"""
UNMEASURED = "Not measured."
UNITS = {"ms": "ms", "s": "s", "mib": "MiB", "percent": "%"}
SPELT = {"vm": "VM", "vms": "VMs", "tcp": "TCP", "ram": "RAM"}


@frozen
class Data:
    """What was measured of one part: its rows, and on what, when, how often."""

    rows: Sequence[Row]
    measured: Mapping[str, Any]


def assemble(parts: Sequence[Part], data: Mapping[str, Data]) -> str:
    """The page. Parts without data are named as not measured."""
    sections = [HEAD, *("\n".join(_section(part, data.get(part.name))) for part in parts), PAPERS]
    return "\n".join(sections)


def _section(part: Part, data: Data | None) -> Iterator[str]:
    yield f"## {part.title}\n"
    if data is None:
        yield f"{UNMEASURED} `scripts/bench results --only {part.name}` does.\n"
        return
    yield f"{part.text}\n"
    yield f"{describe_measured(data.measured)} Data: [{part.name}.csv](results/{part.name}.csv).\n"
    yield from table([{with_unit(name): _shown(value) for name, value in row.items()} for row in part.table(data.rows)])
    yield ""
    if part.draw is not None:
        yield f"![{part.title}](results/{part.name}.svg)\n"


def describe_measured(measured: Mapping[str, Any]) -> str:
    """On what, when, and how often."""
    runs = "one run" if measured["runs"] == 1 else f"{measured['runs']} runs of each"
    return (
        f"{measured['date']}, {runs}; {measured['cpu']}, {measured['cores']} cores, "
        f"{measured['memory_gib']} GiB, Linux {measured['kernel']}, QEMU {measured['qemu']}, "
        f"{measured['accelerator']}; load before: {measured['load']}."
    )


def with_unit(name: str) -> str:
    """A key as a column's head has it, with its unit."""
    *words, last = name.split("_")
    if last not in UNITS or not words:
        return " ".join(SPELT.get(word, word) for word in (*words, last))
    return f"{' '.join(SPELT.get(word, word) for word in words)}, {UNITS[last]}"


def _shown(value: object) -> object:
    """Numbers as far as they are worth reading."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return value
