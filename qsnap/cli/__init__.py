"""The command line: parse, call one function of the library, print what it returns."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run qsnap with these arguments, or those of the process, and return its exit code."""
    try:
        from qsnap.cli.run import run  # it takes a moment, in which a Ctrl-C has nothing to undo
    except KeyboardInterrupt:
        print("qsnap: interrupted", file=sys.stderr)
        return 130
    return run(arguments)
