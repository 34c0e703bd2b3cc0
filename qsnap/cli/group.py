"""How qsnap's commands differ from click's: shared options, an example in each help, the exit codes in qsnap's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from qsnap import QsnapError
from qsnap.cli.output import INTERRUPTED
from qsnap.cli.settings import shared_options

MOST_COLUMNS = 100


class Command(click.Command):
    """A command with qsnap's shared options, and an example in its help."""

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        self.params += shared_options()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Example"):
            formatter.write(f"{'':{formatter.current_indent}}{self.example}\n")


class Group(click.Group):
    """Commands, in the order in which they are defined, and examples in the help."""

    command_class = Command

    def __init__(self, *args: Any, examples: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.params += self.shared_options()

    def shared_options(self) -> list[click.Parameter]:
        return shared_options()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Example"):
            for line in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Program(Group):
    """All commands. It asks the environment, and lists the exit codes."""

    def shared_options(self) -> list[click.Parameter]:
        return shared_options(environment=True)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in exit_codes()])
        super().format_epilog(ctx, formatter)


def exit_codes() -> list[tuple[int, str]]:
    """Every exit code with its meaning: the first sentence that the class of the error says of itself."""
    own = [
        (0, "It is done."),
        (2, "The command line is wrong."),
        (INTERRUPTED, "Interrupted; what was begun is undone."),
    ]
    return sorted([*own, *((error.exit_code, _meaning(error)) for error in _error_classes(QsnapError))])


def _error_classes(base: type[QsnapError]) -> Iterator[type[QsnapError]]:
    """The classes of the public errors; private refinements share the exit code of what they refine."""
    if "exit_code" in vars(base):
        yield base
    for error in base.__subclasses__():
        yield from _error_classes(error)


def _meaning(error: type[QsnapError]) -> str:
    if error is QsnapError:
        return "Another error, described on stderr."
    first, _, _ = " ".join((error.__doc__ or "").split()).partition(". ")
    return f"{first.removesuffix('.')}."
