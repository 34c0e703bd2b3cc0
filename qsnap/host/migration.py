"""What qsnap asks of QEMU's migration: what it can do of a VM, and how a VM gets out of it again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from qsnap.host.qmp import Command, Qmp, QmpError, deadline
from qsnap.host.tasks import one_error

BACKGROUND_CAPABILITIES = frozenset({"background-snapshot", "events"})
PRECOPY_CAPABILITIES = frozenset({"pause-before-switchover", "events"})
#: A precopy that goes on until the destination allows its end, which it never does, or the VM is stopped
HELD_CAPABILITIES = PRECOPY_CAPABILITIES | {"return-path", "switchover-ack"}
FD_NAME = "qsnap-stream"
PAUSED = ("paused", "postmigrate", "finish-migrate")  #: run states that a capture puts a VM into
STEP_TIMEOUT_S = 30.0  #: for every step that pauses a VM
CONT_RETRY_S = 5.0  #: QEMU may refuse `cont` for a few ms after a migration ("not finalized yet")


async def set_capabilities(qmp: Qmp, wanted: frozenset[str]) -> None:
    """Set exactly these of the capabilities that qsnap uses. QEMU checks here whether it can do them."""
    await qmp.execute_all(_only(wanted, await _query_known(qmp)))


async def _query_known(qmp: Qmp) -> frozenset[str]:
    """The migration capabilities that this QEMU has heard of."""
    return frozenset(each["capability"] for each in await qmp.execute("query-migrate-capabilities"))


def _only(wanted: frozenset[str], known: frozenset[str]) -> Command:
    """The command that sets exactly these of the capabilities that qsnap uses. QEMU refuses what it does not know."""
    ours = wanted | known & (BACKGROUND_CAPABILITIES | HELD_CAPABILITIES)
    states = [{"capability": name, "state": name in wanted} for name in sorted(ours)]
    return "migrate-set-capabilities", {"capabilities": states}


async def probe_background(qmp: Qmp) -> str:
    """QEMU's own reason not to do a background snapshot of this VM, or nothing. Changes nothing, pauses nothing."""
    known = await _query_known(qmp)
    try:
        await qmp.execute_all(_only(BACKGROUND_CAPABILITIES, known), _only(frozenset(), known))
    except QmpError as error:
        return error.reason
    return ""


async def probe_migration(qmp: Qmp) -> str:
    """The reasons not to migrate this VM at all, QEMU's and our own, or nothing."""
    info, memory = await qmp.execute_all(("query-migrate", {}), ("query-memory-devices", {}))
    reasons = list(info.get("blocked-reasons", ()))
    for device in memory:
        if device["type"] == "virtio-mem":  # it comes before the RAM, and its length cannot be known
            reasons.append(f"the state of the virtio-mem device {device['data'].get('id', '')} cannot be told from RAM")
    return "; ".join(reasons)


async def query_sent(qmp: Qmp) -> int:
    """Bytes of pages that the last migration sent, zero pages not counted; 0 if there was none."""
    sent: int = (await qmp.execute("query-migrate")).get("ram", {}).get("normal-bytes", 0)
    return sent


async def query_ram(qmp: Qmp) -> dict[str, int]:
    """The RAMBlocks that memory backends are, by idstr, and their sizes in bytes.

    On some old machine types a block is called by the whole QOM path of its backend (host_memory_backend_get_name).
    """
    sizes = {f"/objects/{memdev['id']}": memdev["size"] for memdev in await qmp.execute("query-memdev")}
    by_path = await qmp.execute_all(
        *(("qom-get", {"path": path, "property": "x-use-canonical-path-for-ramblock-id"}) for path in sizes)
    )
    return {
        path if whole else path.removeprefix("/objects/"): size
        for (path, size), whole in zip(sizes.items(), by_path, strict=True)
    }


async def cont(qmp: Qmp) -> None:
    """Let the VM run, retrying while QEMU says that a migration is not finalized yet."""
    with deadline(CONT_RETRY_S, "`cont`", qmp.vm):
        while True:
            try:
                await qmp.execute("cont")
                return
            except QmpError as error:
                if "finaliz" not in error.reason:
                    raise
            await trio.sleep(0.0005)


async def abandon(qmp: Qmp, *, running: bool, read_rest: Callable[[], Awaitable[None]] | None = None) -> None:
    """Leave the VM as it was found before a capture, however far that had come: `running`, or paused.

    Where a migration must not be cancelled (`must_read_to_end`), `read_rest` reads what is left of its stream.
    """
    with suppress(QmpError):  # a stream that no migration has taken up ends here, and with it whoever reads it
        await qmp.execute("closefd", {"fdname": FD_NAME})
    if read_rest is None:
        with deadline(STEP_TIMEOUT_S, "the cancelled migration", qmp.vm):
            await qmp.execute("migrate_cancel")
            await wait_no_migration(qmp)
    else:
        with one_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_rest)
                await wait_no_migration(qmp)
                nursery.cancel_scope.cancel()
    with deadline(STEP_TIMEOUT_S, "the undoing", qmp.vm):
        state = (await qmp.execute("query-status"))["status"]
        if running and state in PAUSED:
            await cont(qmp)
        if not running and state == "running":
            await qmp.execute("stop")
        await set_capabilities(qmp, frozenset())


async def wait_no_migration(qmp: Qmp) -> None:
    """Return once no migration is under way."""
    under_way = ("setup", "active", "device", "pre-switchover", "cancelling")
    while (await qmp.execute("query-migrate")).get("status") in under_way:
        await trio.sleep(0.002)
