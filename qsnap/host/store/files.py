"""Files and directories of a store: private, durable, and never reached through a symbolic link."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qsnap.errors import HostError, IntegrityError
from qsnap.rules.manifest import path_fault

_ADVICE = {
    errno.ENOSPC: "Free some space, remove old snapshots, or choose another store.",
    errno.EDQUOT: "The disk quota is used up. Remove old snapshots, or choose another store.",
    errno.EROFS: "The file system is read-only: make it writable, or choose another store.",
    errno.EACCES: "The store must belong to the user that runs qsnap.",
    errno.EPERM: "The store must belong to the user that runs qsnap.",
    errno.ENOENT: "Make the directory that the store is to be in, or choose another store.",
    errno.EIO: "The disk reports errors. Verify the snapshots and move them to another one.",
}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def explained(doing: str, where: Path) -> Iterator[None]:
    """Turn an OSError into a HostError that says what could not be done, at `where`, and what may help."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = _ADVICE.get(error.errno or 0, "")
        raise HostError(f"cannot {doing}: {reason}", where=str(where), advice=advice) from error


def make_directories(root: Path, *names: str) -> Path:
    """The directory `root`/`names`, made as far as it is missing; the parent of `root` must exist, or be below home.

    Whatever the umask, its mode is 0700, and so is that of what lies between; that of an older `root` is
    left.

    Raises:
        HostError: it cannot be made, or something else, such as a symbolic link, is in its place.
    """
    directory = root
    if root.is_relative_to(Path.home()):
        with explained("make the directory", root):
            root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("", *names):
        directory /= name
        with explained("make the directory", directory):
            try:
                directory.mkdir()
                directory.chmod(0o700)  # mkdir's own mode is subject to the umask
                sync_directory(directory.parent)
            except FileExistsError:
                if not directory.is_dir() or (name and directory.is_symlink()):
                    raise
                if name and directory.stat().st_mode & 0o777 != 0o700:  # it may be in a store that cannot be written to
                    directory.chmod(0o700)
    return directory


@contextmanager
def opened_inside(root: Path, *names: str) -> Iterator[int]:
    """A descriptor, for reading, of the regular file `root`/`names`, with no symbolic link below `root`.

    Raises:
        IntegrityError: there is no such file, or something else is in its place.
        HostError: the system refuses to open it.
    """
    path = root.joinpath(*names)
    with explained("open the file", path):
        fd = _open_inside(root, names, str(path))
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise IntegrityError("not a regular file", file=str(path))
        with explained("read the file", path):
            yield fd
    finally:
        os.close(fd)


def _open_inside(root: Path, names: tuple[str, ...], path: str) -> int:
    here = os.open(root, _DIRECTORY)
    try:
        for name in names[:-1]:
            inner = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = inner
        return os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
    except FileNotFoundError:
        raise IntegrityError(
            "the file is missing", file=path, advice="Put back a copy of it, or remove the snapshot."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        message = "a symbolic link or a file is in the way"
        raise IntegrityError(message, file=path, advice="Stores hold no symbolic links.") from None
    finally:
        os.close(here)


def stored_names(vne: str, relpath: str, file: str) -> tuple[str, ...]:
    """The names from a store's root to a stored file. IntegrityError about `file` if they lead out."""
    fault = path_fault(relpath)
    if fault:
        raise IntegrityError(fault, file=file)
    return (vne, *relpath.split("/"))


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by a file of mode 0600 that holds `data`; after a crash it is the old or the new one."""
    with explained("write", path):
        replace_file(path, data)


def replace_file(path: Path, data: bytes) -> None:
    """The same, where OSError has to say something else."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as stream:
            os.fchmod(fd, 0o600)
            stream.write(data)
            stream.flush()
            os.fsync(fd)
        temporary.rename(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    with explained("sync the directory", directory):
        fd = os.open(directory, _DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove whatever is at `path`, if anything; a symbolic link is removed, not followed."""
    with explained("remove", path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether a program has locked an image, as each QEMU does (RAW_LOCK_PERM_BASE, block/file-posix.c).

    No where the file cannot be opened, or its file system has no such locks.
    """
    asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 100, 200, 0)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            held: int = struct.unpack_from("h", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
        finally:
            os.close(fd)
    except OSError:
        return False
    return held != fcntl.F_UNLCK


def files_below(directory: Path, *tops: str) -> tuple[list[str], list[str]]:
    """(files, directories) below the directories `tops` of `directory`, as paths relative to `directory`.

    Symbolic links count as files. A top that is missing or no directory is left out.
    """
    files: list[str] = []
    directories: list[str] = []
    waiting = [top for top in tops if (directory / top).is_dir() and not (directory / top).is_symlink()]
    while waiting:
        here = waiting.pop()
        with explained("list the directory", directory / here), os.scandir(directory / here) as entries:
            for entry in entries:
                inner = entry.is_dir(follow_symlinks=False)
                (directories if inner else files).append(f"{here}/{entry.name}")
                if inner:
                    waiting.append(f"{here}/{entry.name}")
    return files, directories
