"""Saving a running VNE: prepare every VM, one consistent cut, then a commit that holds for all or leaves no trace."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import trio
from attrs import define, evolve, field

from qsnap.errors import IntegrityError, QsnapError, StateError
from qsnap.host.bridges import Links, open_links
from qsnap.host.capture import Background, Capture, Captured, DivergedError, Precopy, Record
from qsnap.host.clock import sleep_until, steady_s
from qsnap.host.condition import gather_facts, is_running, raise_if_it_ends, refuse_ended
from qsnap.host.daemon import Daemon, Receiving
from qsnap.host.disks import DiskCut, DiskPlan, image_of, plan_disks, tidy_disks
from qsnap.host.held import HeldPrecopy
from qsnap.host.journal import ABORTED, VOTED, Journal, Kind, Member, Operation
from qsnap.host.keeping import Keeper, Keeping, OpenKeeper, open_kept, seal_state
from qsnap.host.memory import is_memory_file, resident_bytes, spare_bytes
from qsnap.host.migration import abandon, query_ram, query_sent
from qsnap.host.owner import put_back, set_aside
from qsnap.host.place import Progress
from qsnap.host.qemu import Process
from qsnap.host.qmp import Qmp
from qsnap.host.recovery import (
    Reader,
    exclusive,
    finish_snapshot,
    open_session,
    put_snapshot_right,
    recovery_command,
    refuse_part,
)
from qsnap.host.runtime import LiveVM, LiveVNE, Runtime
from qsnap.host.starting import find_qemu_img, keep_boot_files, layers_directory
from qsnap.host.store import Store
from qsnap.host.tasks import one_error, prioritized, run_all, uncollected
from qsnap.model import (
    Colour,
    Cut,
    DiskEngine,
    Engine,
    Outcome,
    Snapshot,
    SnapshotOrder,
    StoredFile,
    VMSnapshot,
    vm_as_own,
)
from qsnap.rules.colouring import Move, plan_direction, plan_moves, plan_return
from qsnap.rules.engine import (
    Decision,
    Facts,
    after_divergence,
    choose_engine,
    is_crowded,
    keeps_paused,
    must_read_to_end,
)
from qsnap.rules.manifest import files_in
from qsnap.wire.messages import Keep

APPOINTMENT_S = 5.0  #: no cut waits longer than this for its time
HALT_S = 0.03  #: VMs wait for each other to be stopped
DEVICE_RAM_BYTES = 2 << 30  #: allowed for in a stream beside the guest's memory: video RAM, ROMs, tables
RECORD_LIMIT = 4  #: times the guest's memory, beside the above, is what a recorded stream may grow to


@define
class Saved:
    """One VM of a snapshot under way, prepared for its cut."""

    live: LiveVM
    facts: Facts
    decision: Decision
    disks: DiskCut
    capture: Capture


@asynccontextmanager
async def open_saving(
    order: SnapshotOrder, runtime: Runtime, progress: Progress, open_keeper: OpenKeeper
) -> AsyncIterator[Saving]:
    """A snapshot of what this host has of a running VNE, phase by phase. `open_keeper` is for what others keep of it.

    Raises BusyError while another operation is at work on it; EngineRefusedError, and StateError for a VM that is dead,
    has panicked or is shut down, before anything is paused. A block that is left without a commit leaves the VMs
    running and nothing behind, unless this host has voted and another one decides.
    """
    vne = order.vne
    async with exclusive(runtime, vne) as journal:
        live = runtime.load(vne)
        refuse_part(live.vne, order.id)
        for vm in live.vms:
            if not vm.process.is_alive():
                raise StateError(f"its VM {vm.vm.name} is dead", where=f"VNE {vne}", advice="See `qsnap ps`.")
        if order.cut is Cut.COLOUR and live.barrier_only:
            raise StateError(
                f"colours cannot be kept on its networks: {live.barrier_only}",
                where=f"VNE {vne}",
                advice="Take the other cut: --cut barrier",
            )
        store = Store(Path(live.store))
        await store.refuse_committed(vne, order.name)
        async with (
            trio.open_nursery() as nursery,
            open_links(live.way_in()) as links,
            AsyncExitStack() as sessions,
        ):
            keeping = Keeping(live, runtime, store, progress)
            sessions.push_async_callback(keeping.close)
            saving = Saving(
                live, order, runtime, progress, journal, store, sessions, nursery, links, open_keeper, keeping
            )
            sessions.callback(saving.urgent.close)
            try:
                yield saving
            except BaseException:
                saving.urgent.close()
                if saving.begun and not saving.in_doubt:
                    with trio.CancelScope(shield=True), suppress(QsnapError):  # what is left is for `exclusive` to undo
                        await saving.undo()
                raise


@define
class Saving:
    """A snapshot under way: `prepare`; `cut`, or `stop` and `resume`; `collect`; `commit`. Made by `open_saving`.

    What changes a VM is in the journal before it is done, for whoever has to undo it.
    """

    live: LiveVNE
    order: SnapshotOrder
    runtime: Runtime
    progress: Progress
    journal: Journal
    store: Store
    sessions: AsyncExitStack
    nursery: trio.Nursery
    links: Links
    open_keeper: OpenKeeper
    keeping: Keeping  #: what this host keeps for others
    begun: bool = False
    in_doubt: bool = False  #: all is done, and another host decides
    members: list[Saved] = field(factory=list)
    qmps: dict[str, Qmp] = field(factory=dict)
    readers: dict[str, Reader] = field(factory=dict)
    keepers: dict[str, Keeper] = field(factory=dict)  #: of VMs that other hosts keep
    urgent: ExitStack = field(factory=ExitStack)  #: from the vote to the end of the cut
    punctual: ExitStack = field(factory=ExitStack)  #: until all are stopped
    settling: trio.CancelScope = field(factory=trio.CancelScope)  #: over the disks, from the vote to the cut
    watches: list[trio.CancelScope] = field(factory=list)  #: over the VMs
    directory: Path = field(init=False)
    vms: tuple[VMSnapshot, ...] = ()

    async def prepare(self) -> None:
        """Everything slow that can be done while the VMs run, with nothing of them changed."""
        vne, order = self.live.vne.name, self.order
        active = self.live.active if self.live.vne.attached else self.live.active.other
        operation = Operation(Kind.SNAPSHOT, order.name, active=active, id=order.id, decider=order.decider)
        self.begun = True
        self.journal.begin(operation)
        self.directory = await self.store.begin(vne, order.name)
        self.keeping.begin(self.directory)
        await self.links.apply(plan_direction(self.live.vne, self.live.active))
        boot = await keep_boot_files(self.store, vne, [() if vm.boot else vm.hardware for vm in self.live.vms])
        vms = [evolve(vm, boot=vm.boot or files) for vm, files in zip(self.live.vms, boot, strict=True)]
        self.members = await run_all([partial(self._prepare, vm) for vm in vms])
        await self._settle_disks()
        self.nursery.start_soon(self._keep_settled)
        self.urgent.enter_context(uncollected())
        self.punctual = self.urgent.enter_context(ExitStack())
        self.punctual.enter_context(prioritized())

    async def cut(self, at_s: float = 0.0) -> None:
        """The cut of VMs that wait for no other: each resumes as soon as it can."""
        await self._await_cut(at_s)
        with self.urgent:
            await self._halt()
            await run_all([partial(self._stop_and_resume, member) for member in self.members])

    async def stop(self, at_s: float = 0.0) -> None:
        """The first half of a barrier: every VM is stopped when this returns."""
        await self._await_cut(at_s)
        await self._halt()
        await run_all([partial(self._stop, member) for member in self.members])

    async def resume(self) -> None:
        """The second half of a barrier."""
        with self.urgent:
            await run_all([member.capture.resume for member in self.members])

    async def collect(self) -> tuple[VMSnapshot, ...]:
        """Wait for the rest of the VMs' states, and make all of it durable. It has voted when this returns."""
        if self.live.vne.attached:
            await self.links.apply(plan_return(self.live.vne))
        known = await self._known_files()
        vms = await run_all([partial(self._record, member, known) for member in self.members])
        self._end_watches()
        own = [shifted(vm, self.order.clock_offset_s) for vm in vms]
        await run_all([partial(self.keepers[vm.vm.name].hold, vm) for vm in own if vm.kept_on])
        self.vms = (*own, *await self.keeping.wait_all())
        if self.order.decider:
            await self.store.hold(self._snapshot(Outcome(time.time())))
            self.in_doubt = True
            self.journal.note(VOTED)
        return self.vms

    async def commit(self, outcome: Outcome) -> Snapshot:
        """Make it a snapshot. From its manifest on it is one, whatever happens."""
        saved = self._snapshot(outcome)
        if not self.order.decider:
            self.journal.note("commit")
        await self.store.commit(saved)
        found = self.journal.read()
        assert found is not None
        await finish_snapshot(self.live, found, self.runtime)
        return saved

    async def undo(self) -> None:
        """Put things right while the sessions are open: the VMs run at once, and no stream breaks."""
        self.settling.cancel()
        self._end_watches()
        await self.keeping.close()
        if self.in_doubt:
            self.journal.note(ABORTED)
            self.in_doubt = False
        found = self.journal.read()
        if found is not None:
            await put_snapshot_right(self.live.vne.name, self.runtime, found, self.qmps, self.readers)
            self.journal.end()

    @property
    def _several(self) -> bool:
        """Whether there are more VMs than one, here or on other hosts."""
        return len(self.live.vms) > 1 or bool(self.order.id)

    def _snapshot(self, outcome: Outcome) -> Snapshot:
        name = self.order.name
        vms = tuple(vm.vm for vm in self.vms)
        vne = evolve(self.live.vne.as_own(), vms=vms, hosts=())  # who restores it says where, and has them all
        part = Snapshot(name, vne, self.order.cut, outcome.created_s, self.vms, operation=self.order.id)
        return outcome.applied(part)

    async def _watch(self, qmp: Qmp) -> None:
        with trio.CancelScope() as scope:
            self.watches.append(scope)
            await raise_if_it_ends(qmp)

    def _end_watches(self) -> None:
        for scope in self.watches:
            scope.cancel()

    async def _await_cut(self, at_s: float) -> None:
        """Until it is time for the cut, `at_s` on this host's clock, if hosts have one together."""
        self.settling.cancel()
        await self._settle_disks()
        await sleep_until(min(at_s, steady_s() + APPOINTMENT_S))

    async def _settle_disks(self) -> None:
        await run_all([member.disks.settle for member in self.members])

    async def _keep_settled(self) -> None:
        """Until the cut, which others may keep waiting: what is dirty then holds up this host's cut, and not theirs."""
        with self.settling:
            await run_all([member.disks.keep_settled for member in self.members])

    def _moves(self, vm: LiveVM, colour: Colour) -> list[Move]:
        return plan_moves(self.live.vne, vm.vm.name, colour)

    async def _prepare(self, vm: LiveVM) -> Saved:
        qmp = await open_session(self.sessions, self.runtime, self.live.vne.name, vm.vm.name)
        self.qmps[vm.vm.name] = qmp
        await refuse_ended(qmp)
        self.nursery.start_soon(self._watch, qmp)
        plan = await self._plan_disks(vm, qmp)
        running = await is_running(qmp)
        self.journal.add(Member(vm.vm.name, running, plan))
        if vm.settings:
            await set_aside(qmp, vm.settings)
            self.sessions.push_async_callback(put_back, qmp, vm.settings)
        facts = evolve(
            await gather_facts(qmp, vm, running=running),
            several=self._several,
            crowded=is_crowded(len(self.live.vms), len(os.sched_getaffinity(0))),
            waits=self.order.cut is Cut.BARRIER and self._several,
            copies_disks=bool(plan.of(DiskEngine.COPY)),
        )
        decision = choose_engine(self.order.engine, facts)
        self.progress("prepare", vm.vm.name, 0, 0)
        disks = DiskCut(qmp, plan)
        await disks.prepare()
        try:
            capture = await self._begin(vm, qmp, disks, facts, decision.engine)
        except DivergedError:
            decision = await self._give_up_precopy(vm, qmp, facts)
            capture = await self._begin(vm, qmp, disks, facts, decision.engine)
        return Saved(vm, facts, decision, disks, capture)

    async def _plan_disks(self, vm: LiveVM, qmp: Qmp) -> DiskPlan:
        directory, devices = await layers_directory(self.live), [disk.device for disk in vm.disks]
        disks = await tidy_disks(qmp, devices, directory, partial(self.progress, "merge", vm.vm.name))
        return await plan_disks(
            self.order.disks,
            vm.vm.name,
            disks,
            directory=directory,
            version=vm.qemu_version,
            qemu_img=find_qemu_img(vm.vm.qemu),
        )

    async def _begin(self, vm: LiveVM, qmp: Qmp, disks: DiskCut, facts: Facts, engine: Engine) -> Capture:
        keeps_reading = engine is Engine.BACKGROUND and must_read_to_end(facts.qemu_version)
        held = engine is Engine.PRECOPY and facts.holds and facts.running
        daemon, stream_fd = await self._receive(vm, qmp, engine, keeps_reading=keeps_reading, held=held)
        if keeps_reading:
            self.readers[vm.vm.name] = daemon.read_to_end
        move_taps = (await self.links.prepare(self._moves(vm, self.live.active.other))).apply
        force = self.order.engine is Engine.PRECOPY or bool(facts.background_refusal)
        capture: Capture
        if engine is Engine.RECORD:
            capture = Record(qmp, daemon, disks, facts.running, move_taps, force=True)
        elif held and isinstance(daemon, Daemon):
            capture = HeldPrecopy(qmp, daemon, disks, facts.running, move_taps, force=force, holder=daemon)
        elif engine is Engine.PRECOPY:
            capture = Precopy(qmp, daemon, disks, facts.running, move_taps, force=force)
        else:
            capture = Background(
                qmp,
                daemon,
                disks,
                facts.running,
                move_taps,
                keeps_paused=keeps_paused(facts.qemu_version),
            )
        await capture.prepare(stream_fd)
        return capture

    async def _receive(
        self, live: LiveVM, qmp: Qmp, engine: Engine, *, keeps_reading: bool, held: bool
    ) -> tuple[Receiving, int]:
        """What takes in a VM's stream, here or on the host that keeps it, and the descriptor for QEMU."""
        vm, vne, ram = live.vm, self.live.vne, await query_ram(qmp)
        directory, ram_bytes = self.directory / vm.name, sum(ram.values())
        heir = recovery_command(self.runtime, vne.name)
        limit = record_limit(ram_bytes) if engine is Engine.RECORD else None
        keep = Keep(vne.name, self.order.id, vm.name, tuple(ram), ram_bytes + DEVICE_RAM_BYTES, limit)

        def on_bytes(done: int) -> None:
            self.progress("save", vm.name, done, max(done, ram_bytes))

        if vm.keeper:
            host = next(host for host in vne.hosts if host.name == vm.keeper)
            keeper, stream_fd = await self.sessions.enter_async_context(
                self.open_keeper(
                    self.nursery, host, keep, directory, keeps_reading=keeps_reading, heir=heir, on_bytes=on_bytes
                )
            )
            self.keepers[vm.name] = keeper
            return keeper, stream_fd
        return await self.sessions.enter_async_context(
            open_kept(
                self.nursery,
                directory,
                keep,
                keeps_reading=keeps_reading,
                heir=heir,
                on_bytes=on_bytes,
                vms=len(self.live.vms),
                held=held,
                reserve_bytes=0 if limit else await self._plan_reserve(live.process, qmp, ram_bytes),
            )
        )

    async def _plan_reserve(self, process: Process, qmp: Qmp, ram_bytes: int) -> int:
        """Memory to take in advance: as much as the image may need, and no more than half of what there is for all VMs.

        That is less than QEMU has, which takes all huge pages of a guest, used or not, for a background snapshot.
        """
        if not is_memory_file(self.directory):
            return 0
        resident, spare = resident_bytes(process.pid), spare_bytes(self.directory)
        used = await query_sent(qmp) or resident
        return min(used, resident, ram_bytes, spare // (2 * len(self.live.vms)))

    async def _halt(self) -> None:
        """Where there are several, all are stopped before the rest of any cut takes the processor from another.

        One that takes longer than HALT_S is no longer waited for: its cut comes later, as with engines that halt none.
        What follows has no priority over QEMU processes that are still to stop, on behalf of others on this machine.
        """
        if self._several:
            with trio.move_on_after(HALT_S):
                await run_all([partial(member.capture.halt, self.nursery) for member in self.members])
            self.punctual.close()

    async def _stop_and_resume(self, member: Saved) -> None:
        await self._stop(member)
        await member.capture.resume()

    async def _stop(self, member: Saved) -> None:
        try:
            await member.capture.stop(self.nursery)
        except DivergedError:
            qmp = member.capture.qmp
            member.decision = await self._give_up_precopy(member.live, qmp, member.facts)
            member.capture = await self._begin(member.live, qmp, member.disks, member.facts, member.decision.engine)
            await member.capture.stop(self.nursery)

    async def _give_up_precopy(self, vm: LiveVM, qmp: Qmp, facts: Facts) -> Decision:
        await abandon(qmp, running=facts.running)
        shutil.rmtree(self.directory / vm.vm.name, ignore_errors=True)  # where another host keeps it
        return after_divergence()

    async def _complete(self, member: Saved) -> Captured:
        """Wait for the rest of the state and for copies of disks; the first failure ends both."""
        with one_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(member.disks.finish, partial(self.progress, "copy", member.live.vm.name))
                return await member.capture.complete()

    async def _record(self, member: Saved, known: Mapping[str, StoredFile]) -> VMSnapshot:
        captured = await self._complete(member)
        vm, vne = member.live, self.live.vne.name
        folder = f"snapshots/{self.order.name}/{vm.vm.name}"

        async def seal(path: str) -> StoredFile:
            return known.get(path) or await self.store.seal_file(vne, path, count)

        sealed, total = 0, captured.receipt["ram_bytes"]

        def count(more: int) -> None:
            nonlocal sealed
            sealed += more
            self.progress("seal", vm.vm.name, sealed, max(sealed, total))

        if keeper := self.keepers.get(vm.vm.name):
            files = await keeper.wait_files()
        else:
            files = await seal_state(self.store, vne, folder, captured.receipt, count)
        disks = [await image_of(step, seal) for step in member.disks.plan.steps]
        return VMSnapshot(
            vm=vm_as_own(vm.vm),
            engine=member.decision.engine,
            reason=member.capture.explain(member.decision.reason),
            accelerator=vm.accelerator,
            qemu_version=vm.qemu_version,
            machine_type=vm.machine_type,
            hardware=vm.hardware,
            ram=files.ram,
            device_stream=files.device_stream,
            disks=tuple(disks),
            was_running=member.capture.was_running,
            measurements=captured.measurements(files.image_bytes),
            kept_on=vm.vm.keeper,
            boot=vm.boot,
        )

    async def _known_files(self) -> dict[str, StoredFile]:
        """What older snapshots say of their files: a disk layer that one of them sealed never changes again."""
        known: dict[str, StoredFile] = {}
        for vne, name in await self.store.names(self.live.vne.name):
            with suppress(IntegrityError):  # a damaged snapshot vouches for nothing, and stops no other
                known |= {file.path: file for file in files_in(await self.store.load(vne, name))}
        return known


def shifted(vm: VMSnapshot, offset_s: float) -> VMSnapshot:
    """The same with its instants on another clock, which shows `offset_s` more."""
    given = vm.measurements
    instants = {
        name: instant_s + offset_s
        for name in ("start_instant_s", "stop_instant_s", "resume_instant_s")
        if (instant_s := getattr(given, name))  # 0 is none
    }
    return evolve(vm, measurements=evolve(given, **instants))


def record_limit(ram_bytes: int) -> int:
    """The most bytes that the recorded stream of a VM may have: a page may be in it many times."""
    return RECORD_LIMIT * ram_bytes + DEVICE_RAM_BYTES
