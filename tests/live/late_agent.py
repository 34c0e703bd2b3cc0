"""An agent on which one VM reaches its cut long after the others, with colours or, as a negative control, without.

python -m tests.live.late_agent VM coloured|plain agent OPTIONS...
"""

from __future__ import annotations

import sys
from typing import Any

import trio

from qsnap.cli import main
from qsnap.host import saving
from qsnap.host.capture import Background

LATE_S = 2.0


def make_late(vm: str) -> None:
    """Let this VM be late."""
    halt, stop = Background.halt, Background.stop

    async def not_yet(self: Background, nursery: trio.Nursery) -> None:
        if self.qmp.vm == vm:
            await trio.sleep_forever()
        await halt(self, nursery)

    async def late(self: Background, nursery: trio.Nursery) -> None:
        if self.qmp.vm == vm:
            await trio.sleep(LATE_S)
        await stop(self, nursery)

    Background.halt = not_yet  # type: ignore[assignment, method-assign]
    Background.stop = late  # type: ignore[method-assign]


def _no_moves(*arguments: Any) -> list[Any]:
    """All taps stay where they are."""
    return []


if __name__ == "__main__":
    make_late(sys.argv[1])
    if sys.argv[2] == "plain":
        vars(saving)["plan_moves"] = _no_moves
    sys.exit(main(sys.argv[3:]))
