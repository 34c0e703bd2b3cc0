"""Restoring a saved VNE: every VM is loaded and paused, then all run on together."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio
from attrs import define, evolve, field

from qsnap.errors import HostError, IntegrityError, QemuError, StateError
from qsnap.host import hugepages
from qsnap.host.bridges import check_networking
from qsnap.host.disks import describe_base
from qsnap.host.journal import VOTED, Journal, Kind, Operation
from qsnap.host.lifecycle import choose_rams
from qsnap.host.memory import fill_memory, is_memory_file, make_memory
from qsnap.host.place import Place, Progress
from qsnap.host.qemu import has_ended, kvm_works, last_words, program_version
from qsnap.host.qmp import Qmp
from qsnap.host.recovery import exclusive, refuse_part
from qsnap.host.runtime import LiveVM, LiveVNE, Runtime
from qsnap.host.starting import DiskBase, Start, build_networks, describe, layers_directory, open_started, start_process
from qsnap.host.store import Store
from qsnap.host.takedown import take_down
from qsnap.host.tasks import run_all
from qsnap.host.tunnels import check_tunnels
from qsnap.model import (
    VNE,
    Accelerator,
    Backing,
    Colour,
    DiskImage,
    RamMode,
    RestoreOrder,
    RestoreReport,
    Snapshot,
    StoredFile,
    VMSnapshot,
    version_text,
)
from qsnap.rules.command import FilledRam, MappedRam, MemfdRam, MemoryBackend, Ram, plan_ram
from qsnap.rules.engine import Version, precopy_is_safe

ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}  #: ms; as QEMU does after a migration
FD_NAME = "qsnap-device-stream"
STANDSTILL_S = 120.0  #: QEMU may take its time for a long stream, but not for a piece of it
PIECE_BYTES = 1 << 20


@asynccontextmanager
async def open_restoring(order: RestoreOrder, place: Place, progress: Progress) -> AsyncIterator[Restoring]:
    """The start of what this host has of a VNE, as it was when a snapshot was taken.

    Raises StateError while the VNE runs, and where a recorded stream is to be mapped; IntegrityError naming the first
    altered file. A block that is left without a commit leaves nothing, unless this host has voted and another decides.
    """
    check_networking()
    runtime = place.runtime()
    async with exclusive(runtime, order.vne) as journal:
        store = place.snapshots()
        saved = await store.load(order.vne, order.name)
        refuse_part(saved.vne, order.id)
        _check_mode(order.ram, saved)  # refused before anything is cleared away, as an unknown name is
        await refuse_running(order.vne, runtime)
        async with AsyncExitStack() as sessions:
            yield Restoring(order, store, runtime, journal, progress, sessions)


def _check_mode(mode: RamMode, saved: Snapshot) -> None:
    if mode is RamMode.MAP and any(vm.recorded for vm in saved.vms):
        raise StateError(
            f"snapshot {saved.name} is a recorded stream, which cannot be mapped",
            where=f"VNE {saved.vne.name}",
            advice=f"Convert it first: qsnap convert {saved.vne.name} {saved.name}",
        )


async def refuse_running(vne: str, runtime: Runtime) -> None:
    """Raise StateError if any VM of the VNE lives."""
    if vne not in runtime.names():
        return
    live = runtime.load(vne)
    ended = await run_all([partial(has_ended, vm.process) for vm in live.vms])
    alive = [vm.vm.name for vm, gone in zip(live.vms, ended, strict=True) if not gone]
    if alive:
        raise running_error(live.vne, alive)


def running_error(vne: VNE, alive: Iterable[str]) -> StateError:
    """What is wrong where VMs live that are to be restored."""
    advice = f"Take it down first: qsnap down {vne.name}"
    if vne.attached:
        advice = f"End its VMs, or let go of them: qsnap detach {vne.name}"
    return StateError(f"VNE {vne.name} is running ({', '.join(alive)})", advice=advice)


def check_bases(vms: Iterable[VMSnapshot]) -> None:
    """Raise IntegrityError if a base image is not the file that the layers were made on."""
    for vm in vms:
        for base in (disk.base for disk in vm.disks if disk.base):
            try:
                now = describe_base(base.file, base.format)
            except OSError as error:
                raise IntegrityError(f"base image of VM {vm.vm.name}: {error.strerror}", file=base.file) from error
            if now != base:
                raise IntegrityError(
                    f"the base image of VM {vm.vm.name} was changed after the snapshot",
                    file=base.file,
                    advice="Put back the image that the VNE was started with, modification time included.",
                )


@define
class Restoring:
    """A restore under way: `prepare`, `commit`; `how` and `running_ms` as in the report. Made by `open_restoring`."""

    order: RestoreOrder
    store: Store
    runtime: Runtime
    journal: Journal
    progress: Progress
    sessions: AsyncExitStack
    begun_s: float = field(factory=trio.current_time)
    saved: Snapshot = field(init=False)
    version: Version | None = None  # of the program that replaces the saved one
    how: dict[str, str] = field(factory=dict)
    rams: dict[str, Ram] = field(factory=dict)  # of the VMs whose stream holds it all
    loaded: dict[str, tuple[LiveVM, Qmp]] = field(factory=dict)
    running_ms: dict[str, float] = field(factory=dict)

    async def prepare(self) -> None:
        """Have all VMs loaded, and paused."""
        order, runtime = self.order, self.runtime
        self.journal.begin(Operation(Kind.RESTORE, order.name, id=order.id, decider=order.decider))
        await take_down(order.vne, runtime)  # what is left of a VNE that died
        saved = await self.store.check_quick(order.vne, order.name)
        self.saved = restricted(saved, order.part) if order.part else saved
        check_bases(self.saved.vms)
        await check_tunnels(self.saved.vne)
        live = LiveVNE(self.saved.vne, str(self.store.root), runtime.netns(order.vne), Colour.RED, ())
        runtime.save(live)
        await self._check_accelerators()
        if order.qemu:
            self.version = await program_version(order.qemu)
        self.rams = _empty_rams(self.saved)
        async with build_networks(live) as live:
            calls = [partial(self._load, live, index, vm) for index, vm in enumerate(self.saved.vms)]
            loaded = await run_all(calls)
        self.loaded = {vm.vm.name: (vm, qmp) for vm, qmp in loaded}
        waiting = () if order.paused else tuple(vm.vm.name for vm in self.saved.vms if vm.was_running)
        runtime.save(evolve(live, vms=tuple(vm for vm, _ in loaded), waiting=waiting))
        if order.decider:
            self.journal.note(VOTED)

    async def commit(self) -> RestoreReport:
        """Let those run that ran, and tell of it; `ready_ms` counts from `begun_s`."""
        live = evolve(self.runtime.load(self.order.vne), started=self.order.id)
        if self.order.id:
            self.runtime.save(live)
        await run_all([partial(self._run_on, *self.loaded[vm]) for vm in live.waiting])
        ready_ms = (trio.current_time() - self.begun_s) * 1e3
        self.runtime.save(evolve(live, waiting=()))
        how = {vm.vm.name: self.how[vm.vm.name] for vm in self.saved.vms if vm.vm.name in self.how}
        return RestoreReport(self.saved, ready_ms, how, self.running_ms)

    async def undo(self) -> None:
        """Take all of it away."""
        await take_down(self.order.vne, self.runtime)
        self.journal.end()

    async def _run_on(self, vm: LiveVM, qmp: Qmp) -> None:
        await run_on(qmp)
        resumed = await qmp.wait_event(lambda event: event.name == "RESUME")
        self.running_ms[vm.vm.name] = (resumed.instant_s - vm.process.spawned_s) * 1e3

    async def _check_accelerators(self) -> None:
        for vm in self.saved.vms:
            qemu = self.order.qemu or vm.vm.qemu
            if vm.accelerator is Accelerator.KVM and not await kvm_works(qemu):
                raise HostError(
                    "it was saved under KVM, which does not run guests here",
                    where=f"VM {vm.vm.name}",
                    advice="Restore it on a host with KVM, as a user in the group of /dev/kvm.",
                )

    async def _load(self, live: LiveVNE, index: int, saved: VMSnapshot) -> tuple[LiveVM, Qmp]:
        self.progress("load", saved.vm.name, 0, 1)
        vm = evolve(saved.vm, qemu=self.order.qemu or saved.vm.qemu)
        with ExitStack() as fds:
            ram = await self._provide_ram(saved, fds)
            disks = tuple(self._base(disk) for disk in saved.disks)
            start = Start(vm, index, saved.hardware, saved.accelerator, ram, disks, incoming=True, boot=saved.boot)
            process = await start_process(live, self.runtime, start)
        # a UART that was saved while it sent waits for a listener, and without one at load it is silent for ever
        # (serial_post_load, hw/char/serial.c), so there is one until the guest runs
        console = self.runtime.console_path(live.vne.name, vm.name)
        await self.sessions.enter_async_context(await trio.open_unix_socket(console))
        qmp = await open_started(self.sessions, self.runtime, live.vne.name, process, vm.name)
        loading = partial(feed, qmp, self._stored(saved.device_stream), partial(self.progress, "load", vm.name))
        calls: list[Callable[[], Awaitable[Any]]] = [
            loading,
            partial(describe, qmp, start, process, await layers_directory(live)),
        ]
        try:
            _, described = await run_all(calls)
        except QemuError as error:
            log = self.runtime.vm_directory(live.vne.name, vm.name) / "qemu.log"
            raise QemuError(
                f"QEMU does not load the state: {last_words(log) or error.message}",
                where=f"VM {vm.name}",
                advice=f"It was saved by QEMU {version_text(saved.qemu_version)}; that one or a newer one is needed.",
            ) from error
        return described, qmp

    def _stored(self, file: StoredFile) -> Path:
        return self.store.root / self.saved.vne.name / file.path

    def _base(self, disk: DiskImage) -> DiskBase:
        return DiskBase(str(self._stored(disk.layers[0])), disk.top_format)

    async def _provide_ram(self, saved: VMSnapshot, fds: ExitStack) -> tuple[MemoryBackend, ...]:
        if saved.recorded:
            return self._provide_empty_ram(saved)
        directory = self._stored(saved.device_stream).parent
        by_precopy = precopy_is_safe(self.version or saved.qemu_version, saved.accelerator, len(saved.ram))
        eager, why = choose_ram(self.order.ram, directory, by_precopy=by_precopy)
        self.how[saved.vm.name] = why
        provided = []
        for block in saved.ram:
            path, size = self._stored(block.file), block.used_length
            ram = await _copy_ram(path, size, fds) if eager else MappedRam(str(path))
            provided.append(MemoryBackend(block.idstr, size, ram))
        return tuple(provided)

    def _provide_empty_ram(self, saved: VMSnapshot) -> tuple[MemoryBackend, ...]:
        ram = self.rams[saved.vm.name]
        huge = isinstance(ram, MemfdRam) and ram.hugetlb
        self.how[saved.vm.name] = f"the whole stream replayed{' into huge pages' if huge else ''}"
        return plan_ram(saved.vm, ram)


def restricted(saved: Snapshot, part: VNE) -> Snapshot:
    """What a snapshot has of these VMs, to be started as this part of a VNE."""
    names = {vm.name for vm in part.vms}
    vms = tuple(evolve(vm, vm=evolve(vm.vm, host=part.here)) for vm in saved.vms if vm.vm.name in names)
    return evolve(saved, vne=evolve(part, vms=tuple(vm.vm for vm in vms)), vms=vms)  # the part may name attached ones


def _empty_rams(saved: Snapshot) -> dict[str, Ram]:
    """RAM to be filled by a recorded stream: in huge pages as far as enough of them are free."""
    vms = [evolve(vm.vm, backing=Backing.AUTO) for vm in saved.vms if vm.recorded]
    rams = choose_rams(vms, hugepages.free_pages())
    return {vm.name: ram for vm, ram in zip(vms, rams, strict=True)}


async def feed(qmp: Qmp, stream: Path, on_bytes: Callable[[int, int], None]) -> None:
    """Load a stream into a QEMU that waits for one, and wait until it has taken all of it.

    `on_bytes` is told how many bytes of how many have been read.
    """
    inlet, outlet = os.pipe()
    size = stream.stat().st_size
    with trio.move_on_after(STANDSTILL_S) as scope:

        def report(done: int) -> None:
            scope.deadline = trio.current_time() + STANDSTILL_S
            on_bytes(done, size)

        # abandoned if cancelled: it then waits for a QEMU that does not read, and ends with it
        pour = partial(trio.to_thread.run_sync, _pour, stream, outlet, report, abandon_on_cancel=True)
        await run_all([partial(_load_stream, qmp, inlet), pour])
    if scope.cancelled_caught:
        raise QemuError(f"QEMU took nothing of its state for {STANDSTILL_S:.0f} s", where=f"VM {qmp.vm}")


async def _load_stream(qmp: Qmp, inlet: int) -> None:
    capabilities = [{"capability": "events", "state": True}]
    try:
        await qmp.send_fd(
            FD_NAME,
            inlet,
            ("migrate-set-capabilities", {"capabilities": capabilities}),
            ("migrate-incoming", {"uri": f"fd:{FD_NAME}"}),
        )
    finally:
        os.close(inlet)
    ends = ("completed", "failed")
    event = await qmp.wait_event(lambda event: event.name == "MIGRATION" and event.data["status"] in ends)
    if event.data["status"] == "failed":
        raise QemuError("the incoming migration failed", where=f"VM {qmp.vm}")


def _pour(stream: Path, outlet: int, report: Callable[[int], None]) -> None:
    with stream.open("rb") as source, open(outlet, "wb", buffering=0) as sink, suppress(BrokenPipeError):
        while piece := source.read(PIECE_BYTES):
            sink.write(piece)
            trio.from_thread.run_sync(report, source.tell())


async def run_on(qmp: Qmp) -> None:
    """Let a restored VM run, and have it tell the network where it is."""
    await qmp.execute_all(("cont", {}), ("announce-self", ANNOUNCE))


def choose_ram(mode: RamMode, directory: Path, *, by_precopy: bool) -> tuple[bool, str]:
    """Whether RAM is copied before the guest runs, and why. The flat files are in `directory`.

    RAM mapped from a file on disk cannot be write-protected, so such a VM can next be saved by precopy only; where
    that is unsafe (not `by_precopy`) it gets RAM of its own. So it does in a read-only store: QEMU opens what it maps
    for writing.
    """
    if mode is not RamMode.AUTO:
        eager = mode is RamMode.EAGER
        return eager, f"{'copied' if eager else 'mapped from the flat file, copy-on-write'}, as asked for"
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        return True, "copied: the store is read-only"
    if by_precopy or is_memory_file(directory):
        return False, "mapped from the flat file, copy-on-write"
    return True, "copied: mapped from a disk, it could not be saved again (precopy is not safe for it under TCG)"


async def _copy_ram(path: Path, size_bytes: int, fds: ExitStack) -> FilledRam:
    fd, memory = make_memory(size_bytes)
    fds.callback(os.close, fd)
    with memory:
        await trio.to_thread.run_sync(fill_memory, memory, path)
    return FilledRam(fd)
