"""Names that the shell completes: VNEs and VMs that are up, and snapshots in the store.

Completion must never say anything but names, so whatever goes wrong here gives none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click
import trio
from click.shell_completion import CompletionItem

from qsnap import QsnapError
from qsnap.cli.settings import Settings, settings_of
from qsnap.fleet.spread import spread_of, spreads

Names = Callable[[Settings, dict[str, Any]], Iterable[str]]
Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completer(names: Names) -> Completer:
    """What click asks for the words that may stand at a place; `names` sees the arguments before it."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            found = set(names(settings_of(context), context.params))
        except (QsnapError, OSError):
            return []
        return [CompletionItem(name) for name in sorted(found) if name.startswith(incomplete)]

    return complete


def _running(settings: Settings, _: dict[str, Any]) -> Iterable[str]:
    return (*settings.place.runtime().names(), *_spread(settings))


def _spread(settings: Settings) -> Iterable[str]:
    """VNEs that are, or were, on other hosts, which would have to be asked."""
    return (vne.name for vne in spreads(settings.place))


def _saved(settings: Settings, _: dict[str, Any]) -> Iterable[str]:
    return (*(vne for vne, _ in trio.run(settings.place.snapshots().names)), *_spread(settings))


def _snapshots(settings: Settings, given: dict[str, Any]) -> Iterable[str]:
    names = trio.run(settings.place.snapshots().names, given["vne"])
    return {name for _, name in names} - set(given.get("names") or ())


def _vms(settings: Settings, given: dict[str, Any]) -> Iterable[str]:
    whole = spread_of(given["vne"], settings.place) or settings.place.runtime().load(given["vne"]).vne
    return (vm.name for vm in whole.vms)


complete_running = completer(_running)
complete_saved = completer(_saved)
complete_snapshots = completer(_snapshots)
complete_vms = completer(_vms)
