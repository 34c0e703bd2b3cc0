"""What the library offers, whether a VNE is on this host or on many: each function finds out, and does the same.

On this host nothing is in between. On several, every host does its part through its agent, and the parts are put
together. Raises what the functions of `qsnap.host` raise, and ConnectionLostError for an agent that does not answer.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import MappingProxyType

import trio
from attrs import evolve

from qsnap.errors import (
    BusyError,
    ConnectionLostError,
    HostError,
    IntegrityError,
    NotUpError,
    QsnapError,
    StateError,
)
from qsnap.fleet.asking import ask_all, ask_one, ask_parts, gather, on_each, refuse_elsewhere, refuse_saved
from qsnap.fleet.coordinator import carry_out
from qsnap.fleet.spread import known_before, remembered, spread_of, spreads
from qsnap.host import attaching, catalogue, converting, lifecycle, recovery
from qsnap.host.console import connect as connect_console
from qsnap.host.interrupts import interruptible
from qsnap.host.place import Place, Progress, no_progress
from qsnap.host.reporting import Report, write_report
from qsnap.host.tasks import run_all
from qsnap.model import (
    VNE,
    AttachReport,
    Colour,
    Cut,
    DiskEngine,
    Engine,
    Host,
    HostReport,
    Outcome,
    RamMode,
    RestoreOrder,
    RestoreReport,
    Snapshot,
    SnapshotOrder,
    UpOrder,
    VMSnapshot,
    VNEStatus,
)
from qsnap.rules.checks import check_vne
from qsnap.rules.parts import (
    hosts_in_use,
    in_order,
    whole_attach_report,
    whole_report,
    whole_snapshot,
    whole_snapshots,
    whole_status,
    with_missing,
)
from qsnap.wire import messages as m

log = logging.getLogger("qsnap")


@interruptible
async def up(vne: VNE, *, place: Place | None = None, progress: Progress = no_progress) -> VNEStatus:
    """Start all VMs of a VNE, and let them run together.

    Raises ConfigError for a VNE that no description could describe, and StateError if it is up already. On any failure
    everything that was made is taken away again.
    """
    check_vne(vne)
    place = place or Place()
    await refuse_elsewhere(vne, known_before(vne, place), place)
    with remembered(vne, place):
        statuses = await carry_out(UpOrder(vne), spread_of(vne.name, place), place, progress)
    if len(statuses) < len(hosts_in_use(vne)):  # it is up, and the answer of a host was lost
        return await status(vne.name, place=place)
    return in_order(vne, whole_status(statuses))


@interruptible
async def snapshot(
    vne: str,
    name: str | None = None,
    *,
    engine: Engine = Engine.AUTO,
    cut: Cut = Cut.COLOUR,
    disks: DiskEngine = DiskEngine.AUTO,
    place: Place | None = None,
    progress: Progress = no_progress,
) -> Snapshot:
    """Save a running VNE under `name` (default: the date and time), and return what was saved and what it cost.

    The VMs run on. Raises BusyError while another operation is at work on the VNE; EngineRefusedError, and StateError
    for a VM that is dead, has panicked or is shut down, before anything is paused. On any failure it leaves the VMs
    running and nothing behind.
    """
    place = place or Place()
    order = SnapshotOrder(vne, name or time.strftime("%Y%m%d-%H%M%S"), engine, cut, disks)
    whole = spread_of(vne, place)
    if whole is not None:
        await refuse_saved(whole, order.name, place)
    saved = await carry_out(order, whole, place, progress, decide_snapshot)
    if whole is not None and len(saved) < len(hosts_in_use(whole)):  # it is taken, and the answer of a host was lost
        try:
            return await show(vne, order.name, place=place)
        except ConnectionLostError:
            if not saved:
                raise
    return whole_snapshot(saved)


def decide_snapshot(votes: Sequence[tuple[VMSnapshot, ...]]) -> Outcome:
    """What all parts of a snapshot have in common: when it was taken, and how far the VMs' cuts are apart."""
    stops = [vm.measurements.stop_instant_s for vms in votes for vm in vms if vm.was_running]
    return Outcome(time.time(), (max(stops) - min(stops)) * 1e3 if stops else 0.0)


