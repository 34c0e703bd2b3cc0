"""Progress bars on a terminal, for what takes longer than a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from attrs import define, field
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Display

from qsnap.host.place import Progress, no_progress
from qsnap.units import size_text

PATIENCE_S = 1.0  #: what is done by then shows no bar
REFRESH_HZ = 4  #: each costs a millisecond, which a snapshot under way should not wait for


@define
class Lines:
    """One line for each VM (or VNE) that the library tells of."""

    display: Display
    known: dict[str, TaskID] = field(factory=dict)

    def tell(self, stage: str, vm: str, done: int, total: int) -> None:
        """Note how far `vm` is; a total of 0 is not known yet."""
        if vm not in self.known:
            self.known[vm] = self.display.add_task(vm, stage=stage, amount="")
        self.display.update(
            self.known[vm], stage=stage, amount=_amount(done, total), completed=done, total=total or None
        )


def _amount(done: int, total: int) -> str:
    """How much is done, in bytes; steps are few and need no numbers."""
    return f"{size_text(done)} of {size_text(total)}" if total > 1 else ""


@contextmanager
def progress_bars(wanted: bool) -> Iterator[Progress]:
    """What to pass to the library as `progress`. The bars are gone when the block ends."""
    console = Console(stderr=True, markup=False, emoji=False)
    if not (wanted and console.is_terminal):
        yield no_progress
        return
    columns = (TextColumn("{task.description}"), TextColumn("{task.fields[stage]}"), BarColumn())
    display = Display(
        *columns, TextColumn("{task.fields[amount]}"), console=console, transient=True, refresh_per_second=REFRESH_HZ
    )
    late = Timer(PATIENCE_S, display.start)
    late.daemon = True
    late.start()
    try:
        yield Lines(display).tell
    finally:
        late.cancel()
        late.join()
        display.stop()
