"""Image files: made and measured by qemu-img, cloned by the kernel."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import trio

from qsnap.errors import HostError
from qsnap.host.births import starting
from qsnap.model import BaseImage

FICLONE = 0x40049409  #: _IOW(0x94, 9, int), linux/fs.h
FICLONERANGE = 0x4020940D  #: _IOW(0x94, 13, struct file_clone_range)
_BLOCK_BYTES = 1 << 16  #: a multiple of the blocks of all file systems that clone


def new_path(directory: str, vm: str, disk: int, image_format: str) -> str:
    """A name for a new image in `directory` that no snapshot and no VM has had before."""
    return os.path.join(directory, f"{vm}-disk{disk}-{secrets.token_hex(6)}.{image_format}")


async def create_overlay(qemu_img: str, path: str, *, base: str, base_format: str) -> None:
    """Make an empty qcow2 layer at `path` on top of the image `base`. Raises HostError with qemu-img's reason.

    A base in the same directory is named relative to it, so that the directory can be moved.
    """
    await _create(qemu_img, path, "-b", _name_for(path, base), "-F", base_format, path, about=base)


async def create_empty(qemu_img: str, path: str, size_bytes: int) -> None:
    """Make an empty qcow2 image of its own."""
    await _create(qemu_img, path, path, str(size_bytes), about=path)


async def _create(qemu_img: str, path: str, *arguments: str, about: str) -> None:
    try:
        with starting(os.path.dirname(path)) as fd:
            await _run(qemu_img, "create", "-q", "-f", "qcow2", *arguments, inherited=(fd,))
    except HostError as error:
        with suppress(OSError):
            os.unlink(path)
        message = f"cannot make a disk layer: {error.message}"
        advice = f"Is there room? Is the image {about} in order?"
        if "is not in" in error.message:
            advice = f"The description tells the format of {about}, qcow2 if it says nothing: is it `raw`?"
        raise HostError(message, where=path, advice=advice) from None
    os.chmod(path, 0o600)


async def create_above(qemu_img: str, path: str, *, volume: str, image_format: str, size_bytes: int) -> None:
    """Make an empty qcow2 layer on top of a volume that is yet to be."""
    await _create(qemu_img, path, "-u", "-b", volume, "-F", image_format, path, str(size_bytes), about=volume)


async def name_base(qemu_img: str, path: str, *, base: str, base_format: str) -> None:
    """Have a qcow2 image name `base` as what it lies on, in the same way. Its content is not touched."""
    await _run(qemu_img, "rebase", "-u", "-f", "qcow2", "-b", _name_for(path, base), "-F", base_format, path)


def _name_for(path: str, base: str) -> str:
    same = os.path.dirname(base) == os.path.dirname(path)
    return os.path.basename(base) if same else os.path.abspath(base)


async def read_chain(qemu_img: str, path: str, image_format: str) -> tuple[tuple[str, str], ...]:
    """(path, format) of an image, which may be in use, and of all that it lies on. HostError if one is missing."""
    told = await _run(qemu_img, "info", "--force-share", "--backing-chain", "--output=json", "-f", image_format, path)
    return tuple((image["filename"], image["format"]) for image in json.loads(told))


async def measure_copy(qemu_img: str, path: str, image_format: str) -> int:
    """The bytes that a full qcow2 copy of an image, which may be in use, takes now."""
    told = await _run(qemu_img, "measure", "--force-share", "--output", "json", "-f", image_format, "-O", "qcow2", path)
    return int(json.loads(told)["required"])


async def _run(*command: str, inherited: Sequence[int] = ()) -> str:
    done = await trio.run_process(
        command, check=False, capture_stdout=True, capture_stderr=True, pass_fds=tuple(inherited)
    )
    if done.returncode:
        raise HostError(done.stderr.decode(errors="replace").strip(), where=command[-1])
    return done.stdout.decode()


def clone_file(source: str, target: str) -> None:
    """Make `target`, which exists, share all data of `source` (ioctl_ficlone(2)). What is dirty is written first."""
    with open(source, "rb", buffering=0) as old, open(target, "r+b", buffering=0) as new:
        fcntl.ioctl(new.fileno(), FICLONE, old.fileno())


def sync_file(path: str) -> None:
    """Write what is dirty of a file, so that a clone of it has less to wait for. Raises HostError if it cannot be."""
    try:
        with open(path, "rb", buffering=0) as file:
            os.fdatasync(file.fileno())
    except OSError as error:
        advice = "Is there room, and is what it lies on in order?"
        raise HostError(f"cannot write it out: {error.strerror}", where=path, advice=advice) from error


def image_bytes(path: str) -> int:
    """The size of an image, which may be a block device. Raises OSError."""
    with open(path, "rb", buffering=0) as image:
        return image.seek(0, os.SEEK_END)


def describe_base(path: str, image_format: str) -> BaseImage:
    """What tells whether an image is still the same. Raises OSError."""
    status = os.stat(path)
    is_device = stat.S_ISBLK(status.st_mode)
    return BaseImage(path, image_format, image_bytes(path), 0 if is_device else status.st_mtime_ns)


def clone_refusal(source: str, image_format: str, directory: str) -> str:
    """Why no file of `directory` can be a clone of an image, or nothing. Found by cloning its beginning."""
    if image_format not in ("raw", "qcow2") or not os.path.isfile(source):
        return "it is no raw or qcow2 file"
    path = Path(directory) / f".clone-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        with open(source, "rb", buffering=0) as old, open(path, "xb", buffering=0) as new:
            length = _BLOCK_BYTES if os.fstat(old.fileno()).st_size > _BLOCK_BYTES else 0
            fcntl.ioctl(new.fileno(), FICLONERANGE, struct.pack("qQQQ", old.fileno(), 0, length, 0))
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
            return "its file system cannot clone files"
        if error.errno == errno.EXDEV:
            return "the store is on another file system"
        return f"the file system refuses: {error.strerror}"
    finally:
        path.unlink(missing_ok=True)
    return ""