@interruptible
async def restore(
    vne: str,
    name: str,
    *,
    ram: RamMode = RamMode.AUTO,
    qemu: str | None = None,
    paused: bool = False,
    placement: Mapping[str, str] = MappingProxyType({}),
    place: Place | None = None,
    progress: Progress = no_progress,
) -> RestoreReport:
    """Start the VNE again as it was when `name` was saved. `qemu` replaces the program the snapshot names.

    With `paused` the VMs are loaded and not let run. Of a VNE that is spread over hosts, `placement` has those of VMs,
    by VM, that are to be elsewhere than now; such a host fetches what it lacks of the snapshot, and keeps it.

    Raises StateError while the VNE runs, and where a recorded stream is to be mapped; IntegrityError naming the first
    altered file. Whatever fails, nothing stays behind but what was fetched.
    """
    place = place or Place()
    started_s = trio.current_time()
    order = RestoreOrder(vne, name, ram, qemu or "", paused)
    whole = spread_of(vne, place)
    if whole is not None:
        from qsnap.fleet.moving import restore_spread  # as in `ask_one`

        reports = await restore_spread(order, whole, placement, place, progress)
    elif placement:
        raise StateError(f"VNE {vne} is not spread over hosts", advice="Describe them in [hosts] of its description.")
    else:
        reports = await carry_out(order, None, place, progress)
    if not reports:  # it is restored, and the answers of all hosts were lost
        reports = [RestoreReport(await show(vne, name, place=place), 0.0, {}, {})]
    return evolve(whole_report(reports), ready_ms=(trio.current_time() - started_s) * 1e3)


async def status(vne: str, *, place: Place | None = None) -> VNEStatus:
    """The state of one VNE and its VMs. Raises NotUpError if it is not up; of several hosts, if it is up on none.

    VMs of a host that does not answer are `unreachable`. Where no host has it up and one does not answer, raises what
    became of that one.
    """
    place = place or Place()
    whole = spread_of(vne, place)
    if whole is None:
        return await lifecycle.status(vne, place=place)
    parts: dict[str, VNEStatus] = {}
    failures: dict[str, QsnapError] = {}

    async def look(host: Host) -> None:
        try:
            (parts[host.name],) = (await ask_one(host, m.GetStatus(vne), m.Statuses, place)).statuses
        except QsnapError as error:
            failures[host.name] = error

    await run_all([partial(look, host) for host in whole.hosts])
    used = {host.name: failures[host.name] for host in hosts_in_use(whole) if host.name in failures}
    if not parts:
        unknown = [error for error in used.values() if not isinstance(error, NotUpError)]
        raise [*unknown, *used.values()][0]
    return with_missing(whole, parts, used)


async def statuses(*, place: Place | None = None) -> tuple[VNEStatus, ...]:
    """The state of every VNE that is up on this host, or was started from it on others."""
    place = place or Place()
    elsewhere = {vne.name for vne in spreads(place)}
    here = [each for each in await lifecycle.statuses(place=place) if each.name not in elsewhere]
    for vne in sorted(elsewhere):
        try:
            here.append(await status(vne, place=place))
        except NotUpError:
            continue
        except QsnapError as error:  # nobody can say whether it is
            here.append(VNEStatus(vne, "", Colour.RED, "", (), (str(error),)))
    return tuple(here)


@interruptible
async def down(vne: str, *, place: Place | None = None) -> None:
    """End a VNE: its VMs, networks, huge pages and every disk layer that no snapshot holds.

    What its disks held since the last snapshot is lost. Raises StateError if it is not up; of several hosts, if it is
    up on none of them. Where the state file is damaged, its processes and networks are found by name; layers that only
    the file knew stay.
    """
    place = place or Place()
    refuse_live_part(vne, place)
    await on_each(vne, place, m.TakeDown(vne), m.Done, partial(lifecycle.down, vne, place=place))


def refuse_live_part(vne: str, place: Place) -> None:
    """Raise StateError if a VNE is spread over hosts that nobody has told of here."""
    with suppress(NotUpError, HostError):  # where its state is damaged, what is here can be taken down
        if spread_of(vne, place) is None:
            recovery.refuse_part(place.runtime().load(vne).vne, "")


