"""The commands about other hosts: the agent of this one, and a look at all."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from functools import partial

import click
import trio

import qsnap
from qsnap.cli import tables
from qsnap.cli.group import Command
from qsnap.cli.names import complete_saved
from qsnap.cli.output import Answer
from qsnap.cli.settings import Settings, vne_named
from qsnap.cli.signals import run_until_signal
from qsnap.config import AGENT_PORT
from qsnap.host.tasks import one_error

UNIT = """\
[Unit]
Description=qsnap agent: virtual networks that are spread over hosts
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
ExecStart={command}
Restart=always
RestartSec=1
# VMs are to outlive the agent, which finds them again
KillMode=process

[Install]
WantedBy=multi-user.target
"""


@click.command(cls=Command, example="qsnap agent --identity alpha.pem")
@click.option("--address", default="", metavar="IP", help="Listen at this address only.")
@click.option("--port", type=click.IntRange(0, 65535), default=AGENT_PORT, show_default=True, help="0 is any free one.")
@click.option("--allow", multiple=True, metavar="PATTERN", help="Serve these VNEs only; give one or more.")
@click.option("--unit", is_flag=True, help="Print a unit for systemd that does this, and end.")
@click.pass_obj
def agent(settings: Settings, address: str, port: int, allow: tuple[str, ...], unit: bool) -> Answer | None:
    """Serve this host to others: VNEs that are spread over hosts run on it.

    It runs until it is ended. VMs do not end with it, and when it comes back it finishes or undoes what was under way.
    """
    if unit:
        return _unit(settings, address, port, allow)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    with suppress(KeyboardInterrupt):  # which is how it is ended
        run_until_signal(partial(_serve, settings, address, port, allow))
    return None


def _unit(settings: Settings, address: str, port: int, allow: tuple[str, ...]) -> Answer:
    place = settings.place
    words = [sys.executable, "-m", "qsnap.cli", "agent", "--port", str(port)]
    for option, path in (("--run-dir", place.run), ("--store", place.store), ("--identity", place.identity)):
        words += [option, os.path.abspath(path)]
    words += ["--address", address] if address else []
    words += [word for pattern in allow for word in ("--allow", pattern)]
    text = UNIT.format(command=" ".join(_quoted(word) for word in words))
    hints = "Write it to /etc/systemd/system/qsnap-agent.service, then: systemctl enable --now qsnap-agent"
    return Answer({"unit": text}, f"{text}\n# {hints}")


def _quoted(word: str) -> str:
    """A word of a command line as systemd reads it (systemd.syntax(7), systemd.unit(5))."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if set(word) & set(" \t'\"\\;") else escaped


async def _serve(settings: Settings, address: str, port: int, allow: tuple[str, ...]) -> None:
    with one_error():
        async with trio.open_nursery() as nursery:
            found = await nursery.start(qsnap.run_agent, (address, port), settings.place, allow)
            click.echo(f"Listening at {address or '*'}:{found}.")


@click.command(cls=Command, example="qsnap hosts lab")
@click.argument("vne", shell_complete=complete_saved)
@click.option("--qemu", default="qemu-system-x86_64", show_default=True, metavar="PATH", help="The QEMU to ask for.")
@click.pass_obj
def hosts(settings: Settings, vne: str, qemu: str) -> Answer:
    """Show the hosts of a VNE: what their agents can do, and what is wrong with them."""
    place = settings.place
    with vne_named(vne, place) as name:
        found = run_until_signal(partial(qsnap.hosts, name, qemu=qemu, place=place))
    return Answer(found, tables.hosts_text(found))
