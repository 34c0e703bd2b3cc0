"""Files of a snapshot from one agent to another: what the host that lacks them does, and what the one that has them.

A file is written where it belongs, from its beginning on, so that what has come of it when a connection is lost need
not come again. It is used once its digest is right, and kept once a manifest names it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio
from attrs import define, evolve, field

from qsnap.errors import IntegrityError, StateError
from qsnap.fleet.channel import Connection, connect
from qsnap.fleet.identity import load_identity
from qsnap.fleet.remote import ask
from qsnap.host.disks import describe_base, image_bytes, name_base, read_chain
from qsnap.host.memory import data_extents
from qsnap.host.place import Place, Progress
from qsnap.host.recovery import exclusive
from qsnap.host.restoring import check_bases, refuse_running
from qsnap.host.starting import find_qemu_img
from qsnap.host.store import Store
from qsnap.host.store.files import explained, opened_inside, stored_names
from qsnap.host.store.seals import reporter, take_seal
from qsnap.model import BaseImage, DiskImage, Snapshot, StoredFile, VMSnapshot
from qsnap.rules.manifest import files_in, files_of
from qsnap.rules.moving import base_path, check_paths, known_layers, with_layers, with_vms
from qsnap.rules.parts import joined, whole_snapshot
from qsnap.wire import messages as m
from qsnap.wire.extents import HEAD, LIMIT_BYTES, decode_extents, encode_extent


async def fetch(place: Place, message: m.Fetch, progress: Progress) -> Snapshot:
    """Fetch the VMs of a snapshot that this host lacks from those that have them, and return what it has then.

    Raises StateError while the VNE runs here; IntegrityError where another snapshot has this name, and naming the first
    file that did not come as it was stored.
    """
    vne, name = message.part.name, message.name
    identity = load_identity(place.identity)
    async with exclusive(place.runtime(), vne):
        await refuse_running(vne, place.runtime())
        store = place.snapshots()
        present = await store.list(vne)
        here = next((saved for saved in present if saved.name == name), None)
        parts = [here] if here else []
        vms = {vm.vm.name: vm for vm in here.vms} if here else {}
        having = [vm for saved in present for vm in saved.vms if vm.has_disks(saved.vne.here)]
        fetching = _Fetching(store, vne, name, progress, known_layers(disk for vm in having for disk in vm.disks))
        for host in message.part.hosts:
            wanted = [vm for vm, sources in message.sources.items() if host.name in sources]
            if wanted:
                async with connect(host, identity) as connection:
                    parts += (await ask(connection, m.GetSnapshots(vne, name), m.Snapshots)).snapshots
                    whole_snapshot(parts)  # they are of the same one
                    for vm in (vm for vm in parts[-1].vms if vm.vm.name in wanted):
                        fetched = await fetching.fetch_vm(connection, vm, host.name)
                        vms[vm.vm.name] = joined(vms.get(vm.vm.name), fetched, host.name)
        whole = [evolve(vm, kept_on="") if vm.vm.name in message.sources else vm for vm in vms.values()]
        part = with_vms(parts[0], await fetching.join(whole, message.part.vms[0].qemu), message.part)
        await (store.replace if here else store.commit)(part)
        return part


@define
class _Fetching:
    """What is being fetched.

    `layers` are those that are here, `bases` for layers that have come what they are to lie on: file and format.
    """

    store: Store
    vne: str
    name: str
    progress: Progress
    layers: dict[str, DiskImage]
    bases: dict[str, tuple[str, str]] = field(factory=dict)
    vm: str = ""
    done: int = 0
    total: int = 0

    async def fetch_vm(self, connection: Connection, vm: VMSnapshot, host: str) -> VMSnapshot:
        """Have all files here that a host has of a VM, with the content that they should have."""
        check_paths(self.name, vm)
        lacking = [file for file in files_of(vm, host) if file.path not in self.layers]
        self.vm, self.done, self.total = vm.vm.name, 0, sum(file.size_bytes for file in lacking)
        if vm.has_state(host):
            for file in (*(block.file for block in vm.ram), vm.device_stream):
                await self._fetch_file(connection, file.path, file)
        if not vm.has_disks(host):
            return vm
        for each in vm.boot:
            await self._fetch_file(connection, each.file.path, each.file)
        return evolve(vm, disks=tuple([await self._fetch_disk(connection, disk) for disk in vm.disks]))

    async def join(self, vms: Iterable[VMSnapshot], qemu: str) -> list[VMSnapshot]:
        """Have layers name what they lie on here, and return the VMs with these."""
        home, changed = self.store.root / self.vne, {}
        for path, (base, image_format) in self.bases.items():
            await name_base(find_qemu_img(qemu), str(home / path), base=str(home / base), base_format=image_format)
            changed[path] = await self.store.seal_file(self.vne, path)
        return [with_layers(vm, changed) for vm in vms]

    async def _fetch_disk(self, connection: Connection, disk: DiskImage) -> DiskImage:
        come: list[StoredFile] = []
        for layer in disk.layers:
            if known := self.layers.get(layer.path):
                return self._know(evolve(known, layers=(*come, *known.layers)), disk)
            await self._fetch_file(connection, layer.path, layer)
            come.append(layer)
        if disk.base is None:
            return self._know(evolve(disk, layers=tuple(come)), disk)
        if _is_here(disk.base):
            return self._know(disk, disk)
        base = await ask(connection, m.GetBase(self.vne, self.name, disk.base.file), m.Base)
        if all([await trio.to_thread.run_sync(_has_content, image) for image in base.images]):
            here = describe_base(disk.base.file, disk.base.format)
            return self._know(evolve(disk, base=here), disk)
        for image in base.images:
            file = StoredFile(base_path(image.sha256, image.format), image.size_bytes, image.sha256)
            self.bases[come[-1].path] = (file.path, image.format)
            if known := self.layers.get(file.path):
                return self._know(evolve(known, layers=(*come, *known.layers)), disk)
            self.total += image.size_bytes
            await self._fetch_file(connection, image.file, file)
            come.append(file)
        return self._know(evolve(disk, layers=tuple(come), format=base.images[-1].format, base=None), disk)

    def _know(self, found: DiskImage, disk: DiskImage) -> DiskImage:
        """Note that these layers are here now; they are kept as `disk` was."""
        self.layers |= known_layers([found])
        return evolve(found, engine=disk.engine, reason=disk.reason)

    async def _fetch_file(self, connection: Connection, there: str, file: StoredFile) -> None:
        """Have a file here with the right content. What came of it before is asked for again only if it is wrong."""
        path = await self.store.make_room(self.vne, file.path)
        for start in dict.fromkeys((_arrived_bytes(path, file.size_bytes), 0)):
            if start < file.size_bytes or not path.exists():
                await connection.send(m.ReadFile(self.vne, self.name, there, start))
                await self._receive(connection, path, start, file.size_bytes)
            sealed = await self.store.seal_file(self.vne, file.path)
            if sealed == file:
                self.done += file.size_bytes
                self.progress("fetch", self.vm, self.done, self.total)
                return
            path.unlink()
        raise IntegrityError(
            f"it is not what was stored: its digest is wrong as it came from {connection.peer.name}",
            file=str(path),
            advice=f"See what is wrong with it there: qsnap verify {self.vne} {self.name}",
        )

    async def _receive(self, connection: Connection, path: Path, start: int, size_bytes: int) -> None:
        with explained("write the file", path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, start)
                while body := await connection.receive_data():
                    start = await trio.to_thread.run_sync(_write, fd, body, start, size_bytes)
                    self.progress("fetch", self.vm, self.done + start, self.total)
                os.ftruncate(fd, size_bytes)
            finally:
                os.close(fd)


def _is_here(base: BaseImage) -> bool:
    try:
        return bool(base.mtime_ns) and describe_base(base.file, base.format) == base  # any device may be of this size
    except OSError:
        return False


def _has_content(image: m.ImageFile) -> bool:
    """Whether an image has the same content here as on another host."""
    try:
        return image_bytes(image.file) == image.size_bytes and _digest(image.file) == image.sha256
    except OSError:
        return False


def _digest(file: str) -> str:
    with open(file, "rb") as stream:
        return take_seal(stream.fileno(), file, reporter(None)).sha256


def _arrived_bytes(path: Path, size_bytes: int) -> int:
    """What has come of a file before; a longer one is another's."""
    try:
        found_bytes = path.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
    return found_bytes if found_bytes <= size_bytes else 0


