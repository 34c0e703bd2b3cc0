"""What every command can be told: where things are kept, and whether a program reads the answer."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
from attrs import define, field
from click.core import ParameterSource

from qsnap import Place
from qsnap.host.place import default_run_dir, default_store_dir


@define
class Settings:
    """The shared options of one call. `typed` are the directories named on its command line, by option."""

    run_dir: str | None = None
    store: str | None = None
    json: bool = False
    typed: dict[str, str] = field(factory=dict)

    @property
    def place(self) -> Place:
        """Where to look for running VNEs and for snapshots."""
        given = {"run": self.run_dir, "store": self.store}
        return Place(**{name: path for name, path in given.items() if path})

    def command_line(self, command: str, *arguments: str, **options: str) -> str:
        """A command to type next: it looks in the same directories as this one."""
        words = {**self.typed, **{f"--{name}": value for name, value in options.items()}}
        return shlex.join(["qsnap", command, *arguments, *(word for pair in words.items() for word in pair)])


def shared_options(*, environment: bool = False) -> list[click.Parameter]:
    """The options that stand before a command or after it. The environment is asked once, before the command."""
    return [
        _directory("--run-dir", "Where running VNEs are kept.", "QSNAP_RUN", default_run_dir(), environment),
        _directory("--store", "Where snapshots are kept.", "QSNAP_STORE", default_store_dir(), environment),
        click.Option(
            ["--json"],
            is_flag=True,
            help="Print the answer, and any error, as JSON.",
            expose_value=False,
            callback=_keep,
        ),
    ]


def _directory(option: str, purpose: str, variable: str, default: Path, environment: bool) -> click.Option:
    return click.Option(
        [option],
        type=click.Path(file_okay=False),
        envvar=variable if environment else None,
        help=f"{purpose}  [{variable}, else {default}]",
        expose_value=False,
        callback=_keep,
    )


def settings_of(context: click.Context) -> Settings:
    """The settings of this call, made on first use."""
    return context.ensure_object(Settings)


def _keep(context: click.Context, option: click.Parameter, value: Any) -> None:
    assert option.name is not None
    settings = settings_of(context)
    if not value:
        return
    setattr(settings, option.name, value)
    if option.name != "json" and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
        settings.typed[option.opts[0]] = value