async def snapshots(vne: str | None = None, *, place: Place | None = None) -> tuple[Snapshot, ...]:
    """Every snapshot in the store and on other hosts, of one VNE or of all; of each VNE the oldest first."""
    place = place or Place()
    whole = spread_of(vne, place) if vne else None
    if whole is not None:
        return whole_snapshots(await ask_parts(whole, m.GetSnapshots(whole.name), place))
    found = list(await catalogue.snapshots(vne, place=place))
    if vne is None:
        elsewhere = spreads(place)
        found = [each for each in found if each.vne.name not in {vne.name for vne in elsewhere}]
        for each in elsewhere:
            try:
                found += await snapshots(each.name, place=place)
            except QsnapError as error:  # those of the others can be told
                log.warning("VNE %s: %s", each.name, error)
    return tuple(sorted(found, key=lambda each: (each.vne.name, each.created_s)))


async def show(vne: str, name: str, *, place: Place | None = None) -> Snapshot:
    """What one snapshot holds. Raises StateError if there is none of that name, IntegrityError if it is damaged."""
    place = place or Place()
    whole = spread_of(vne, place)
    if whole is None:
        return await catalogue.show(vne, name, place=place)
    return await gather(whole, m.GetSnapshots(vne, name), place)


async def verify(vne: str, name: str, *, place: Place | None = None, progress: Progress = no_progress) -> Snapshot:
    """Read every file of a snapshot. Raises IntegrityError naming the first that is not what was stored."""
    place = place or Place()
    whole = spread_of(vne, place)
    if whole is None:
        return await catalogue.verify(vne, name, place=place, progress=progress)
    return await gather(whole, m.Verify(vne, name), place, progress)


@interruptible
async def remove(vne: str, name: str, *, place: Place | None = None) -> tuple[str, ...]:
    """Remove a snapshot, and the files that no other snapshot and no running VM needs; returns their paths."""
    place = place or Place()
    whole = spread_of(vne, place)
    if whole is None:
        with suppress(IntegrityError):  # what is damaged can be removed
            recovery.refuse_part((await catalogue.show(vne, name, place=place)).vne, "")
        return await catalogue.remove(vne, name, place=place)
    try:
        replies = await on_each(vne, place, m.Remove(vne, name), m.Names, hosts=whole.hosts)
    except (BusyError, ConnectionLostError) as error:
        error.add_note(f"Other hosts have removed their parts of {name}. Give the command again for the rest.")
        raise
    return tuple(path for reply in replies for path in reply.names)


@interruptible
async def convert(vne: str, name: str, *, place: Place | None = None, progress: Progress = no_progress) -> Snapshot:
    """Turn a snapshot of the engine `record` into the flat form, which can be mapped, and return what it is now."""
    place = place or Place()
    whole = spread_of(vne, place)
    if whole is None:
        return await converting.convert(vne, name, place=place, progress=progress)
    await on_each(vne, place, m.Convert(vne, name), m.Snapshots, hosts=whole.hosts)
    return await show(vne, name, place=place)


@interruptible
async def recover(vne: str | None = None, *, place: Place | None = None) -> tuple[str, ...]:
    """Put right what a killed qsnap has left of one VNE, or of all; the next operation on it would do so too.

    Returns the VNEs that needed it. One that somebody is at work on is left alone; so is, of all, one with hosts that
    cannot be asked.
    """
    place = place or Place()
    whole = spread_of(vne, place) if vne else None
    if whole is None:
        done = set(await recovery.recover(vne, place=place))
        for each in () if vne else spreads(place):
            try:
                done.update(await recover(each.name, place=place))
            except QsnapError as error:
                log.warning("VNE %s: %s", each.name, error)
        return tuple(sorted(done))
    replies = await ask_all(whole, m.Recover(whole.name), m.Names, place)
    return tuple(sorted({name for reply in replies for name in reply.names}))


@interruptible
async def attach(vne: VNE, *, place: Place | None = None) -> AttachReport:
    """Make the running VMs that a description names known to qsnap. They need a QMP socket that nobody else uses.

    Raises ConfigError for a VNE that no description could describe, and AttachRefusedError, by name, for whatever a
    restore could not bring back. On any failure nothing stays.
    """
    check_vne(vne)
    place = place or Place()
    with remembered(vne, place):
        return await (_attach_each(vne, place) if vne.hosts else attaching.attach(vne, place=place))


async def _attach_each(vne: VNE, place: Place) -> AttachReport:
    reports: list[AttachReport] = []
    for host in hosts_in_use(vne):  # one after the other: if one refuses, the others are let go again
        try:
            reply = await ask_one(host, m.Attach(vne.part(host.name)), m.Attached, place)
        except QsnapError:
            for attached in hosts_in_use(vne)[: len(reports)]:
                await ask_one(attached, m.Detach(vne.name), m.Done, place)
            raise
        reports.append(reply.report)
    return whole_attach_report(reports)


