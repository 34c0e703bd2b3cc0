"""How the owner of an attached VM has set up its migration: put aside for a snapshot, and put back after it."""

from __future__ import annotations

from contextlib import suppress

import trio
from attrs import frozen

from qsnap.host.qmp import QemuGoneError, Qmp


@frozen
class MigrationSettings:
    """The capabilities that are on, and the parameters that qsnap changes."""

    capabilities: tuple[str, ...]
    max_bandwidth: int  #: bytes a second
    downtime_limit: int  #: ms
    switchover_bandwidth: int | None = None  #: bytes a second, 0 for what QEMU measures; not every QEMU knows it


async def read_settings(qmp: Qmp) -> MigrationSettings:
    """The settings as they are now."""
    capabilities, parameters = await qmp.execute_all(
        ("query-migrate-capabilities", {}), ("query-migrate-parameters", {})
    )
    return MigrationSettings(
        capabilities=tuple(each["capability"] for each in capabilities if each["state"]),
        max_bandwidth=parameters["max-bandwidth"],
        downtime_limit=parameters["downtime-limit"],
        switchover_bandwidth=parameters.get("avail-switchover-bandwidth"),
    )


async def set_aside(qmp: Qmp, settings: MigrationSettings) -> None:
    """Turn off the owner's capabilities: an engine takes none but its own."""
    await _switch(qmp, settings.capabilities, on=False)


async def put_back(qmp: Qmp, settings: MigrationSettings) -> None:
    """Set all as it was, unless the VM has died."""
    limits = {"max-bandwidth": settings.max_bandwidth, "downtime-limit": settings.downtime_limit}
    if settings.switchover_bandwidth is not None:
        limits["avail-switchover-bandwidth"] = settings.switchover_bandwidth
    with trio.CancelScope(shield=True), suppress(QemuGoneError):
        await _switch(qmp, settings.capabilities, on=True)
        await qmp.execute("migrate-set-parameters", limits)


async def _switch(qmp: Qmp, capabilities: tuple[str, ...], *, on: bool) -> None:
    states = [{"capability": name, "state": on} for name in capabilities]
    await qmp.execute("migrate-set-capabilities", {"capabilities": states})
