"""Snapshots in a store: from the first file of one to its removal.

A snapshot exists from the moment its manifest is renamed into place, after everything it names has reached
stable storage. What no manifest names is garbage. `docs/format.md` describes the layout.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import trio
from attrs import define, field

from qsnap.errors import HostError, IntegrityError, StateError
from qsnap.host.store.files import (
    explained,
    files_below,
    is_locked,
    make_directories,
    opened_inside,
    remove_tree,
    stored_names,
    sync_directory,
    write_durably,
)
from qsnap.host.store.seals import (
    Progress,
    Report,
    Seal,
    Seals,
    encode_seals,
    parse_seals,
    reporter,
    seal_of,
    take_seal,
)
from qsnap.host.volumes import remove_volume, volume_below
from qsnap.model import Snapshot, StoredFile
from qsnap.rules.manifest import (
    DIRECTORIES,
    MANIFEST,
    SEALS,
    check_names,
    encode_manifest,
    files_in,
    garbage,
    is_name,
    parse_manifest,
    snapshot_dir,
)


@define
class Store:
    """The snapshots under the directory `root`, which is made when first written to.

    What changes a VNE's snapshots is for one caller at a time, who keeps other processes away from that VNE
    (`collect` takes a snapshot in the making for garbage). Every method works in a worker thread, and can
    raise HostError where the system refuses, and StateError for a name that cannot be one.
    """

    root: Path = field(converter=Path)
    _fresh: dict[str, Seals] = field(factory=dict, init=False)  # by VNE: of files that are in no snapshot yet

    async def layers_directory(self, vne: str) -> Path:
        """The directory for the disk layers of a VNE, made if it is missing."""
        check_names(vne)
        return await trio.to_thread.run_sync(make_directories, self.root, vne, "disks")

    async def refuse_committed(self, vne: str, snapshot: str) -> None:
        """Raise StateError if there is a snapshot of that name."""
        check_names(vne, snapshot)
        await trio.to_thread.run_sync(self._refuse_committed, vne, snapshot)

    async def begin(self, vne: str, snapshot: str) -> Path:
        """A new, empty directory for a snapshot in the making; what a failed attempt left is removed first.

        Raises:
            StateError: there is a snapshot of that name.
        """
        check_names(vne, snapshot)
        return await trio.to_thread.run_sync(self._begin, vne, snapshot)

    async def make_room(self, vne: str, relpath: str) -> Path:
        """Where a file is to be written that comes from another store; its directory is made if it is missing.

        Raises:
            IntegrityError: the path leads out of the VNE's directory.
        """
        check_names(vne)
        *directories, name = stored_names(vne, relpath, str(self.root / vne / relpath))
        return await trio.to_thread.run_sync(make_directories, self.root, *directories) / name

    async def keep_file(self, vne: str, source: str) -> StoredFile:
        """A durable copy of somebody's file, called after its content: two with the same content have one copy.

        One that is there already is made right if it was altered. Raises HostError where one cannot be read or written.
        """
        check_names(vne)
        relpath, sha256 = await trio.to_thread.run_sync(self._keep, vne, Path(source))
        kept = await self.seal_file(vne, relpath)
        if kept.sha256 == sha256:
            return kept
        (self.root / vne / relpath).unlink()
        return await self.keep_file(vne, source)

    async def seal_file(self, vne: str, relpath: str, progress: Progress | None = None) -> StoredFile:
        """Make a complete file durable, and hash it. Files may be sealed concurrently.

        Raises:
            IntegrityError: it is missing, no regular file inside the VNE's directory, or still being written.
        """
        check_names(vne)
        seal = await trio.to_thread.run_sync(self._seal, vne, relpath, reporter(progress))
        self._fresh.setdefault(vne, {})[relpath] = seal
        return StoredFile(relpath, seal.size_bytes, seal.sha256)

    async def hold(self, snapshot: Snapshot) -> None:
        """Have everything ready for a commit, and durable, so that only its manifest's name is missing.

        Raises what `commit` raises.
        """
        check_names(snapshot.vne.name, snapshot.name)
        await trio.to_thread.run_sync(partial(self._write, snapshot, reporter(None), PENDING))

    async def held(self, vne: str, snapshot: str) -> Snapshot:
        """What `hold` was given. Raises IntegrityError if it is not there, or altered."""
        check_names(vne, snapshot)
        return await trio.to_thread.run_sync(self._held, vne, snapshot)

    async def commit(self, snapshot: Snapshot) -> None:
        """Make `snapshot` exist: it does once this returns, and does not if this raises.

        Its files are those that `seal_file` returned, of this store object, or that are in other snapshots.
        Any other file is hashed here.

        Raises:
            StateError: there is a snapshot of that name.
            IntegrityError: a file is missing or not what it should be, or `snapshot` is not complete.
        """
        vne = snapshot.vne.name
        check_names(vne, snapshot.name)
        await trio.to_thread.run_sync(self._commit, snapshot, reporter(None))
        self._fresh.pop(vne, None)

    async def replace(self, snapshot: Snapshot) -> None:
        """Let `snapshot` take the place of the committed one of its name; whatever happens, one of them exists, whole.

        Its files are as those of `commit`. `prune` removes what only the old one needed.

        Raises:
            StateError: there is no snapshot of that name.
            IntegrityError: a file is missing or not what it should be, or `snapshot` is not complete.
        """
        vne = snapshot.vne.name
        check_names(vne, snapshot.name)
        await trio.to_thread.run_sync(self._replace, snapshot, reporter(None))
        self._fresh.pop(vne, None)

    async def prune(self, vne: str, snapshot: str) -> tuple[str, ...]:
        """Remove from the directory of a committed snapshot what its manifest does not name, and return the paths.

        Raises:
            StateError: there is no such snapshot.
            IntegrityError: the manifest is altered or of another format. Nothing was removed.
        """
        check_names(vne, snapshot)
        return await trio.to_thread.run_sync(self._prune, vne, snapshot)

    async def names(self, vne: str | None = None) -> tuple[tuple[str, str], ...]:
        """(VNE, snapshot) of every committed snapshot, of one VNE or of all, sorted; damaged ones too."""
        if vne is not None:
            check_names(vne)
        return await trio.to_thread.run_sync(self._all_names, vne)

    async def list(self, vne: str | None = None) -> tuple[Snapshot, ...]:
        """Every committed snapshot, of one VNE or of all: by VNE, the oldest first.

        Raises:
            IntegrityError: a manifest is damaged. `names` and `load` get past it.
        """
        found = [await self.load(*each) for each in await self.names(vne)]
        return tuple(sorted(found, key=lambda each: (each.vne.name, each.created_s)))

    async def load(self, vne: str, snapshot: str) -> Snapshot:
        """What the manifest records. Its files are not looked at.

        Raises:
            StateError: there is no such snapshot.
            IntegrityError: the manifest is altered or of another format.
        """
        check_names(vne, snapshot)
        return await trio.to_thread.run_sync(self._load, vne, snapshot)

    async def check_quick(self, vne: str, snapshot: str, progress: Progress | None = None) -> Snapshot:
        """Like `load`, and make sure that every file is what was stored, hashing those with a broken seal.

        Raises:
            StateError: there is no such snapshot.
            IntegrityError: the manifest or a file is missing or altered; it is named.
        """
        check_names(vne, snapshot)
        check = partial(self._check, vne, snapshot, reporter(progress), trust_seals=True)
        return await trio.to_thread.run_sync(check)

    async def verify(self, vne: str, snapshot: str, progress: Progress | None = None) -> Snapshot:
        """Like `check_quick`, but hash every file whatever its seal says."""
        check_names(vne, snapshot)
        check = partial(self._check, vne, snapshot, reporter(progress), trust_seals=False)
        return await trio.to_thread.run_sync(check)

    async def remove(self, vne: str, snapshot: str, in_use: Iterable[str] = ()) -> tuple[str, ...]:
        """Remove a snapshot, and then whatever nothing else needs. Returns what `collect` returns.

        A damaged snapshot can be removed too.

        Raises:
            StateError: there is no such snapshot.
            IntegrityError: the snapshot is removed, but another one is damaged: see `collect`.
        """
        check_names(vne, snapshot)
        await trio.to_thread.run_sync(self._forget, vne, snapshot)
        return await self.collect(vne, in_use)

    async def collect(self, vne: str, in_use: Iterable[str] = ()) -> tuple[str, ...]:
        """Remove every file of a VNE that nothing needs. Returns their paths relative to its directory.

        `in_use` are the paths, absolute or relative to the VNE's directory, of the files that running VMs
        need: for a disk, its whole chain of layers. Layers that a QEMU has open stay in any case: of VMs that were let
        go of, or are known in another run directory.

        Raises:
            IntegrityError: a manifest is damaged, and so what it needs is not known. Nothing was removed.
        """
        check_names(vne)
        return await trio.to_thread.run_sync(self._collect, vne, frozenset(in_use))

    # What follows runs in worker threads.

    def _directory(self, vne: str, snapshot: str) -> Path:
        return self.root / vne / snapshot_dir(snapshot)

    def _begin(self, vne: str, snapshot: str) -> Path:
        self._refuse_committed(vne, snapshot)
        make_directories(self.root, vne, "disks")
        remove_tree(make_directories(self.root, vne, "snapshots") / snapshot)
        return make_directories(self.root, vne, "snapshots", snapshot)

    def _refuse_committed(self, vne: str, snapshot: str) -> None:
        if snapshot in self._snapshots(vne):
            raise StateError(f"there is a snapshot {snapshot} of {vne}", advice="Choose another name, or remove it.")

    def _keep(self, vne: str, source: Path) -> tuple[str, str]:
        with explained("read the file", source):
            content = source.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        path = make_directories(self.root, vne, "boot") / sha256[:12]
        if not path.exists():
            write_durably(path, content)
        return f"boot/{path.name}", sha256

    def _seal(self, vne: str, relpath: str, report: Report) -> Seal:
        file = str(self.root / vne / relpath)
        with opened_inside(self.root, *stored_names(vne, relpath, file)) as fd:
            if os.fstat(fd).st_mode & 0o777 != 0o600:
                os.fchmod(fd, 0o600)
            os.fsync(fd)
            return take_seal(fd, file, report)

    def _commit(self, snapshot: Snapshot, report: Report) -> None:
        vne = snapshot.vne.name
        self._refuse_committed(vne, snapshot.name)
        try:
            self._write(snapshot, report)
        except HostError:
            with suppress(OSError):
                (self._directory(vne, snapshot.name) / MANIFEST).unlink(missing_ok=True)
            raise

    def _replace(self, snapshot: Snapshot, report: Report) -> None:
        self._require(snapshot.vne.name, snapshot.name)
        self._write(snapshot, report)

    def _write(self, snapshot: Snapshot, report: Report, name: str = MANIFEST) -> None:
        vne, directory = snapshot.vne.name, self._directory(snapshot.vne.name, snapshot.name)
        manifest = encode_manifest(snapshot)
        parse_manifest(manifest, file=str(directory / name))  # what is committed can be read back
        make_directories(self.root, vne, "snapshots", snapshot.name)
        seals = self._seal_all(snapshot, report)
        self._sync_directories(vne, files_in(snapshot))
        write_durably(directory / SEALS, encode_seals(seals))
        write_durably(directory / name, manifest)

    def _held(self, vne: str, snapshot: str) -> Snapshot:
        path = f"{snapshot_dir(snapshot)}/{PENDING}"
        return parse_manifest(self._read(vne, path), file=str(self.root / vne / path))

    def _seal_all(self, snapshot: Snapshot, report: Report) -> Seals:
        """Seals of its files, known ones as far as possible. All are on stable storage afterwards."""
        vne, known, seals = snapshot.vne.name, Seals(), Seals()
        for each in (*self._snapshots(vne), snapshot.name):
            known |= self._read_seals(vne, each)
        known |= self._fresh.get(vne, {})
        for file in files_in(snapshot):
            with self._opened(vne, file) as fd:
                os.fsync(fd)
            seals[file.path] = self._check_file(vne, file, known.get(file.path), report)
        return seals

    def _sync_directories(self, vne: str, files: tuple[StoredFile, ...]) -> None:
        parents = {parent for file in files for parent in Path(file.path).parents}
        for directory in sorted(self.root / vne / parent for parent in parents):
            with explained("set the mode of the directory", directory):
                directory.chmod(0o700)
            sync_directory(directory)

    def _prune(self, vne: str, snapshot: str) -> tuple[str, ...]:
        recorded = self._load(vne, snapshot)
        files, _ = files_below(self.root / vne, snapshot_dir(snapshot))
        waste = garbage([recorded], files, ())
        for path in waste:
            remove_tree(self.root / vne / path)
        return waste

    def _all_names(self, vne: str | None) -> tuple[tuple[str, str], ...]:
        if not (self.root.parent.is_dir() or self.root.is_relative_to(Path.home())):
            message = "there is no store, and no directory to make it in"
            raise HostError(message, where=str(self.root), advice="Make the directory, or choose another store.")
        names = self._vnes() if vne is None else (vne,)
        return tuple((each, snapshot) for each in names for snapshot in self._snapshots(each))

    def _vnes(self) -> tuple[str, ...]:
        return _names_in(self.root)

    def _snapshots(self, vne: str) -> tuple[str, ...]:
        """The names of the committed snapshots. Damaged ones are among them: they are no garbage."""
        directory = self.root / vne / "snapshots"
        return tuple(name for name in _names_in(directory) if os.path.lexists(directory / name / MANIFEST))

    def _require(self, vne: str, snapshot: str) -> None:
        committed = self._snapshots(vne)
        if snapshot in committed:
            return
        if committed:
            raise StateError(f"{vne} has no snapshot {snapshot}", advice=_nearest(snapshot, committed))
        advice = _nearest(vne, [each for each in self._vnes() if self._snapshots(each)])
        raise StateError(f"{vne} has no snapshots", where=str(self.root), advice=advice)

    def _load(self, vne: str, snapshot: str) -> Snapshot:
        self._require(vne, snapshot)
        file = str(self._directory(vne, snapshot) / MANIFEST)
        recorded = parse_manifest(self._read(vne, f"{snapshot_dir(snapshot)}/{MANIFEST}"), file=file)
        if (recorded.vne.name, recorded.name) != (vne, snapshot):
            message = f"the manifest is of snapshot {recorded.name} of {recorded.vne.name}"
            raise IntegrityError(message, file=file, advice="Move it back to where it belongs.")
        return recorded

    def _read(self, vne: str, relpath: str) -> bytes:
        names = stored_names(vne, relpath, str(self.root / vne / relpath))
        with opened_inside(self.root, *names) as fd, open(fd, "rb", closefd=False) as stream:
            return stream.read()

    def _read_seals(self, vne: str, snapshot: str) -> Seals:
        try:
            return parse_seals(self._read(vne, f"{snapshot_dir(snapshot)}/{SEALS}"))
        except (IntegrityError, HostError):
            return {}

    @contextmanager
    def _opened(self, vne: str, file: StoredFile) -> Iterator[int]:
        """A descriptor of a stored file, which has the size it should have."""
        path = str(self.root / vne / file.path)
        with opened_inside(self.root, *stored_names(vne, file.path, path)) as fd:
            found_bytes = os.fstat(fd).st_size
            if found_bytes != file.size_bytes:
                message = f"the file has {found_bytes} bytes instead of {file.size_bytes}"
                raise IntegrityError(message, file=path, advice=_DAMAGED)
            yield fd

    def _check(self, vne: str, snapshot: str, report: Report, *, trust_seals: bool) -> Snapshot:
        recorded = self._load(vne, snapshot)
        seals = self._read_seals(vne, snapshot)
        found = {}
        for file in files_in(recorded):
            seal = seals.get(file.path) if trust_seals else None
            found[file.path] = self._check_file(vne, file, seal, report)
        if found != seals:
            with suppress(HostError):  # a store that cannot be written to can still be restored from
                write_durably(self._directory(vne, snapshot) / SEALS, encode_seals(found))
        return recorded

    def _check_file(self, vne: str, file: StoredFile, seal: Seal | None, report: Report) -> Seal:
        """The seal of a file that has the right content: `seal`, if that is unbroken, else a new one."""
        path = str(self.root / vne / file.path)
        with self._opened(vne, file) as fd:
            if seal is not None and seal == seal_of(os.fstat(fd), file.sha256):
                return seal
            seal = take_seal(fd, path, report)
        if seal.sha256 != file.sha256:
            raise IntegrityError("the content was altered: its digest is wrong", file=path, advice=_DAMAGED)
        return seal

    def _forget(self, vne: str, snapshot: str) -> None:
        self._require(vne, snapshot)
        directory = self._directory(vne, snapshot)
        doomed = directory if directory.is_symlink() else directory / MANIFEST
        remove_tree(doomed)
        sync_directory(doomed.parent)

    def _collect(self, vne: str, in_use: frozenset[str]) -> tuple[str, ...]:
        home = self.root / vne
        if home.is_symlink():
            raise IntegrityError("it is a symbolic link", file=str(home), advice="Stores hold none.")
        committed = [self._load(vne, snapshot) for snapshot in self._snapshots(vne)]
        kept = {os.path.relpath(os.path.realpath(home / path), os.path.realpath(home)) for path in in_use}
        files, directories = files_below(home, *DIRECTORIES)
        waste = garbage(committed, files, kept)
        if locked := {path for path in waste if path.startswith("disks/") and is_locked(home / path)}:
            kept |= {*locked, "boot"}  # a VM of which nobody told has them open, and is to be saved with its kernel
            waste = garbage(committed, files, kept)
        needed = {disk.base.file for saved in committed for vm in saved.vms for disk in vm.disks if disk.base}
        volumes = {path: volume for path in waste if (volume := volume_below(home / path))}
        waste = tuple(path for path in waste if volumes.get(path) not in needed | in_use)
        for path in waste:
            if path in volumes:
                remove_volume(volumes[path])
            remove_tree(home / path)
        for path in reversed(garbage((), directories, kept)):
            with suppress(OSError):  # it is not empty: something in it is needed
                (home / path).rmdir()
        return waste


PENDING = "pending.json"  #: the manifest of a snapshot that another host has yet to commit
_DAMAGED = "Put back a copy of it, or remove the snapshot."


def _names_in(directory: Path) -> tuple[str, ...]:
    """What in `directory` has a name as VNEs and snapshots have; nothing if there is no such directory."""
    try:
        with explained("list the directory", directory):
            return tuple(sorted(name for name in os.listdir(directory) if is_name(name)))
    except HostError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return ()
        raise


def _nearest(name: str, known: Iterable[str]) -> str:
    known = tuple(known)
    close = get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"{hint}Known: {', '.join(known[:20])}." if known else "The store is empty."
