"""What an agent answers by itself: one message, one answer, nothing between hosts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from qsnap.fleet.fetching import find_base
from qsnap.host import attaching, catalogue, converting, lifecycle
from qsnap.host.abilities import abilities
from qsnap.host.place import Place
from qsnap.host.recovery import recover
from qsnap.wire import messages as m


async def _status(place: Place, message: m.GetStatus) -> m.Message:
    if message.vne:
        return m.Statuses((await lifecycle.status(message.vne, place=place),))
    return m.Statuses(await lifecycle.statuses(place=place))


async def _down(place: Place, message: m.TakeDown) -> m.Message:
    await lifecycle.down(message.vne, place=place)
    return m.Done()


async def _snapshots(place: Place, message: m.GetSnapshots) -> m.Message:
    if message.name:
        return m.Snapshots((await catalogue.show(message.vne, message.name, place=place),))
    return m.Snapshots(await catalogue.snapshots(message.vne, place=place))


async def _verify(place: Place, message: m.Verify) -> m.Message:
    return m.Snapshots((await catalogue.verify(message.vne, message.name, place=place),))


async def _remove(place: Place, message: m.Remove) -> m.Message:
    return m.Names(await catalogue.remove(message.vne, message.name, place=place))


async def _recover(place: Place, message: m.Recover) -> m.Message:
    return m.Names(await recover(message.vne, place=place))


async def _attach(place: Place, message: m.Attach) -> m.Message:
    return m.Attached(await attaching.attach(message.part, place=place))


async def _detach(place: Place, message: m.Detach) -> m.Message:
    await attaching.detach(message.vne, place=place)
    return m.Done()


async def _convert(place: Place, message: m.Convert) -> m.Message:
    return m.Snapshots((await converting.convert(message.vne, message.name, place=place),))


async def _base(place: Place, message: m.GetBase) -> m.Message:
    return await find_base(place, message)


async def _abilities(place: Place, message: m.GetAbilities) -> m.Message:
    return m.Abilities(version("qsnap"), await abilities(qemu=message.qemu, place=place))


ANSWERS: dict[type[m.Message], Callable[[Place, Any], Awaitable[m.Message]]] = {
    m.GetStatus: _status,
    m.TakeDown: _down,
    m.GetSnapshots: _snapshots,
    m.Verify: _verify,
    m.Convert: _convert,
    m.Remove: _remove,
    m.Recover: _recover,
    m.Attach: _attach,
    m.Detach: _detach,
    m.GetAbilities: _abilities,
    m.GetBase: _base,
}
