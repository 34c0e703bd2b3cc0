"""Operations on a VNE, one at a time; and what becomes of one whose process was killed.

Every operation writes down what it is about to do (`qsnap.host.journal`). There is one way to undo a snapshot: what its
journal says is taken back, by the process itself after a failure, or by the next one that takes the lock. A snapshot
that was committed is finished instead. Everything here can itself be interrupted at any moment, and done again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import trio
from attrs import evolve, frozen

from qsnap.errors import BusyError, InDoubtError, IntegrityError, QsnapError, StateError
from qsnap.host.bridges import open_links
from qsnap.host.disks import DiskCut, read_disks
from qsnap.host.journal import ABORTED, Interrupted, Journal, Kind, Member, Operation
from qsnap.host.migration import abandon
from qsnap.host.owner import put_back
from qsnap.host.place import Place
from qsnap.host.qemu import end_process, find_processes, has_ended
from qsnap.host.qmp import QemuGoneError, Qmp, open_loop, open_qmp
from qsnap.host.rescue import keep_releasing, release_memory
from qsnap.host.runtime import LiveVM, LiveVNE, Runtime
from qsnap.host.starting import layers_directory
from qsnap.host.store import Store
from qsnap.host.takedown import collect, take_down
from qsnap.host.tasks import one_error, run_all, run_each
from qsnap.model import VNE, Outcome
from qsnap.rules.colouring import plan_direction, plan_moves
from qsnap.rules.engine import must_read_to_end
from qsnap.rules.manifest import snapshot_dir

PUT_RIGHT = "put right"  #: the step of whoever finishes or undoes what another began
PATIENCE_S = 60.0
FORKED_S = 0.3  #: what a qsnap that was killed was just starting may have its lock until it has come to its exec
POLL_S = 0.02
log = logging.getLogger("qsnap")


@asynccontextmanager
async def exclusive(runtime: Runtime, vne: str, *, after_all: bool = False) -> AsyncIterator[Journal]:
    """One operation on a VNE: nobody else is at work on it, there is a loop for QMP, and it fails with one error.

    Raises BusyError if somebody is, unless they are putting things right: that is waited for. What an
    operation that was killed has left behind is put right first, unless `after_all` says that this one takes all of it
    away. Once the caller has begun the journal, nothing of what it did stays if it fails.
    """
    with one_error():
        async with open_loop(), _locked(runtime, vne):
            if not after_all:
                await put_right(vne, runtime)
            journal = runtime.journal(vne)
            try:
                with one_error():  # whose notes the user will see
                    yield journal
            except BaseException as error:
                journal.close()
                with trio.CancelScope(shield=True):
                    await _put_right_after(error, vne, runtime)
                raise
            journal.end()


@asynccontextmanager
async def _locked(runtime: Runtime, vne: str) -> AsyncIterator[None]:
    begun = trio.current_time()
    with ExitStack() as lock:
        while True:
            try:
                lock.enter_context(runtime.locked(vne))
                break
            except BusyError:
                found = runtime.journal(vne).read()
                repairing = found is not None and PUT_RIGHT in found.steps[-1:]
                if trio.current_time() > begun + (PATIENCE_S if repairing else FORKED_S):
                    raise
            await trio.sleep(POLL_S)
        yield


async def _put_right_after(error: BaseException, vne: str, runtime: Runtime) -> None:
    try:
        await put_right(vne, runtime)
    except QsnapError as another:  # the journal stays: the next operation tries again
        error.add_note(f"not all of it could be undone: {another}")


async def put_right(vne: str, runtime: Runtime) -> None:
    """Finish or undo what the journal of a VNE says was begun, if there is one. The caller holds its lock."""
    journal = runtime.journal(vne)
    found = journal.read()
    if found is None:
        journal.end()
        return
    if found.in_doubt:
        await _refuse_doubt(vne, runtime, found.operation)
    journal.note(PUT_RIGHT)
    match found.operation.kind:
        case Kind.SNAPSHOT:
            await put_snapshot_right(vne, runtime, found)
        case Kind.UP | Kind.RESTORE if has_started(vne, runtime, found.operation.id):
            await let_run(runtime.load(vne), runtime)
        case Kind.UP | Kind.RESTORE | Kind.DOWN | Kind.ATTACH | Kind.DETACH:
            await take_down(vne, runtime)
        case Kind.REMOVE:
            in_use = runtime.load(vne).files_in_use() if vne in runtime.names() else ()
            await collect(vne, found.operation.store, in_use)
        case Kind.CONVERT:
            await _prune(vne, found.operation)
    journal.end()


async def _refuse_doubt(vne: str, runtime: Runtime, operation: Operation) -> None:
    """Raise InDoubtError for an operation whose outcome another host knows, unless it is known here by now."""
    if operation.kind is not Kind.SNAPSHOT:
        known = has_started(vne, runtime, operation.id)
    else:
        known = (vne, operation.snapshot) in await Store(Path(runtime.load(vne).store)).names(vne)
    if not known:
        raise InDoubtError(
            f"host {operation.decider} knows whether its {operation.kind.value} was committed, and has not said yet",
            where=f"VNE {vne}",
            advice=f"It is asked again and again. Is its agent running? See `qsnap hosts {vne}`.",
        )


async def settle(vne: str, runtime: Runtime, outcome: Outcome | None) -> None:
    """Bring to its end what a host was in doubt of: `outcome` is what was decided, None if that is to undo it."""
    async with open_loop(), _locked(runtime, vne):
        journal = runtime.journal(vne)
        found = journal.read()
        if found is None or not found.in_doubt:
            return
        if outcome is None:
            journal.note(ABORTED)
        elif found.operation.kind is Kind.SNAPSHOT:
            store = Store(Path(runtime.load(vne).store))
            await store.commit(outcome.applied(await store.held(vne, found.operation.snapshot)))
        else:
            runtime.save(evolve(runtime.load(vne), started=found.operation.id))
        await put_right(vne, runtime)


def refuse_part(vne: VNE, operation: str) -> None:
    """Raise StateError where something of all hosts of a VNE is about to be done on one of them alone."""
    if vne.here and not operation:
        hosts = ", ".join(host.name for host in vne.hosts)
        advice = "Name its description, which tells the hosts: LAB.toml in place of the VNE's name."
        message = f"this host has a part of it only{'; it is on ' if hosts else ''}{hosts}"
        raise StateError(message, where=f"VNE {vne.name}", advice=advice)


def has_started(vne: str, runtime: Runtime, operation: str) -> bool:
    """Whether it was decided that the VNE runs, by this operation on several hosts."""
    return bool(operation) and vne in runtime.names() and runtime.load(vne).started == operation


async def let_run(live: LiveVNE, runtime: Runtime) -> None:
    """Let those VMs run that wait for it, at the same moment as far as one host can."""
    async with AsyncExitStack() as stack:
        sessions = [await open_session(stack, runtime, live.vne.name, vm) for vm in live.waiting]
        await run_all([partial(qmp.execute, "cont") for qmp in sessions])
    runtime.save(evolve(live, waiting=()))


Reader = Callable[[], Awaitable[None]]


async def put_snapshot_right(
    vne: str,
    runtime: Runtime,
    found: Interrupted,
    sessions: Mapping[str, Qmp] | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> None:
    """Finish a snapshot that was committed; undo one that was not: VMs, disks, taps and files as they were.

    `sessions` are open QMP sessions by VM, `readers` what reads the rest of a stream that must not break.
    """
    live = runtime.load(vne)
    store = Store(Path(live.store))
    directory = store.root / vne / snapshot_dir(found.operation.snapshot)
    undoing = _Undoing(live, runtime, directory, sessions or {}, readers or {})
    if (vne, found.operation.snapshot) in await store.names(vne):
        await run_each([partial(undoing.put_settings_back, member) for member in found.members])
        await finish_snapshot(live, found, runtime)
        return
    try:
        brought_back = await run_each([partial(undoing.bring_back, member) for member in found.members])
    finally:
        await _move_back(live)  # even if a VM cannot be reached: the others shall reach each other
    live = with_vms(live, filter(None, brought_back))
    runtime.save(live)
    await _end_receivers(store, vne, found.operation.snapshot)
    await collect(vne, live.store, live.files_in_use())


@frozen
class _Undoing:
    """A snapshot being undone; `directory` is where its receivers write."""

    live: LiveVNE
    runtime: Runtime
    directory: Path
    sessions: Mapping[str, Qmp]
    readers: Mapping[str, Reader]

    async def bring_back(self, member: Member) -> LiveVM | None:
        """Bring one VM back, and return it with the disks it has then; None if it is dead.

        Where its new disk layers cannot be merged back it keeps them.
        """
        vm = self.live.find(member.vm)
        try:
            async with self._session(vm) as qmp:
                await self._abandon(qmp, vm, member)
                if vm.settings:
                    await put_back(qmp, vm.settings)
                try:
                    await DiskCut(qmp, member.disks).undo()
                except QemuGoneError:
                    raise
                except QsnapError as error:
                    log.warning("VM %s keeps the disk layers of an undone snapshot: %s", member.vm, error)
                devices = [disk.device for disk in vm.disks]
                return evolve(vm, disks=await read_disks(qmp, devices, await layers_directory(self.live)))
        except QemuGoneError:
            if not await has_ended(vm.process):
                raise  # it does not answer now: the journal stays until it does
        return None

    async def put_settings_back(self, member: Member) -> None:
        """Give an attached VM its own migration settings again."""
        vm = self.live.find(member.vm)
        if vm.settings and vm.process.is_alive():
            async with self._session(vm) as qmp:
                await put_back(qmp, vm.settings)

    @asynccontextmanager
    async def _session(self, vm: LiveVM) -> AsyncIterator[Qmp]:
        qmp = self.sessions.get(vm.vm.name)
        if qmp is not None and not qmp.lost:
            yield qmp
            return
        with one_error():
            async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
                if must_read_to_end(vm.qemu_version) and not find_processes([f"{self.directory / vm.vm.name}"]):
                    # nobody reads its stream: QEMU may stand still now, or in a moment, and not answer
                    nursery.start_soon(keep_releasing, vm.process)
                yield await open_session(stack, self.runtime, self.live.vne.name, vm.vm.name)
                nursery.cancel_scope.cancel()

    async def _abandon(self, qmp: Qmp, vm: LiveVM, member: Member) -> None:
        if not must_read_to_end(vm.qemu_version):
            await abandon(qmp, running=member.running)
            return
        # in another process nothing is left to be done but to wait: the receiver reads on, or QEMU sees it gone
        await abandon(qmp, running=member.running, read_rest=self.readers.get(member.vm, trio.sleep_forever))
        await release_memory(vm.process)


async def open_session(stack: AsyncExitStack, runtime: Runtime, vne: str, vm: str) -> Qmp:
    """A QMP session for as long as `stack` lasts: over qsnap's own socket, or else over the other one."""
    try:
        return await stack.enter_async_context(open_qmp(runtime.qmp_path(vne, vm), vm=vm))
    except QemuGoneError:
        return await stack.enter_async_context(open_qmp(runtime.monitor_path(vne, vm), vm=vm))


