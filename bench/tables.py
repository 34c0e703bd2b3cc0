"""Markdown tables of benchmark reports, for docs/benchmarks.md: python -m bench.tables REPORT.json..."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The lines of a table, one row for each dict."""
    for number, row in enumerate(rows):
        if not number:
            yield f"| {' | '.join(name.replace('_', ' ') for name in row)} |"
            yield f"|{'---|' * len(row)}"
        yield f"| {' | '.join('' if value is None else str(value) for value in row.values())} |"


def main() -> None:
    for name in sys.argv[1:]:
        report = json.loads(Path(name).read_text())
        print(f"## {Path(name).stem}\n\n{report['machine']}\n")
        print("\n".join(table(report["rows"])), end="\n\n")
        print("\n".join(table(report["bars"])), end="\n\n")


if __name__ == "__main__":
    main()
