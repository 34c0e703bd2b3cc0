"""Questions to the agents of a VNE's hosts, side by side; and what their answers are together."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from qsnap.errors import BusyError, ConnectionLostError, NotUpError, QsnapError, StateError
from qsnap.fleet.spread import spread_of
from qsnap.host.place import Place, Progress, no_progress
from qsnap.host.tasks import run_all, run_each
from qsnap.model import VNE, Host, Snapshot
from qsnap.rules.parts import hosts_in_use, whole_snapshot, whole_vms
from qsnap.wire import messages as m

M = TypeVar("M")
log = logging.getLogger("qsnap")


async def ask_one(host: Host, message: m.Message, kind: type[M], place: Place, progress: Progress = no_progress) -> M:
    """Have the agent of one host do something that is done when it answers."""
    from qsnap.fleet.channel import connect
    from qsnap.fleet.identity import load_identity  # TLS and certificates take a while to import, and few need them
    from qsnap.fleet.remote import ask

    async with connect(host, load_identity(place.identity)) as connection:
        return await ask(connection, message, kind, progress)


async def ask_all(
    whole: VNE, message: m.Message, kind: type[M], place: Place, progress: Progress = no_progress
) -> list[M]:
    """The same of all hosts that have VMs of a VNE, side by side."""
    return await run_all([partial(ask_one, host, message, kind, place, progress) for host in hosts_in_use(whole)])


async def gather(whole: VNE, message: m.Message, place: Place, progress: Progress = no_progress) -> Snapshot:
    """The snapshot that hosts have parts of."""
    return whole_snapshot(await ask_parts(whole, message, place, progress))


async def ask_parts(whole: VNE, message: m.Message, place: Place, progress: Progress = no_progress) -> list[Snapshot]:
    """What all hosts have of snapshots: VMs may have been elsewhere. Hosts without VMs need not answer."""
    missing: dict[Host, StateError] = {}

    async def ask_for(host: Host) -> tuple[Snapshot, ...]:
        try:
            return (await ask_one(host, message, m.Snapshots, place, progress)).snapshots
        except BusyError:
            raise
        except StateError as error:
            missing[host] = error
        except ConnectionLostError as error:
            if host in hosts_in_use(whole):
                raise
            log.warning("%s", error)
        return ()

    parts = [part for found in await run_all([partial(ask_for, host) for host in whole.hosts]) for part in found]
    found = whole_vms(parts)
    for host, error in missing.items():
        if not parts or any(host.name in (vm.host, vm.keeper) and vm.name not in found for vm in whole.vms):
            raise error
    return parts


async def refuse_saved(whole: VNE, name: str, place: Place) -> None:
    """Raise StateError if a host that has no VMs now has a snapshot of that name. The others find out by themselves."""

    async def look(host: Host) -> None:
        with suppress(StateError, ConnectionLostError):
            await ask_one(host, m.GetSnapshots(whole.name, name), m.Snapshots, place)
            taken.append(host.name)

    taken: list[str] = []
    used = hosts_in_use(whole)
    await run_all([partial(look, host) for host in whole.hosts if host not in used])
    if taken:
        message = f"there is a snapshot {name} of {whole.name}"
        raise StateError(message, where=f"host {taken[0]}", advice="Choose another name, or remove it.")


async def refuse_elsewhere(vne: VNE, known: VNE | None, place: Place) -> None:
    """Raise StateError if a VNE is up on a host that is not to have VMs of it. The others find out by themselves."""

    async def look(host: Host) -> None:
        try:
            await ask_one(host, m.GetStatus(vne.name), m.Statuses, place)
            up.append(host.name)
        except NotUpError:
            pass
        except QsnapError as error:  # it is not needed now, and may be gone for good
            log.warning("%s", error)

    up: list[str] = []
    known_hosts = {host.name: host for each in (known, vne) if each is not None for host in each.hosts}
    used = {host.name for host in hosts_in_use(vne)}
    await run_all([partial(look, host) for host in known_hosts.values() if host.name not in used])
    if up:
        advice = f"Take it down first: qsnap down {vne.name}"
        raise StateError(f"VNE {vne.name} is up there already", where=f"host {up[0]}", advice=advice)


async def on_each(
    vne: str,
    place: Place,
    message: m.Message,
    kind: type[M],
    here: Callable[[], Awaitable[None]] | None = None,
    hosts: Sequence[Host] = (),
) -> list[M]:
    """Have these hosts, or all that are described, do something that can be done again.

    VMs may be elsewhere than is known here. That one has nothing to do is a fault only if all have; a host that is
    known to have no VMs need not answer.
    """
    whole = spread_of(vne, place)
    if whole is None:
        assert here is not None
        await here()
        return []
    done: list[M] = []
    idle: list[StateError] = []

    async def do(host: Host) -> None:
        try:
            done.append(await ask_one(host, message, kind, place))
        except BusyError:
            raise
        except StateError as error:
            idle.append(error)
        except QsnapError as error:
            if hosts or host in hosts_in_use(whole):
                raise
            log.warning("%s", error)

    await run_each([partial(do, host) for host in hosts or whole.hosts])
    if not done:
        raise idle[0]
    return done
