"""What every command can be told: where things are kept, and whether a program reads the answer."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from attrs import define, field
from click.core import ParameterSource

from qsnap import Place, load_description
from qsnap.fleet.spread import known_before, remember, remembered
from qsnap.host.place import default_identity, default_run_dir, default_store_dir
from qsnap.rules.parts import where_known


@define
class Settings:
    """The shared options of one call. `typed` are the directories named on its command line, by option."""

    run_dir: str | None = None
    store: str | None = None
    identity: str | None = None
    json: bool = False
    typed: dict[str, str] = field(factory=dict)

    @property
    def place(self) -> Place:
        """Where to look for running VNEs and for snapshots."""
        given = {"run": self.run_dir, "store": self.store, "identity": self.identity}
        return Place(**{name: path for name, path in given.items() if path})

    def command_line(self, command: str, *arguments: str, **options: str) -> str:
        """A command to type next: it looks in the same directories as this one."""
        words = {**self.typed, **{f"--{name}": value for name, value in options.items()}}
        return shlex.join(["qsnap", command, *arguments, *(word for pair in words.items() for word in pair)])


def shared_options(*, environment: bool = False) -> list[click.Parameter]:
    """The options that stand before a command or after it. The environment is asked once, before the command."""
    return [
        _path("--run-dir", "Where running VNEs are kept.", "QSNAP_RUN", default_run_dir(), environment),
        _path("--store", "Where snapshots are kept.", "QSNAP_STORE", default_store_dir(), environment),
        _path("--identity", "By which other hosts know this one.", "QSNAP_IDENTITY", default_identity(), environment),
        click.Option(
            ["--json"],
            is_flag=True,
            help="Print the answer, and any error, as JSON.",
            expose_value=False,
            callback=_keep,
        ),
    ]


def _path(option: str, purpose: str, variable: str, default: Path, environment: bool) -> click.Option:
    return click.Option(
        [option],
        type=click.Path(),
        envvar=variable if environment else None,
        help=f"{purpose}  [{variable}, else {default}]",
        expose_value=False,
        callback=_keep,
    )


@contextmanager
def vne_named(text: str, place: Place, *, moves: bool = False) -> Iterator[str]:
    """The name of a VNE; a description may stand for it, and tells which hosts it is spread over.

    VMs are taken to be where they are known to be, unless the command `moves` them to where the description says. If
    that fails, what was known before is known again.
    """
    if not text.endswith(".toml"):
        yield text
        return
    vne = load_description(text)
    if moves:
        with remembered(vne, place):
            yield vne.name
        return
    known = known_before(vne, place)
    remember(where_known(vne, known) if known is not None and vne.hosts else vne, place)
    yield vne.name


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