async def _move_back(live: LiveVNE) -> None:
    moves = [move for vm in live.vms for move in plan_moves(live.vne, vm.vm.name, live.active)]
    if netns := live.way_in():  # one without a name has gone with the last VM
        async with open_links(netns) as links:
            await links.apply([*plan_direction(live.vne, live.active), *moves])


async def _end_receivers(store: Store, vne: str, snapshot: str) -> None:
    receivers = find_processes([f"{store.root / vne / snapshot_dir(snapshot)}/"])
    await run_all([partial(end_process, process) for process in receivers])


async def _prune(vne: str, operation: Operation) -> None:
    store = Store(Path(operation.store))
    await _end_receivers(store, vne, operation.snapshot)
    with suppress(IntegrityError, StateError):  # it is damaged, or gone
        await store.prune(vne, operation.snapshot)


async def recover(vne: str | None = None, *, place: Place | None = None) -> tuple[str, ...]:
    """Put right what a killed qsnap has left of one VNE, or of all; the next operation on it would do so too.

    Returns the VNEs that needed it. One that somebody is at work on is left alone.
    """
    runtime = (place or Place()).runtime()
    names = [name for name in runtime.interrupted() if vne in (None, name)]
    done = []
    for name in names:
        with suppress(BusyError, InDoubtError):
            async with exclusive(runtime, name):
                done.append(name)
    return tuple(done)


