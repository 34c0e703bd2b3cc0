"""What a disk consists of, as QEMU says, and how its layers become one again.

A merge copies what the layers hold into the one on top (`block-stream`) while the VM runs; the layers themselves stay
as they are, since they may belong to snapshots. QEMU ends a merge by itself if qsnap dies meanwhile. Therefore QEMU
is asked what a disk consists of whenever that matters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import frozen

from qsnap.errors import StateError
from qsnap.host.disks.jobs import Report, find_jobs, wait_job
from qsnap.host.qmp import Qmp
from qsnap.rules.disks import LONGEST_CHAIN


@frozen
class DiskFile:
    """An image file, by absolute path."""

    path: str
    format: str


@frozen
class LiveDisk:
    """A disk of a running VM, and the files it consists of, newest first: `layers` in the store, and what is `below`.

    `device` is its device as QEMU names it (`qdev` of query-block), `node` the block node on top, `size_bytes` what the
    guest sees. A VM writes to the first file. One that qsnap did not start has no layers.
    """

    device: str
    node: str
    size_bytes: int
    layers: tuple[DiskFile, ...]
    below: tuple[DiskFile, ...]

    @property
    def files(self) -> tuple[DiskFile, ...]:
        """Its whole backing chain."""
        return self.layers + self.below

    @property
    def job(self) -> str:
        """The id of the job that merges its layers."""
        return f"merge-{self.node}"


async def find_devices(qmp: Qmp, backends: Sequence[str]) -> tuple[str, ...]:
    """The devices of these block backends, or block nodes on top. Raises StateError if one is not there."""
    devices: dict[str, str] = {}
    for block in await qmp.execute("query-block"):
        if "inserted" in block and "qdev" in block:
            devices |= {block["inserted"]["node-name"]: block["qdev"], block.get("device", ""): block["qdev"]}
    for backend in backends:
        if backend not in devices:
            raise StateError(f"it has no disk {backend}", where=f"VM {qmp.vm}", advice="Was its medium changed?")
    return tuple(devices[backend] for backend in backends)


async def read_disks(qmp: Qmp, devices: Sequence[str], directory: str) -> tuple[LiveDisk, ...]:
    """The disks of these devices; `directory` has the layers of the VM's VNE. Raises StateError if one is not there."""
    blocks = await qmp.execute("query-block")
    return tuple(_live_disk(_find(blocks, device, qmp.vm), device, directory) for device in devices)


def _find(blocks: Sequence[dict[str, Any]], device: str, vm: str) -> dict[str, Any]:
    for block in blocks:
        if "inserted" in block and block.get("qdev") == device:
            inserted: dict[str, Any] = block["inserted"]
            return inserted
    raise StateError(f"it has no disk {device} any more", where=f"VM {vm}", advice="Attach it again.")


def _live_disk(inserted: dict[str, Any], device: str, directory: str) -> LiveDisk:
    files = tuple(_image_files(inserted["image"]))
    own = sum(is_inside(file.path, directory) for file in files)  # what is in the store never lies on what is not
    return LiveDisk(device, inserted["node-name"], inserted["image"]["virtual-size"], files[:own], files[own:])


def _image_files(image: dict[str, Any] | None) -> Iterator[DiskFile]:
    while image is not None:
        yield DiskFile(file_path(image["filename"]), image["format"])
        image = image.get("backing-image")


def file_path(filename: str) -> str:
    """The path of an image by QEMU's name for it, which is JSON where options were given that the file lacks."""
    if not filename.startswith("json:"):
        return filename
    try:
        options = json.loads(filename.removeprefix("json:"))
    except (ValueError, RecursionError):
        return filename
    while isinstance(options, dict) and "filename" not in options:
        options = options.get("file")
    return str(options["filename"]) if isinstance(options, dict) else filename


def is_inside(path: str, directory: str) -> bool:
    """Whether a file is one of a directory's own."""
    return os.path.realpath(os.path.dirname(path)) == os.path.realpath(directory)


async def tidy_disks(
    qmp: Qmp, devices: Sequence[str], directory: str, report: Report | None = None
) -> tuple[LiveDisk, ...]:
    """The disks, each of fewer than LONGEST_CHAIN layers, with nothing open in QEMU that they do not consist of.

    Raises QemuError where layers cannot be merged; the disks are then as they were.
    """
    disks = await read_disks(qmp, devices, directory)
    left = await find_jobs(qmp, [disk.job for disk in disks])  # to themselves, when their qsnap was killed
    for job in left:
        await wait_job(qmp, job, _MERGE, report)
    if left:
        disks = await read_disks(qmp, devices, directory)
    long = [disk for disk in disks if len(disk.layers) >= LONGEST_CHAIN]
    for disk in long:
        await _merge_layers(qmp, disk, report)
    if long:
        disks = await read_disks(qmp, devices, directory)
    await _close_unused(qmp, directory)
    return disks


_MERGE = "merge disk layers"


async def _merge_layers(qmp: Qmp, disk: LiveDisk, report: Report | None) -> None:
    """Copy what the layers of a disk hold into the top one, so that it lies on the image at the bottom alone."""
    floor = disk.below[0] if disk.below else disk.layers[-1]
    name = floor.path if disk.below else os.path.basename(floor.path)
    arguments = {"job-id": disk.job, "device": disk.node, "base": floor.path, "backing-file": name}
    await qmp.execute("block-stream", {**arguments, "auto-dismiss": False})
    await wait_job(qmp, disk.job, _MERGE, report)


async def _close_unused(qmp: Qmp, directory: str) -> None:
    """Close the layers that no disk consists of any more. A node holds the one below it, so the newest goes first."""
    blocks, nodes = await qmp.execute_all(("query-block", {}), ("query-named-block-nodes", {"flat": True}))
    used = {file.path for block in blocks if "inserted" in block for file in _image_files(block["inserted"]["image"])}
    for node in sorted(nodes, key=lambda node: int(node["backing_file_depth"]), reverse=True):
        path = file_path(node["file"])
        if not node["node-name"].startswith("#") and path not in used and is_inside(path, directory):
            await qmp.execute("blockdev-del", {"node-name": node["node-name"]})
