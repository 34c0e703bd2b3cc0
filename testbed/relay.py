"""A relay for hosts that cannot reach each other: OpenVPN as docs/relay.md has it set up, on hosts of a test bed."""

from __future__ import annotations

import math
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio
from attrs import evolve

from testbed.hosts import NamespaceHost

EXAMPLES = Path(__file__).resolve().parents[1] / "docs/examples"
FIRST_MEMBER = 11  #: the last part of its address
UP = b"Initialization Sequence Completed"
START_S = 60.0


class RelayError(Exception):
    """OpenVPN ended, or did not join in time; what it said."""


@asynccontextmanager
async def open_relay(
    relay: NamespaceHost,
    members: Sequence[NamespaceHost],
    identities: Mapping[str, Path],
    directory: Path,
    *,
    start_s: float = START_S,
) -> AsyncIterator[dict[str, NamespaceHost]]:
    """Hosts that are joined by a relay, with the addresses that they have there; by name, the relay's among them.

    `identities` are the PEM files of all, by name. What OpenVPN needs is kept in `directory`.
    """
    addresses = {relay.name: "10.78.0.1"}
    (directory / "members").mkdir()
    for number, member in enumerate(members, start=FIRST_MEMBER):
        addresses[member.name] = f"10.78.0.{number}"
        line = f"ifconfig-push {addresses[member.name]} 255.255.255.0\n"
        (directory / "members" / member.name).write_text(line)
    async with trio.open_nursery() as nursery:
        start = partial(nursery.start, _run_openvpn, start_s)
        await start(relay, _configured("relay.conf", relay, relay, identities, directory))
        async with trio.open_nursery() as joining:
            for member in members:
                configuration = _configured("member.conf", member, relay, identities, directory)
                joining.start_soon(start, member, configuration)
        joined = [relay, *members]
        yield {host.name: evolve(host, address=addresses[host.name], tunnel=addresses[host.name]) for host in joined}
        nursery.cancel_scope.cancel()


def _configured(
    example: str, host: NamespaceHost, relay: NamespaceHost, identities: Mapping[str, Path], directory: Path
) -> Path:
    text = (EXAMPLES / example).read_text().replace("/etc/qsnap/identity.pem", str(identities[host.name]))
    text = text.replace("/etc/qsnap/members", str(directory / "members")).replace("relay.example", relay.address)
    path = directory / f"{host.name}.conf"
    path.write_text(text)
    return path


async def _run_openvpn(
    start_s: float, host: NamespaceHost, configuration: Path, *, task_status: trio.TaskStatus[None]
) -> None:
    """OpenVPN until it is cancelled. It has started once it has joined."""
    command = host.command(["openvpn", "--config", str(configuration), "--suppress-timestamps"])
    said = b""
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, command, check=False, stdout=subprocess.PIPE))
        joined = False
        with trio.CancelScope(deadline=trio.current_time() + start_s) as patience:
            async for chunk in process.stdout:  # it is read to its end: a full pipe would stop OpenVPN
                said += chunk
                if UP in said and not joined:
                    joined, patience.deadline = True, math.inf
                    task_status.started()
        raise RelayError(f"{host.name}: OpenVPN has {'ended' if joined else 'not joined'}:\n{said.decode()}")
