"""Printing: an answer on stdout and an error on stderr, for people or for programs."""

from __future__ import annotations

import errno
import io
import json
import sys
from contextlib import suppress
from typing import Any

import click
from attrs import frozen
from cattrs.preconf.json import make_converter
from rich.console import Console, RenderableType

from qsnap import HostError, QsnapError
from qsnap.cli.settings import Settings

INTERRUPTED = 130  #: 128 + SIGINT, as shells have it
_UNFOLDED = 10_000  #: columns of a pipe: nothing is folded or cut for the program that reads it
_converter = make_converter()


@frozen
class Answer:
    """What a command answers: the `value` that the library returned, and the same for people."""

    value: object
    text: RenderableType


def print_answer(answer: Answer, settings: Settings) -> None:
    """Print an answer on stdout. Raises HostError if that takes it no more, unless it is a pipe that nobody reads."""
    if sys.stdout is None:
        return  # it was closed by whoever started this
    try:
        click.echo(_converter.dumps(answer.value, indent=2) if settings.json else render(answer.text))
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        with suppress(OSError):
            sys.stdout.close()  # or Python would try once more, at its end
        message = f"it is done, but the answer cannot be printed: {error.strerror}"
        raise HostError(message, where="standard output") from error


def render(text: RenderableType) -> str:
    """What to print on stdout: coloured on a terminal, and as wide as it comes anywhere else."""
    terminal = sys.stdout.isatty()
    width = None if terminal else _UNFOLDED
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=width, markup=False, emoji=False, highlight=False
    )
    with console.capture() as captured:
        console.print(text)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def print_error(error: QsnapError | click.ClickException | None, *, as_json: bool) -> int:
    """Print an error on stderr, or that the user interrupted, and return the exit code."""
    report = _report(error)
    if as_json:
        click.echo(json.dumps(report), err=True)
    elif isinstance(error, click.ClickException):
        error.show()
    else:
        console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
        console.print("qsnap: ", style="bold red", end="")
        console.print(f"{report['where']}: {report['message']}" if report["where"] else report["message"])
        for line in (report["advice"], *report.get("notes", ())):
            if line:
                console.print(f"  {line}")
    return error.exit_code if error is not None else INTERRUPTED


def _report(error: QsnapError | click.ClickException | None) -> dict[str, Any]:
    match error:
        case None:
            fields = ("Interrupted", "interrupted", "", "", INTERRUPTED)
        case QsnapError():
            fields = (type(error).__name__, error.message, error.where, error.advice, error.exit_code)
        case _:
            fields = (type(error).__name__, error.format_message(), "", "", error.exit_code)
    report = dict(zip(("error", "message", "where", "advice", "exit_code"), fields, strict=True))
    notes = list(getattr(error, "__notes__", ()))  # such as what was done before it
    return report | ({"notes": notes} if notes else {})