@interruptible
async def detach(vne: str, *, place: Place | None = None) -> None:
    """Forget a VNE that qsnap is attached to. Its VMs run on; taps and bridges are as they were found."""
    place = place or Place()
    await on_each(vne, place, m.Detach(vne), m.Done, partial(attaching.detach, vne, place=place))


async def report(
    vne: str,
    names: Iterable[str] = (),
    *,
    page: str | os.PathLike[str] = "report.html",
    png: str | os.PathLike[str] = "",
    place: Place | None = None,
) -> Report:
    """Draw these snapshots of a VNE, or all of them: a timeline each, and how they compare.

    `page` becomes a self-contained HTML file, `png` (optional) the same drawings as a picture; files that are there are
    replaced. Needs the extra `qsnap[report]`.

    Raises:
        StateError: there is no such snapshot.
        HostError: the extra is missing, or a file cannot be written.
    """
    found = [await show(vne, name, place=place) for name in dict.fromkeys(names)] or await snapshots(vne, place=place)
    return await write_report(vne, found, page, png)


async def hosts(vne: str, *, qemu: str = "qemu-system-x86_64", place: Place | None = None) -> tuple[HostReport, ...]:
    """What the agents of a VNE's hosts are and can do, and what is wrong with those that cannot be asked."""
    place = place or Place()
    whole = spread_of(vne, place)
    if whole is None:
        raise StateError(f"VNE {vne} is not spread over hosts", advice="See `qsnap host` for what this one can do.")
    from qsnap.fleet.identity import load_identity  # as in `ask_one`

    load_identity(place.identity)  # one that is missing is no fault of the hosts
    found: dict[str, HostReport] = {}

    async def look(host: Host) -> None:
        try:
            reply = await ask_one(host, m.GetAbilities(qemu), m.Abilities, place)
            found[host.name] = HostReport(host, reply.version, reply.abilities)
        except QsnapError as error:
            found[host.name] = HostReport(host, "", (), error.message, error.advice)

    await run_all([partial(look, host) for host in whole.hosts])
    return tuple(found[host.name] for host in whole.hosts)


def console_path(vne: str, vm: str, *, place: Place | None = None) -> str:
    """The Unix socket of a VM's serial console. Raises StateError if there is no such VM or VNE on this host."""
    place = place or Place()
    if host := _other_host(vne, vm, place):
        raise StateError(f"VM {vm} is on host {host.name}, and so is its socket", advice="See `qsnap.open_console`.")
    return lifecycle.console_path(vne, vm, place=place)


@asynccontextmanager
async def open_console(vne: str, vm: str, *, place: Place | None = None) -> AsyncIterator[trio.SocketStream]:
    """A connection with a VM's serial console, on whatever host it runs. QEMU serves one at a time.

    Raises StateError if there is no such VM or VNE, or it does not answer; BusyError if somebody else is connected.
    """
    place = place or Place()
    if host := _other_host(vne, vm, place):
        from qsnap.fleet.consoles import open_remote_console  # as in `ask_one`

        async with open_remote_console(host, vne, vm, place) as console:
            yield console
        return
    async with connect_console(lifecycle.console_path(vne, vm, place=place), vm=vm) as console:
        yield console


def _other_host(vne: str, vm: str, place: Place) -> Host | None:
    """The host that a VM is on, if not this one. Raises StateError with the names of VMs if it is on none."""
    whole, runtime = spread_of(vne, place), place.runtime()
    if whole is None or (vne in runtime.names() and vm in [each.vm.name for each in runtime.load(vne).vms]):
        return None
    found = next((each for each in whole.vms if each.name == vm), None)
    if found is None:
        names = ", ".join(each.name for each in whole.vms)
        raise StateError(f"VNE {vne} has no VM {vm}", advice=f"It has: {names}")
    return next(host for host in whole.hosts if host.name == found.host)


@asynccontextmanager
async def running(vne: VNE, *, place: Place | None = None) -> AsyncIterator[VNEStatus]:
    """A VNE that is up inside the block and down after it, whatever state it is in by then."""
    runtime = (place or Place()).runtime()
    started = await up(vne, place=place)
    try:
        yield started
    finally:
        with trio.CancelScope(shield=True):
            if vne.hosts or vne.name in runtime.names():
                await down(vne.name, place=place)
