"""Ways to save one running guest: qsnap's engines, and what others do on the same VM.

All write to the same tmpfs, or to a reader that keeps nothing. Every way leaves the VM running, and has a
second half that removes what it made.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import trio
from attrs import frozen

import qsnap
from bench.guest import VNE, Guest, pause_ms, stop_s
from qsnap.errors import EngineRefusedError, HostError
from qsnap.host.migration import BACKGROUND_CAPABILITIES, cont, set_capabilities
from qsnap.host.qmp import Qmp, QmpEvent
from qsnap.model import Engine

SNAPSHOT = "one"
PIPE_BYTES = 1 << 20  #: what qsnap's own has at least
POLL_S = 0.002
#: QEMU's own defaults, which minimega leaves as they are (qmp.MigrateDisk); qsnap sets others
QEMU_LIMITS = {"max-bandwidth": 128 << 20, "downtime-limit": 300}
NO_LIMITS = {"max-bandwidth": 0, "downtime-limit": 1}


@frozen
class Saved:
    """What saving a guest once cost it. `how` tells what was done, where there was a choice.

    `stop_s` is when it was stopped, on the clock of `qsnap.host.clock`, where the way tells.
    """

    pause_ms: float
    total_ms: float
    how: str = ""
    stop_s: float = 0.0


async def _nothing(guest: Guest) -> None:
    pass


@frozen
class Way:
    """A way to save a guest, and to remove what that left."""

    name: str
    save: Callable[[Guest], Awaitable[Saved]]
    tidy: Callable[[Guest], Awaitable[None]] = _nothing


# ---- qsnap ----


def by_qsnap(engine: Engine) -> Way:
    """A snapshot of the whole VNE, which is this one guest."""
    return Way(f"qsnap {engine.value}", partial(_snapshot, engine), _remove)


async def _snapshot(engine: Engine, guest: Guest) -> Saved:
    (vm,) = (await qsnap.snapshot(VNE, SNAPSHOT, engine=engine, place=guest.place)).vms
    return Saved(vm.measurements.downtime_ms, vm.measurements.total_ms, vm.engine.value)


async def _remove(guest: Guest) -> None:
    await qsnap.remove(VNE, SNAPSHOT, place=guest.place)


async def engines(guest: Guest) -> list[Engine]:
    """`auto`, and of those that can capture this guest all that `auto` does not take."""
    able: dict[str, Engine] = {}
    for engine in Engine:
        try:
            saved = await _snapshot(engine, guest)
        except EngineRefusedError:
            continue
        except HostError:  # its stream outgrew its limit, as it may again, or not
            able[engine.value] = engine
            continue
        await _remove(guest)
        able.setdefault(saved.how, engine)
    return list(able.values())


# ---- QEMU alone ----


async def migrate_into_null(guest: Guest, capabilities: frozenset[str]) -> Saved:
    """QEMU's own migration, at its fastest, into a reader that keeps nothing: no disk, no tap."""
    async with guest.monitor() as qmp:
        await set_capabilities(qmp, capabilities | {"events"})
        await qmp.execute("migrate-set-parameters", NO_LIMITS)
        inlet, outlet = os.pipe()
        fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        await qmp.send_fd("null", outlet)
        os.close(outlet)
        since, started_s = len(qmp.events), trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read_all, inlet)
            await qmp.execute("migrate", {"uri": "fd:null"})
            await wait_migrated(qmp, since)
            if not any(event.name == "RESUME" for event in qmp.events[since:]):
                await cont(qmp)
        total_ms = (trio.current_time() - started_s) * 1e3
        await wait_resumed(qmp, since)
        await set_capabilities(qmp, frozenset())
        return Saved(pause_ms(qmp.events[since:]), total_ms)


def read_all(fd: int) -> None:
    """Read to the end and keep nothing."""
    with open(fd, "rb", buffering=0) as stream:
        buffer = bytearray(1 << 20)
        while stream.readinto(buffer):
            pass


async def wait_migrated(qmp: Qmp, since: int) -> None:
    """Return when the outgoing migration has ended well."""
    ends = ("completed", "failed", "cancelled")
    event = await qmp.wait_event(lambda event: event.name == "MIGRATION" and event.data["status"] in ends, since=since)
    assert event.data["status"] == "completed", await qmp.execute("query-migrate")


async def wait_resumed(qmp: Qmp, since: int) -> QmpEvent:
    """The event of the VM running again."""
    return await qmp.wait_event(lambda event: event.name == "RESUME", since=since)