def _write(fd: int, body: bytes, start: int, size_bytes: int) -> int:
    """Write extents; the end of the last one."""
    for offset, data in decode_extents(body, start, size_bytes):
        start = offset + len(data)
        while data:
            written = os.pwrite(fd, data, start - len(data))
            data = data[written:]
    return start


async def find_base(place: Place, message: m.GetBase) -> m.Base:
    """A base image of a snapshot that this host has, and what it lies on."""
    saved = await place.snapshots().load(message.vne, message.name)
    images = []
    for path, image_format in await _chain(saved, message.file):
        with explained("read the image", Path(path)):
            size_bytes = image_bytes(path)
            sha256 = await trio.to_thread.run_sync(_digest, path)
        images.append(m.ImageFile(path, image_format, size_bytes, sha256))
    return m.Base(tuple(images))


async def send_file(connection: Connection, place: Place, message: m.ReadFile) -> None:
    """Send what was asked for, if it belongs to the snapshot."""
    store = place.snapshots()
    saved = await store.load(message.vne, message.name)
    bases = {disk.base.file for vm in saved.vms for disk in vm.disks if disk.base}
    images = [path for base in bases for path, _ in await _chain(saved, base)] if message.path[:1] == "/" else []
    with _opened(message.path, store, saved, images) as fd:
        bodies = _read(fd, message.offset, os.lseek(fd, 0, os.SEEK_END))
        while body := await trio.to_thread.run_sync(next, bodies, b""):
            await connection.send_data(body)
        await connection.send_data(b"")