def recovery_command(runtime: Runtime, vne: str) -> list[str]:
    """The command line of a process that puts one VNE right."""
    return [sys.executable, "-m", "qsnap.cli", "recover", vne, "--run-dir", str(runtime.root)]


async def finish_snapshot(live: LiveVNE, found: Interrupted, runtime: Runtime) -> None:
    """What follows on the commit of a snapshot of `live`: what its VMs run on now, and no layer that was merged."""
    disks = {member.vm: member.disks.after for member in found.members}
    vms = [evolve(vm, disks=disks[vm.vm.name]) for vm in live.vms if vm.vm.name in disks]
    after = evolve(with_vms(live, vms), active=found.operation.active or live.active)
    runtime.save(after)
    if found.operation.decider:  # what was held for the commit
        await Store(Path(live.store)).prune(live.vne.name, found.operation.snapshot)
    if not set(live.files_in_use()) <= set(after.files_in_use()):
        await collect(live.vne.name, live.store, after.files_in_use())


def with_vms(live: LiveVNE, vms: Iterable[LiveVM]) -> LiveVNE:
    """The VNE with these VMs in place of those of the same names."""
    fresh = {vm.vm.name: vm for vm in vms}
    return evolve(live, vms=tuple(fresh.get(vm.vm.name, vm) for vm in live.vms))
