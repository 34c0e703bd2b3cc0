"""Taking away all that a VNE has on this host."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from qsnap.errors import HostError, IntegrityError, StateError
from qsnap.host.netns import remove_netns
from qsnap.host.qemu import end_process, find_processes
from qsnap.host.runtime import Runtime
from qsnap.host.store import Store
from qsnap.host.tasks import run_all


async def take_down(vne: str, runtime: Runtime) -> None:
    """Take away all that a VNE has on this host, whatever of it there is. The caller holds its lock.

    It can be done again after it was interrupted. Without a readable state file, processes and networks are found by
    name; layers that only the file knew stay until the next snapshot of a VNE of this name.
    """
    with trio.CancelScope(shield=True):
        try:
            live = runtime.load(vne)
        except (StateError, HostError):
            live = None
        processes = set(find_processes([f"path={runtime.directory(vne)}/"]))
        if live is not None:
            processes |= {vm.process for vm in live.vms}
        await run_all([partial(end_process, process) for process in processes])
        await remove_netns(live.netns if live else runtime.netns(vne))
        runtime.huge_pages().give_back(vne)
        if live is not None:
            with suppress(
                IntegrityError
            ):  # beside a damaged manifest nothing is garbage for certain; `verify` names it
                await Store(Path(live.store)).collect(vne)
        runtime.forget(vne)
