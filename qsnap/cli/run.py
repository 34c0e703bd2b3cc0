"""From the words of a command line to an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import click

from qsnap import QsnapError
from qsnap.cli.commands import cli
from qsnap.cli.output import print_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run qsnap with these arguments, or those of the process, and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _undo_on_signals()
    try:
        code = cli.main(words, prog_name="qsnap", standalone_mode=False)
    except (QsnapError, click.ClickException) as error:
        return print_error(error, as_json="--json" in words)
    except click.Abort:
        return print_error(None, as_json="--json" in words)
    return code if isinstance(code, int) else 0


def _undo_on_signals() -> None:
    """Let being terminated, or the terminal being closed, undo what was begun, as Ctrl-C does."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, frame: signal.raise_signal(signal.SIGINT))