QEMU_ALONE = Way("QEMU alone, background", partial(migrate_into_null, capabilities=BACKGROUND_CAPABILITIES))


# ---- snapshot-save ----


async def _snapshot_save(guest: Guest) -> Saved:
    """`snapshot-save`: memory goes into a qcow2 file of its own, the disk gets an internal snapshot."""
    async with guest.monitor() as qmp:
        await _add_vmstate(guest, qmp)
        arguments = {"job-id": "save", "tag": SNAPSHOT, "vmstate": "vmstate", "devices": ["vmstate", _top(guest)]}
        return await _run_job(qmp, "snapshot-save", arguments)


async def _add_vmstate(guest: Guest, qmp: Qmp) -> None:
    path = vmstate_path(guest)
    command = [str(Path(_vm(guest).qemu).with_name("qemu-img")), "create", "-q", "-f", "qcow2", str(path), "1M"]
    await trio.run_process(command)
    file = {"driver": "file", "filename": str(path)}
    await qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "vmstate", "file": file})


def vmstate_path(guest: Guest) -> Path:
    """Where `snapshot-save` has memory and device state."""
    return guest.place.run.parent / "vmstate.qcow2"


async def _run_job(qmp: Qmp, command: str, arguments: Mapping[str, object]) -> Saved:
    since, started_s = len(qmp.events), trio.current_time()
    await qmp.execute(command, arguments)
    await qmp.wait_event(
        lambda event: event.name == "JOB_STATUS_CHANGE" and event.data["status"] == "concluded", since=since
    )
    total_ms = (trio.current_time() - started_s) * 1e3
    (job,) = await qmp.execute("query-jobs")
    assert "error" not in job, job
    await qmp.execute("job-dismiss", {"id": job["id"]})
    paused = any(event.name == "STOP" for event in qmp.events[since:])
    return Saved(pause_ms(qmp.events[since:]) if paused else 0.0, total_ms)


async def _snapshot_delete(guest: Guest) -> None:
    async with guest.monitor() as qmp:
        arguments = {"job-id": "delete", "tag": SNAPSHOT, "devices": ["vmstate", _top(guest)]}
        await _run_job(qmp, "snapshot-delete", arguments)
        await qmp.execute("blockdev-del", {"node-name": "vmstate"})
    vmstate_path(guest).unlink()


SNAPSHOT_SAVE = Way("snapshot-save", _snapshot_save, _snapshot_delete)


# ---- stop, migrate, copy the disks, cont ----


async def _stop_and_copy(limits: dict[str, int], guest: Guest) -> Saved:
    """What minimega does; the disks that are copied are the qcow2 layers of this VM, which hold little."""
    directory = copy_directory(guest)
    directory.mkdir()
    async with guest.monitor() as qmp:
        await set_capabilities(qmp, frozenset({"events"}))
        await qmp.execute("migrate-set-parameters", limits)
        since, started_s = len(qmp.events), trio.current_time()
        await qmp.execute("stop")
        await qmp.execute("migrate", {"uri": f"exec:cat > {directory}/memory"})
        await wait_migrated(qmp, since)
        layers = (layer.path for disk in _live(guest).disks for layer in disk.layers)
        await trio.run_process(["cp", *layers, str(directory)])
        await cont(qmp)
        await wait_resumed(qmp, since)
        await set_capabilities(qmp, frozenset())
        events, total_ms = qmp.events[since:], (trio.current_time() - started_s) * 1e3
        return Saved(pause_ms(events), total_ms, stop_s=stop_s(events))


def copy_directory(guest: Guest) -> Path:
    """Where the copy is: `memory` and the disks."""
    return guest.place.run.parent / f"copy-{guest.name}"


async def _remove_copy(guest: Guest) -> None:
    shutil.rmtree(copy_directory(guest))


STOP_AND_COPY = Way("stop, migrate, cp, cont", partial(_stop_and_copy, QEMU_LIMITS), _remove_copy)
STOP_AND_COPY_UNLIMITED = Way(
    "stop, migrate, cp, cont; bandwidth unlimited", partial(_stop_and_copy, NO_LIMITS), _remove_copy
)


def _live(guest: Guest) -> qsnap.host.runtime.LiveVM:
    return guest.place.runtime().load(VNE).find(guest.name)


def _vm(guest: Guest) -> qsnap.VM:
    return _live(guest).vm


def _top(guest: Guest) -> str:
    return _live(guest).disks[0].node
