"""What a program of the test bed shows while it works: steps with a mark and a time, and small tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

COLUMNS = 110


class Screen:
    """What is shown: steps with a mark and a time. On a terminal the step under way turns a spinner."""

    def __init__(self, *, to_stderr: bool = False) -> None:
        self.console = Console(highlight=False, markup=False, emoji=False, stderr=to_stderr)
        if not self.console.is_terminal:
            self.console.width = COLUMNS

    def say(self, text: str = "", style: str = "") -> None:
        """A line."""
        self.console.print(Text(text, style=style))

    @contextmanager
    def step(self, doing: str) -> Iterator[list[str]]:
        """A step that takes time. What is put in the list replaces its text once it is done."""
        done: list[str] = []
        started_s = time.monotonic()
        with self.console.status(doing):
            yield done
        self.mark("".join(done) or doing, f"{time.monotonic() - started_s:.1f} s")

    @contextmanager
    def bar(self, doing: str) -> Iterator[Callable[[float], None]]:
        """A step whose share that is done is known: it is told by calls. Nothing of it is left behind."""
        columns = (TextColumn(" {task.description}", markup=False), BarColumn(), TaskProgressColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(doing, total=1.0)
            yield lambda share: progress.update(task, completed=share)

    def mark(self, text: str, aside: str = "") -> None:
        """Something that is done or holds, and a remark in grey behind it."""
        line = Text.assemble((" ✓ ", "bold green"), text, (f"  {aside}" if aside else "", "dim"))
        self.console.print(line, soft_wrap=True)

    def fault(self, text: str) -> None:
        """Something that does not hold."""
        self.say(f" ✗ {text}", "bold red")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A small table below a step."""
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
        table.add_column("  ")
        for number, title in enumerate(header):
            table.add_column(title, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row("", *row)
        self.console.print(table)
