"""What a QEMU may say over QMP: whatever it is, the conversation ends, and if it fails then with a QsnapError.

An input is a script for a QEMU. Its first byte chooses the conversation. Of the lines after the first, one answers each
command (`"$"` in it becomes the command's id); those that begin with `!` are events, sent at once. After the
last line, or if no command comes, QEMU closes the connection.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import cast

import trio

from qsnap import Place
from qsnap.errors import QsnapError
from qsnap.host.capture import Background, Bounds, Capture, Precopy
from qsnap.host.condition import gather_facts
from qsnap.host.daemon import Daemon
from qsnap.host.disks import DiskCut, DiskFile, DiskPlan, DiskStep, LiveDisk, tidy_disks
from qsnap.host.lifecycle import status
from qsnap.host.migration import abandon
from qsnap.host.qemu import Process
from qsnap.host.qmp import Qmp, open_loop, open_qmp
from qsnap.host.runtime import LiveVM, LiveVNE
from qsnap.host.starting import Start, describe
from qsnap.host.tasks import one_error
from qsnap.model import VM, VNE, Accelerator, Colour, DiskEngine

DEADLINE_S = 20.0
ANSWER_S = 5.0
PATIENCE_S = 0.1
ALICE = VM("alice", 4 << 20, kernel="/boot/vmlinuz")
OURSELVES = Process(os.getpid(), int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]))
DISK = LiveDisk("disk0-device", "disk0", 1 << 20, (DiskFile("/images/disk0.qcow2", "qcow2"),), ())
LIVE = LiveVM(
    ALICE,
    OURSELVES,
    ("-machine", "pc"),
    "pc-i440fx-7.2",
    Accelerator.TCG,
    (7, 2, 22),
    False,
    (DISK,),
)


def check(data: bytes) -> None:
    script, *lines = data.split(b"\n")
    conversation = CONVERSATIONS[script[0] % len(CONVERSATIONS)] if script else ask_status
    with tempfile.TemporaryDirectory() as root:
        trio.run(converse, conversation, lines, Place(root, root))


async def converse(conversation: Conversation, lines: list[bytes], place: Place) -> None:
    runtime = place.runtime()
    runtime.make_vm_directory("lab", "alice")
    path = runtime.monitor_path("lab", "alice")
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(path)
        listener.listen()
        with trio.fail_after(DEADLINE_S), one_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(play, listener, lines)
                with suppress(QsnapError):
                    await conversation(place, path)
                nursery.cancel_scope.cancel()


async def play(listener: trio.socket.SocketType, lines: list[bytes]) -> None:
    """Be the QEMU that the script describes. The greeting is its first answer."""
    connection, _ = await listener.accept()
    listener.close()
    async with trio.SocketStream(connection) as stream, aclosing(command_ids(stream)) as ids:
        try:
            for line in lines:
                if not line.startswith(b"!"):
                    with trio.fail_after(PATIENCE_S):
                        line = line.replace(b'"$"', await anext(ids))
                await stream.send_all(line.removeprefix(b"!") + b"\n")
        except (trio.BrokenResourceError, trio.TooSlowError, StopAsyncIteration):
            pass  # the other side has had enough, or waits for something that is not in the script


async def command_ids(stream: trio.SocketStream) -> AsyncGenerator[bytes, None]:
    yield b"0"
    received = ""
    while more := await stream.receive_some():
        received = (received + more.decode()).lstrip()  # a blank goes along with a descriptor
        while received:
            try:
                command, end = json.JSONDecoder().raw_decode(received)
            except ValueError:
                break  # not all of it is here
            received = received[end:]
            yield json.dumps(command.get("id")).encode()


async def with_qmp(converse: Callable[[Qmp], Awaitable[object]], place: Place, path: str) -> None:
    with one_error():
        async with open_loop(), open_qmp(path, vm="alice", timeout_s=ANSWER_S, answer_s=ANSWER_S) as qmp:
            await converse(qmp)


async def ask_status(place: Place, path: str) -> None:
    runtime = place.runtime()
    runtime.save(LiveVNE(VNE("lab", (ALICE,)), "/store", "qsnap-lab", Colour.RED, (LIVE,)))
    await status("lab", place=place)


async def learn(qmp: Qmp) -> None:
    await describe(qmp, Start(ALICE, 0, ("-machine", "pc"), Accelerator.TCG, (), ()), OURSELVES, "/images")
    await gather_facts(qmp, LIVE, running=True)


async def change_disks(qmp: Qmp) -> None:
    await tidy_disks(qmp, [DISK.device], "/images")
    new = DiskFile("/images/new.qcow2", "qcow2")
    steps = (
        DiskStep(DiskEngine.OVERLAY, "", DISK, new, "layer-new"),
        DiskStep(DiskEngine.COPY, "", DISK, new, "copy-new"),
    )
    disks = DiskCut(qmp, DiskPlan(steps, (7, 2, 22), "qemu-img"))
    try:
        await qmp.execute_all(*disks.commands())
        await disks.finish()
    finally:
        await disks.undo()


async def capture(qmp: Qmp, kind: Callable[..., Capture], **options: object) -> None:
    daemon = Daemon("alice", cast(trio.Process, None), cast(trio.SocketStream, None), lambda done: None)
    for event in (daemon.ready, daemon.tracking, daemon.ended):
        event.set()
    daemon.result = {"data_pages": 1}
    taken = kind(qmp, daemon, DiskCut(qmp, DiskPlan((), (7, 2, 22), "qemu-img")), True, lambda: None, **options)
    try:
        await taken.prepare(os.open(os.devnull, os.O_WRONLY))
        await taken.stop_and_resume()
        await taken.complete()
    except QsnapError:
        await abandon(qmp, running=True)


Conversation = Callable[[Place, str], Awaitable[None]]
CONVERSATIONS: tuple[Conversation, ...] = (
    ask_status,
    partial(with_qmp, learn),
    partial(with_qmp, change_disks),
    partial(with_qmp, partial(capture, kind=Background, keeps_paused=False)),
    partial(with_qmp, partial(capture, kind=Background, keeps_paused=True)),
    partial(with_qmp, partial(capture, kind=Precopy, bounds=Bounds(passes=3))),
    partial(with_qmp, partial(capture, kind=Precopy, bounds=Bounds(passes=3), force=True)),
)
