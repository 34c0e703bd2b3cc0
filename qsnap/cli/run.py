"""From the words of a command line to an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from qsnap import QsnapError
from qsnap.cli.commands import cli
from qsnap.cli.output import print_error
from qsnap.cli.signals import interrupt_on_signals


def run(arguments: Sequence[str] | None) -> int:
    """See `qsnap.cli.main`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    interrupt_on_signals()
    try:
        code = cli.main(words, prog_name="qsnap", standalone_mode=False)
    except (QsnapError, click.ClickException) as error:
        return print_error(error, as_json="--json" in words)
    except click.Abort:
        return print_error(None, as_json="--json" in words)
    return code if isinstance(code, int) else 0