def _read(fd: int, offset: int, size_bytes: int) -> Iterator[bytes]:
    """The data of a file from `offset` on: extents, as many as may be sent together."""
    body = bytearray()
    for start, end in data_extents(fd, size_bytes, offset):
        while start < end:
            room_bytes = LIMIT_BYTES - len(body) - HEAD.size
            if room_bytes <= 0:
                yield bytes(body)
                body.clear()
                continue
            data = os.pread(fd, min(end - start, room_bytes), start)
            if not data:
                break  # the file was cut short meanwhile, which its digest will tell
            body += encode_extent(start, data)
            start += len(data)
    yield bytes(body)


@contextmanager
def _opened(path: str, store: Store, saved: Snapshot, images: Iterable[str]) -> Iterator[int]:
    if path in {file.path for file in files_in(saved)}:
        where = str(store.root / saved.vne.name / path)
        with opened_inside(store.root, *stored_names(saved.vne.name, path, where)) as fd:
            yield fd
    elif path in images:
        with explained("read the image", Path(path)), open(path, "rb") as stream:
            yield stream.fileno()
    else:
        raise StateError(f"snapshot {saved.name} of {saved.vne.name} has no file {path[:200]!r}")


async def _chain(saved: Snapshot, file: str) -> tuple[tuple[str, str], ...]:
    """(path, format) of a base image of a snapshot and of all that it lies on."""
    for vm in saved.vms:
        for disk in vm.disks:
            if disk.base and disk.base.file == file:
                check_bases([vm])
                return await read_chain(find_qemu_img(vm.vm.qemu), file, disk.base.format)
    raise StateError(f"no disk in snapshot {saved.name} of {saved.vne.name} lies on {file[:200]!r}")
