"""Restoring a VNE that is spread over hosts: where its VMs go, and how what they need gets there."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

from attrs import evolve, frozen

from qsnap.errors import ConnectionLostError, InDoubtError, QsnapError, StateError
from qsnap.fleet.channel import connect
from qsnap.fleet.coordinator import carry_out
from qsnap.fleet.identity import Identity, load_identity
from qsnap.fleet.remote import ask
from qsnap.fleet.spread import remember
from qsnap.host.lifecycle import DEAD
from qsnap.host.place import Place, Progress
from qsnap.host.restoring import running_error
from qsnap.host.tasks import run_all
from qsnap.model import VNE, Host, RestoreOrder, RestoreReport, Snapshot, VNEStatus
from qsnap.rules.moving import plan_move
from qsnap.rules.parts import whole_vms
from qsnap.wire import messages as m

log = logging.getLogger("qsnap")


async def restore_spread(
    order: RestoreOrder, whole: VNE, placement: Mapping[str, str], place: Place, progress: Progress
) -> list[RestoreReport]:
    """Restore a VNE on the hosts that `placement` says, else on those that `whole` has its VMs on.

    What a host lacks of the snapshot it fetches from another one first, and keeps.
    """
    identity = load_identity(place.identity)
    found = await run_all([partial(_look, host, order, identity) for host in whole.hosts])
    _refuse_running(whole, found)
    move = plan_move(whole, _parts(whole, found, placement), placement)

    async def have_fetched(host: Host) -> None:
        part = move.vne.part(host.name)
        part = evolve(part, vms=tuple(evolve(vm, qemu=order.qemu or vm.qemu) for vm in part.vms))
        message = m.Fetch(part, order.name, move.sources[host.name])
        async with connect(host, identity) as connection:
            await ask(connection, message, m.Snapshots, progress)

    await run_all([partial(have_fetched, host) for host in whole.hosts if host.name in move.sources])
    homes = {vm.host for vm in move.vne.vms}
    for each in found:  # what is left there of a VNE that died
        if each.status and each.host.name not in homes:
            async with connect(each.host, identity) as connection:
                await ask(connection, m.Detach(order.vne) if whole.attached else m.TakeDown(order.vne), m.Done)
    remember(move.vne, place)
    try:
        reports = await carry_out(order, move.vne, place, progress)
    except InDoubtError:
        raise
    except QsnapError:
        remember(whole, place)
        raise
    return [report for report in reports if isinstance(report, RestoreReport)]


@frozen
class _Found:
    """What one host has of the VNE and of the snapshot, or why it has nothing."""

    host: Host
    status: VNEStatus | None = None
    part: Snapshot | None = None
    failure: QsnapError | None = None


async def _look(host: Host, order: RestoreOrder, identity: Identity) -> _Found:
    status, part = None, None
    try:
        async with connect(host, identity) as connection:
            with suppress(StateError):
                status = (await ask(connection, m.GetStatus(order.vne), m.Statuses)).statuses[0]
            part = (await ask(connection, m.GetSnapshots(order.vne, order.name), m.Snapshots)).snapshots[0]
    except (StateError, ConnectionLostError) as error:
        return _Found(host, status, failure=error)
    return _Found(host, status, part)


def _refuse_running(whole: VNE, found: Sequence[_Found]) -> None:
    alive = [vm.name for each in found if each.status for vm in each.status.vms if vm.state != DEAD]
    if alive:
        raise running_error(whole, alive)


def _parts(whole: VNE, found: Sequence[_Found], placement: Mapping[str, str]) -> dict[str, Snapshot]:
    """What each host has of the snapshot. One that has no part in it need not be there."""
    parts = {each.host.name: each.part for each in found if each.part}
    saved = whole_vms(parts.values())
    homes = {vm.host for vm in whole.vms}
    for each in found:
        if isinstance(each.failure, ConnectionLostError):
            if each.host.name in homes and each.host.name not in placement.values():
                each.failure.add_note(
                    f"If {each.host.name} is gone for good, take it out of [hosts] and name the description: "
                    f"no VM may run there and on another host."
                )
            if each.host.name in homes | set(placement.values()) or not saved >= {vm.name for vm in whole.vms}:
                raise each.failure
            log.warning("%s", each.failure)
    if not parts:
        raise next(each.failure for each in found if each.failure)
    return parts
