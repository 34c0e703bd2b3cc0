"""The disks of one VM during a snapshot: planned, prepared, cut inside the stop phase, finished while the VM runs.

`overlay` and `copy` are block commands that belong into one `transaction`; `reflink` and `lvm` clone what the VM writes
to, once QEMU has written out what it held of the image. A migration that ends with the disks handed over (precopy) does
not suffer a copy under way: there copies begin when it has ended, the VM still being stopped.

A plan is all that an undo needs, whatever step was reached and whichever process does it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio
from attrs import evolve, frozen

from qsnap.errors import HostError
from qsnap.host.disks.chain import DiskFile, LiveDisk
from qsnap.host.disks.images import (
    clone_file,
    clone_refusal,
    create_above,
    create_empty,
    create_overlay,
    describe_base,
    measure_copy,
    name_base,
    new_path,
    sync_file,
)
from qsnap.host.disks.jobs import JobError, Report, end_job, wait_job
from qsnap.host.qmp import Command, Qmp, QmpError
from qsnap.host.tasks import run_all
from qsnap.host.volumes import name_volume, snapshot_volume, thin_group
from qsnap.model import DiskEngine, DiskImage, StoredFile
from qsnap.rules.command import disk_node
from qsnap.rules.disks import COPY_GIVES_WAY_SINCE, DiskFacts, Version, choose_disk_engine

Action = dict[str, object]
Seal = Callable[[str], Awaitable[StoredFile]]
#: The speed of a copy until the VM runs on: at full speed it would hold up the cut. That of one chunk in each slice of
#: 100 ms (block/block-copy.c): a drain that comes as a copy is about to sleep does not wake it, so `cont` waits for it.
HELD_BYTES_S = 10 << 20
SETTLE_S = 0.1  #: between two rounds of writing out what is to be cloned


@frozen
class DiskStep:
    """What is done to one disk at the cut. `file` is new; `node` names it in QEMU, and the job that writes it.

    `volume` is the one that the engine `lvm` makes: `file` lies on it.
    """

    engine: DiskEngine
    reason: str
    disk: LiveDisk
    file: DiskFile
    node: str
    volume: str = ""

    @property
    def saved(self) -> tuple[tuple[DiskFile, ...], tuple[DiskFile, ...]]:
        """The disk as it is kept: its files in the store and those below them, newest first."""
        layers, below = self.disk.layers, self.disk.below
        match self.engine:
            case DiskEngine.REFLINK:
                return (self.file, *layers[1:]), below if layers else below[1:]
            case DiskEngine.LVM:
                return (self.file,), (DiskFile(self.volume, below[0].format), *below[1:])
            case DiskEngine.COPY:
                return (self.file,), ()
        return layers, below

    @property
    def after(self) -> LiveDisk:
        """The disk that the VM goes on with."""
        if self.engine is not DiskEngine.OVERLAY:
            return self.disk
        return evolve(self.disk, node=self.node, layers=(self.file, *self.disk.layers))


@frozen
class DiskPlan:
    """What is done to the disks of one VM at the cut. `version` is that of its QEMU."""

    steps: tuple[DiskStep, ...]
    version: Version
    qemu_img: str

    def of(self, engine: DiskEngine) -> tuple[DiskStep, ...]:
        """The steps of one engine."""
        return tuple(step for step in self.steps if step.engine is engine)

    @property
    def after(self) -> tuple[LiveDisk, ...]:
        """The disks that the VM goes on with."""
        return tuple(step.after for step in self.steps)


async def plan_disks(
    wish: DiskEngine, vm: str, disks: Sequence[LiveDisk], *, directory: str, version: Version, qemu_img: str
) -> DiskPlan:
    """Choose how each disk is kept, and the names of what that makes in `directory`. Changes nothing.

    Raises EngineRefusedError where a disk cannot be kept in the wished way.
    """
    steps = []
    for index, disk in enumerate(disks):
        chosen = choose_disk_engine(wish, await _gather_facts(wish, vm, disk, directory, qemu_img))
        reflink = chosen.engine is DiskEngine.REFLINK
        image_format = disk.files[0].format if reflink else "qcow2"
        path = new_path(directory, vm, index, image_format)
        kind = "copy" if chosen.engine is DiskEngine.COPY else "layer"
        node = f"{kind}-{Path(path).stem.rpartition('-')[2]}"
        volume = ""
        if chosen.engine is DiskEngine.LVM:
            volume = name_volume(await trio.to_thread.run_sync(thin_group, disk.files[0].path), path)
        steps.append(DiskStep(chosen.engine, chosen.reason, disk, DiskFile(path, image_format), node, volume))
    return DiskPlan(tuple(steps), version, qemu_img)


async def _gather_facts(wish: DiskEngine, vm: str, disk: LiveDisk, directory: str, qemu_img: str) -> DiskFacts:
    """What `wish` needs to be known: an overlay needs no probing."""
    top, owned = disk.files[0], bool(disk.layers)
    facts = DiskFacts(f"VM {vm}, {top.path}", owned, reflink_refusal="", lvm_refusal="", copy_refusal="")
    if wish is DiskEngine.OVERLAY or (wish is DiskEngine.AUTO and owned):
        return facts
    return evolve(
        facts,
        reflink_refusal=await trio.to_thread.run_sync(clone_refusal, top.path, top.format, directory),
        lvm_refusal=await trio.to_thread.run_sync(_lvm_refusal, top.path),
        copy_refusal=await _copy_refusal(top, directory, qemu_img),
    )


def _lvm_refusal(path: str) -> str:
    try:
        thin_group(path)
    except (HostError, OSError) as error:
        return error.message if isinstance(error, HostError) else str(error)
    return ""


async def _copy_refusal(top: DiskFile, directory: str, qemu_img: str) -> str:
    space = os.statvfs(directory)
    free_bytes = space.f_bavail * space.f_frsize
    try:
        needed_bytes = await measure_copy(qemu_img, top.path, top.format)
    except HostError:  # what qemu-img cannot read by its name may still be read by the QEMU that has it open
        return ""
    if needed_bytes <= free_bytes:
        return ""
    return f"a copy takes {needed_bytes >> 20} MiB, and the store has {free_bytes >> 20} MiB left"


async def image_of(step: DiskStep, seal: Seal) -> DiskImage:
    """What the manifest records of a disk; `seal` makes a file of the store durable, and describes it."""
    layers, below = step.saved
    stored = [await seal(f"disks/{os.path.basename(file.path)}") for file in layers]
    base = describe_base(below[0].path, below[0].format) if below else None
    return DiskImage(step.engine, step.reason, tuple(stored), layers[-1].format, base)


@frozen
class DiskCut:
    """The disks of one VM during a snapshot, with a connection to its QEMU."""

    qmp: Qmp
    plan: DiskPlan

    async def prepare(self) -> None:
        """Make the new files, and open in QEMU those that it is to write. An overlay lies on nothing yet."""
        for step in self.plan.steps:
            path, top = step.file.path, step.disk.files[0]
            match step.engine:
                case DiskEngine.OVERLAY:
                    await create_overlay(self.plan.qemu_img, path, base=top.path, base_format=top.format)
                case DiskEngine.COPY:
                    await create_empty(self.plan.qemu_img, path, step.disk.size_bytes)
                case DiskEngine.LVM:
                    size_bytes = step.disk.size_bytes
                    await create_above(
                        self.plan.qemu_img, path, volume=step.volume, image_format=top.format, size_bytes=size_bytes
                    )
                case _:
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        opened = (*self.plan.of(DiskEngine.OVERLAY), *self.plan.of(DiskEngine.COPY))
        nodes = [{**disk_node(step.file.path, step.node), "backing": None} for step in opened]
        await self.qmp.execute_all(*(("blockdev-add", node) for node in nodes))

    async def settle(self) -> None:
        """Write out what is dirty of the files to be cloned: at the cut the kernel would do it, the VM waiting."""
        await run_all([partial(_in_thread, sync_file, step.disk.files[0].path) for step in self._cloned])

    async def keep_settled(self) -> None:
        """Do that again and again, until cancelled."""
        while self._cloned:
            await self.settle()
            await trio.sleep(SETTLE_S)

    def commands(self) -> tuple[Command, ...]:
        """The one command that cuts all disks that QEMU itself cuts; none where there are none."""
        return _transaction(*self._overlay_actions(), *self._copy_actions())

    def commands_before_handover(self) -> tuple[Command, ...]:
        """The part of `commands` for a migration that ends by handing the disks over, which no copy survives."""
        return _transaction(*self._overlay_actions())

    def commands_after_handover(self) -> tuple[Command, ...]:
        """The rest of it, for when such a migration has ended. The VM has not run meanwhile."""
        copies = _transaction(*self._copy_actions())
        return (("blockdev-set-active", {"active": True}), *copies) if copies else ()

    async def clone(self) -> None:
        """Clone files and volumes. QEMU must have answered the `stop`: only then has it written out what it held."""
        await run_all([partial(_in_thread, self._clone, step) for step in self._cloned])

    async def finish(self, report: Report | None = None) -> None:
        """After the resume: wait until copies are complete, and close them. Raises QemuError if one fails."""
        for step in self.plan.of(DiskEngine.COPY):
            with suppress(QmpError):  # a small copy has ended all the same
                await self.qmp.execute("block-job-set-speed", {"device": step.node, "speed": 0})
            await wait_job(self.qmp, step.node, f"copy {step.disk.files[0].path}", report)
            await self.qmp.execute("blockdev-del", {"node-name": step.node})
        await self._let_write()
        for step in self.plan.of(DiskEngine.REFLINK):
            _, below = step.saved
            if below and not step.disk.layers:  # the clone may name it relative to where the original is
                await name_base(self.plan.qemu_img, step.file.path, base=below[0].path, base_format=below[0].format)

    async def undo(self) -> None:
        """Bring the VM back to the files it had, with what it wrote meanwhile, and close the new ones.

        Looks at what it finds: any step may have been reached, this undo included, by this process or another.
        """
        for step in self.plan.of(DiskEngine.COPY):
            await end_job(self.qmp, step.node)
            await self._close(step)
        await self._let_write()
        for step in self.plan.of(DiskEngine.OVERLAY):
            await self._merge_back(step)
            await self._close(step)

    @property
    def clones(self) -> bool:
        """Whether files or volumes are to be cloned, which QEMU may not write to meanwhile."""
        return bool(self._cloned)

    @property
    def _cloned(self) -> tuple[DiskStep, ...]:
        return (*self.plan.of(DiskEngine.REFLINK), *self.plan.of(DiskEngine.LVM))

    def _overlay_actions(self) -> list[Action]:
        return [
            {"type": "blockdev-snapshot", "data": {"node": step.disk.node, "overlay": step.node}}
            for step in self.plan.of(DiskEngine.OVERLAY)
        ]

    def _copy_actions(self) -> list[Action]:
        common: Action = {"sync": "full", "speed": HELD_BYTES_S, "auto-dismiss": False}
        if self.plan.version >= COPY_GIVES_WAY_SINCE:
            common["on-cbw-error"] = "break-snapshot"
        return [
            {
                "type": "blockdev-backup",
                "data": {"job-id": step.node, "device": step.disk.node, "target": step.node, **common},
            }
            for step in self.plan.of(DiskEngine.COPY)
        ]

    def _clone(self, step: DiskStep) -> None:
        source = step.disk.files[0].path
        if step.volume:
            snapshot_volume(source, step.volume, step.file.path)
            return
        try:
            clone_file(source, step.file.path)
        except OSError as error:
            raise HostError(f"cannot clone it: {error.strerror}", where=source, advice="Take --disks copy.") from error

    async def _let_write(self) -> None:
        """Before QEMU 10.1 a guest that writes while its copy finds no room is stopped; it can go on without one."""
        if self.plan.of(DiskEngine.COPY) and (await self.qmp.execute("query-status"))["status"] == "io-error":
            await self.qmp.execute("cont")

    async def _merge_back(self, step: DiskStep) -> None:
        job, doing = f"undo-{step.node}", "merge a disk layer back"
        with suppress(JobError):
            await wait_job(self.qmp, job, doing)  # of an undo that was broken off
        devices = await self.qmp.execute("query-block")
        if any(device.get("inserted", {}).get("node-name") == step.node for device in devices):
            arguments = {"job-id": job, "device": step.node, "base-node": step.disk.node, "auto-dismiss": False}
            await self.qmp.execute("block-commit", arguments)
            await wait_job(self.qmp, job, doing)

    async def _close(self, step: DiskStep) -> None:
        nodes = await self.qmp.execute("query-named-block-nodes", {"flat": True})
        if any(node["node-name"] == step.node for node in nodes):
            await self.qmp.execute("blockdev-del", {"node-name": step.node})


def _transaction(*actions: Action) -> tuple[Command, ...]:
    return (("transaction", {"actions": list(actions)}),) if actions else ()


async def _in_thread(function: Callable[..., None], *arguments: object) -> None:
    await trio.to_thread.run_sync(function, *arguments)
