"""Taking away all that a VNE has on this host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from qsnap.errors import HostError, IntegrityError, StateError
from qsnap.host.births import being_started
from qsnap.host.bridges import open_links
from qsnap.host.netns import netns_path, remove_netns
from qsnap.host.qemu import Process, end_process, find_image_tools, find_processes
from qsnap.host.runtime import LiveVNE, Runtime
from qsnap.host.store import Store
from qsnap.host.tasks import run_all
from qsnap.rules.colouring import plan_removal

PATIENCE_S = 30.0
POLL_S = 0.01


async def take_down(vne: str, runtime: Runtime) -> None:
    """Take away all that a VNE has on this host, whatever of it there is. The caller holds its lock.

    It can be done again after it was interrupted. Without a readable state file, processes and networks are found by
    name; layers that only the file knew stay until the next snapshot of a VNE of this name. Of attached VMs, which are
    not qsnap's to end, it only lets go.
    """
    with trio.CancelScope(shield=True):
        try:
            live = runtime.load(vne)
        except (StateError, HostError):
            live = None
        if live is not None and live.vne.attached:
            await _release(live, runtime)
            return
        directory = str(runtime.directory(vne))
        mark = directory.replace(",", ",,")  # as it is on their command lines
        known = {vm.process for vm in live.vms} if live is not None else set()
        await _end_all(lambda: known.union(find_processes([f"path={mark}/"])), directory)
        await remove_netns(live.netns if live else runtime.netns(vne))
        runtime.huge_pages().give_back(vne)
        if live is not None:
            await collect(vne, live.store)
        runtime.forget(vne)


async def collect(vne: str, store: str, in_use: Iterable[str] = ()) -> None:
    """Remove all files of a VNE that neither a snapshot nor `in_use` needs. The caller holds its lock.

    A qemu-img that outlived the qsnap that started it would make its file after that, so it goes first.
    """
    images = os.path.abspath(Path(store) / vne)
    await _end_all(lambda: find_image_tools(images), os.path.join(images, "disks"))
    with suppress(IntegrityError):  # beside a damaged manifest nothing is garbage for certain; `verify` names it
        await Store(Path(store)).collect(vne, in_use)


async def _end_all(find: Callable[[], Iterable[Process]], directory: str) -> None:
    """Kill the processes that `find` finds, and wait until they are gone and none is being started any more."""
    patience = trio.current_time() + PATIENCE_S
    while True:
        settled = not being_started(directory)
        await run_all([partial(end_process, process) for process in find()])
        if settled:
            return
        if trio.current_time() > patience:
            advice = f"End what has it open, and try again. To see it: fuser -v {directory}"
            raise HostError(
                "a process was being started, and is neither there nor gone", where=directory, advice=advice
            )
        await trio.sleep(POLL_S)


async def _release(live: LiveVNE, runtime: Runtime) -> None:
    """What was put beside the bridges of attached VMs, dead or alive, goes; and qsnap forgets them."""
    if os.path.exists(netns_path(live.netns)):
        async with open_links(live.netns) as links:
            for step in plan_removal(live.vne):
                with suppress(HostError):  # what a dead VM had is gone already
                    await links.apply([step])
    runtime.forget(live.vne.name)
