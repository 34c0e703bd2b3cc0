"""RAM and device state that are kept by another host than the VM's: what that one sees, and what it does."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import trio
from attrs import define, field

from qsnap.errors import ProtocolError, QsnapError, StateError
from qsnap.host.capture import allocated_bytes
from qsnap.host.daemon import Daemon, Receiving, open_daemon
from qsnap.host.place import Progress
from qsnap.host.recovery import recovery_command
from qsnap.host.runtime import LiveVNE, Runtime
from qsnap.host.store import Store
from qsnap.host.store.files import explained
from qsnap.host.tasks import one_error
from qsnap.model import Host, RamBlockFile, StateFiles, StoredFile, VMSnapshot
from qsnap.rules.manifest import check_names, snapshot_dir
from qsnap.wire import messages as m


class Keeper(Receiving, Protocol):
    """A daemon on another host, which makes its files durable there."""

    async def wait_files(self) -> StateFiles:
        """The files, once they are durable. Raises what the daemon or the connection failed with, as the others do."""

    async def hold(self, vm: VMSnapshot) -> None:
        """Have it keep this of the VM if the snapshot is committed."""


class OpenKeeper(Protocol):
    """Starts a daemon on a host, and yields it with the descriptor for QEMU, as `open_daemon` does."""

    def __call__(
        self,
        nursery: trio.Nursery,
        host: Host,
        message: m.Keep,
        directory: Path,
        *,
        keeps_reading: bool,
        heir: Sequence[str],
        on_bytes: Callable[[int], None],
    ) -> AbstractAsyncContextManager[tuple[Keeper, int]]: ...


async def seal_state(
    store: Store, vne: str, folder: str, receipt: Mapping[str, Any], count: Callable[[int], None] | None = None
) -> StateFiles:
    """Make the files durable that a receiver has written into this folder, and hash them."""

    async def seal(path: str) -> StoredFile:
        return await store.seal_file(vne, f"{folder}/{os.path.basename(path)}", count)

    blocks, stream = receipt["blocks"], receipt["device_stream"]
    ram = [RamBlockFile(block["idstr"], block["used_length"], await seal(block["file"])) for block in blocks]
    image_bytes = allocated_bytes(map(Path, [*(block["file"] for block in blocks), stream]))
    return StateFiles(tuple(ram), await seal(stream), image_bytes)


@asynccontextmanager
async def open_kept(
    nursery: trio.Nursery,
    directory: Path,
    keep: m.Keep,
    *,
    keeps_reading: bool,
    heir: Sequence[str],
    on_bytes: Callable[[int], None],
    vms: int = 1,
    held: bool = False,
    reserve_bytes: int = 0,
) -> AsyncIterator[tuple[Daemon, int]]:
    """A daemon of this host, as `open_daemon` has it, which writes into a new directory."""
    with explained("make the directory", directory):
        directory.mkdir(mode=0o700)
    async with open_daemon(
        nursery,
        directory,
        vm=keep.vm,
        backed=keep.backed,
        ram_limit_bytes=keep.ram_limit_bytes,
        record_limit_bytes=keep.record_limit_bytes,
        keeps_reading=keeps_reading,
        heir=heir,
        on_bytes=on_bytes,
        vms=vms,
        held=held,
        reserve_bytes=reserve_bytes,
    ) as opened:
        yield opened


@define
class KeptVM:
    """A VM of another host while its stream is taken in here. Made by `Keeping.open`."""

    message: m.Keep
    peer: str
    daemon: Daemon = field(init=False)
    inlet: trio.lowlevel.FdStream = field(init=False)  #: to be given the stream
    scope: trio.CancelScope = field(factory=trio.CancelScope)
    ended: trio.Event = field(factory=trio.Event)
    files: StateFiles | None = None
    vm: VMSnapshot | None = None  #: what is to be kept of it
    failure: QsnapError | None = None


@define
class Keeping:
    """The VMs of other hosts that this one keeps the state of, in a snapshot under way.

    It begins when the snapshot has a directory. `directory` is that of the snapshot.
    """

    live: LiveVNE
    runtime: Runtime
    store: Store
    progress: Progress
    directory: Path | None = None
    begun: trio.Event = field(factory=trio.Event)
    vms: dict[str, KeptVM] = field(factory=dict)

    def begin(self, directory: Path) -> None:
        """Take in streams from now on."""
        self.directory = directory
        self.begun.set()

    async def close(self) -> None:
        """Take in no more, and end what is under way."""
        self.directory = None
        self.begun.set()
        for kept in [*self.vms.values()]:
            kept.scope.cancel()
            await kept.ended.wait()

    @asynccontextmanager
    async def open(self, message: m.Keep, peer: str, on_bytes: Callable[[int], None]) -> AsyncIterator[KeptVM]:
        """A daemon for the VM of a host, once this one is ready for it. An earlier one for the same VM is ended.

        Raises StateError if there is no snapshot to keep it in any more.
        """
        await self.begun.wait()
        kept, name = KeptVM(message, peer), message.vm
        self._check(message, peer)
        before, self.vms[name] = self.vms.get(name), kept
        try:
            if before is not None:
                before.scope.cancel()
                await before.ended.wait()
            with kept.scope, one_error():
                async with self._receiving(kept, on_bytes):
                    yield kept
            if kept.scope.cancelled_caught:
                raise _undone(name)
        except QsnapError as error:
            kept.failure = error
            raise
        finally:
            kept.ended.set()

    def _check(self, message: m.Keep, peer: str) -> None:
        check_names(message.vm)
        before = self.vms.get(message.vm)
        if message.vm in [vm.vm.name for vm in self.live.vms] or (before is not None and before.peer != peer):
            raise StateError(f"VM {message.vm} is of another host", where=f"VNE {message.vne}")

    @asynccontextmanager
    async def _receiving(self, kept: KeptVM, on_bytes: Callable[[int], None]) -> AsyncIterator[None]:
        message = kept.message
        if self.directory is None:
            raise _undone(message.vm)
        directory = self.directory / message.vm
        shutil.rmtree(directory, ignore_errors=True)
        heir = recovery_command(self.runtime, message.vne)
        async with trio.open_nursery() as nursery:
            opened = open_kept(nursery, directory, message, keeps_reading=False, heir=heir, on_bytes=on_bytes)
            async with opened as (kept.daemon, stream_fd), trio.lowlevel.FdStream(stream_fd) as kept.inlet:
                yield

    async def seal(self, kept: KeptVM, receipt: Mapping[str, Any]) -> StateFiles:
        """Make the files of a VM durable."""
        assert self.directory is not None
        name, total, sealed = kept.message.vm, receipt["ram_bytes"], 0

        def count(more: int) -> None:
            nonlocal sealed
            sealed += more
            self.progress("seal", name, sealed, max(sealed, total))

        folder = f"{snapshot_dir(self.directory.name)}/{name}"
        kept.files = await seal_state(self.store, kept.message.vne, folder, receipt, count)
        return kept.files

    def hold(self, kept: KeptVM, vm: VMSnapshot) -> None:
        """Note what is to be kept of a VM. Raises ProtocolError if that is not what has come of it."""
        files, here = kept.files, self.live.vne.here
        assert files is not None
        if (vm.vm.name, vm.kept_on, vm.ram, vm.device_stream) != (
            kept.message.vm,
            here,
            files.ram,
            files.device_stream,
        ) or vm.vm.host == here:
            raise ProtocolError(f"what is to be kept of VM {kept.message.vm} is not what has come of it")
        kept.vm = vm

    async def wait_all(self) -> tuple[VMSnapshot, ...]:
        """What is to be kept of all VMs; no other is taken in. Raises what one of them failed with."""
        found = []
        for kept in [self.vms[name] for name in sorted(self.vms)]:
            await kept.ended.wait()
            if kept.vm is None:
                assert kept.failure is not None
                raise kept.failure
            found.append(kept.vm)
        self.directory = None  # nothing is added to what was voted for
        return tuple(found)


def _undone(vm: str) -> StateError:
    return StateError("the snapshot takes nothing in any more", where=f"VM {vm}", advice="Was it undone? Start anew.")
