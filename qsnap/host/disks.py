"""Disk layers: making a qcow2 overlay, putting it under a running VM at the cut, and taking it out again.

Engine `overlay`: at the cut one `transaction` of `blockdev-snapshot` redirects all disks of a VM to new, empty
overlays. What lies below never changes again and is the disk of the snapshot.
"""

from __future__ import annotations

import os
from contextlib import suppress

import trio
from attrs import define, frozen

from qsnap.errors import HostError, QemuError
from qsnap.host.qmp import Command, Qmp
from qsnap.rules.command import disk_node


@frozen
class Overlay:
    """A new layer for one disk: `path` holds it, `node` names it in QEMU, `below` is the node it goes on top of."""

    path: str
    node: str
    below: str


async def create_overlay(qemu_img: str, path: str, *, base: str, base_format: str) -> None:
    """Make an empty qcow2 layer at `path` on top of the image `base`. Raises HostError with qemu-img's reason."""
    command = [qemu_img, "create", "-q", "-f", "qcow2", "-b", base, "-F", base_format, path]
    done = await trio.run_process(command, check=False, capture_stdout=True, capture_stderr=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        with suppress(FileNotFoundError):
            os.unlink(path)
        raise HostError(f"cannot make a disk layer: {reason}", where=path, advice=f"Check the image {base}.")
    os.chmod(path, 0o600)


@define
class DiskCut:
    """The disks of one VM during a snapshot: `prepare`, then `commands` inside the stop phase, or `undo`."""

    qmp: Qmp
    overlays: tuple[Overlay, ...]

    async def prepare(self) -> None:
        """Open the new layers in QEMU, on top of nothing yet. Their files exist."""
        nodes = [{**disk_node(overlay.path, overlay.node), "backing": None} for overlay in self.overlays]
        await self.qmp.execute_all(*(("blockdev-add", node) for node in nodes))

    def commands(self) -> tuple[Command, ...]:
        """The one command that redirects all disks; none where the VM has no disk."""
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": overlay.below, "overlay": overlay.node}}
            for overlay in self.overlays
        ]
        return (("transaction", {"actions": actions}),) if actions else ()

    async def undo(self) -> None:
        """Bring the VM back to the layers it had, with what it wrote meanwhile, and remove the new ones."""
        nodes = {node["node-name"] for node in await self.qmp.execute("query-named-block-nodes")}
        used = {overlay.node for overlay in self.overlays if await self._is_on_top(overlay)}
        for overlay in self.overlays:
            if overlay.node in used:
                await self._merge(overlay)
            if overlay.node in nodes:
                await self.qmp.execute("blockdev-del", {"node-name": overlay.node})

    async def _is_on_top(self, overlay: Overlay) -> bool:
        devices = await self.qmp.execute("query-block")
        return any(device.get("inserted", {}).get("node-name") == overlay.node for device in devices)

    async def _merge(self, overlay: Overlay) -> None:
        job = f"undo-{overlay.node}"
        since = len(self.qmp.events)
        arguments = {"job-id": job, "device": overlay.node, "base-node": overlay.below, "auto-dismiss": True}
        await self.qmp.execute("block-commit", arguments)
        await self._wait_job("BLOCK_JOB_READY", job, since)
        await self.qmp.execute("block-job-complete", {"device": job})
        await self._wait_job("BLOCK_JOB_COMPLETED", job, since)

    async def _wait_job(self, event_name: str, job: str, since: int) -> None:
        ends = (event_name, "BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR", "BLOCK_JOB_CANCELLED")
        event = await self.qmp.wait_event(
            lambda event: event.name in ends and event.data.get("device") == job, since=since
        )
        if event.name not in (event_name, "BLOCK_JOB_COMPLETED") or "error" in event.data:
            reason = event.data.get("error", event.name)
            raise QemuError(f"cannot merge a disk layer back: {reason}", where=f"VM {self.qmp.vm}")
