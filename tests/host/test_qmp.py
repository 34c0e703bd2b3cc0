"""Events of a QMP session: those of passes are not kept, and an error tells which side has ended it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from qemu.qmp import Message

from qsnap.host import qmp
from qsnap.host.qmp import QemuGoneError, open_loop, open_qmp
from qsnap.host.tasks import one_error
from tests.host.test_clock import GREETING

STAMP = {"seconds": 1, "microseconds": 0}
PASSES = [{"event": "MIGRATION_PASS", "data": {"pass": number}, "timestamp": STAMP} for number in range(100)]
STOP = {"event": "STOP", "timestamp": STAMP}


async def serve(listener: trio.SocketListener, events: list[dict[str, Any]]) -> None:
    """A QMP server that sends the events before its answer to `stop`, and ends at `quit`."""
    async with listener, await listener.accept() as stream:

        async def send(*messages: dict[str, Any]) -> None:
            await stream.send_all(b"".join(json.dumps(each).encode() + b"\r\n" for each in messages))

        await send(GREETING)
        while chunk := await stream.receive_some(65536):  # one command at a time
            command = json.loads(chunk)
            if command["execute"] == "quit":
                return
            behind = events if command["execute"] == "stop" else ()
            await send(*behind, {"return": {}, "id": command.get("id")})


async def events_of(tmp_path: Path, events: list[dict[str, Any]], *, then: str) -> list[str]:
    """The names of the events that are kept of these, once the command `then` was run behind them."""
    socket = trio.socket.socket(trio.socket.AF_UNIX)
    await socket.bind(str(tmp_path / "qmp.sock"))
    socket.listen()
    with one_error():
        async with trio.open_nursery() as nursery, open_loop():
            nursery.start_soon(serve, trio.SocketListener(socket), events)
            async with open_qmp(str(tmp_path / "qmp.sock"), vm="vm1") as session:
                await session.execute("stop")
                await session.execute(then)
                names = [event.name for event in session.events]
            nursery.cancel_scope.cancel()
    return names


async def test_passes_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many they are: a QEMU that is not held yet makes thousands."""
    monkeypatch.setattr(qmp, "EVENTS_LIMIT", 2)
    assert await events_of(tmp_path, [*PASSES, STOP, *PASSES], then="cont") == ["STOP"]


async def test_passes_are_thrown_away_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen QEMUs that were not held in time kept qsnap from its other messages for half a minute, all VMs paused."""
    read: list[bytes] = []

    class Reading(Message):
        def __init__(self, value: bytes, *, eager: bool) -> None:
            read.append(value)
            super().__init__(value, eager=eager)

    monkeypatch.setattr(qmp, "Message", Reading)
    assert await events_of(tmp_path, [*PASSES, STOP, *PASSES], then="cont") == ["STOP"]
    assert sum(b"STOP" in line for line in read) == 1
    assert not any(b"MIGRATION_PASS" in line for line in read)


@pytest.mark.parametrize(
    ("events", "then", "reason"),
    [
        ([STOP] * 3, "cont", "an event that makes no sense, or too many"),
        ([{"event": 7}], "cont", "an event that makes no sense, or too many"),
        ([], "quit", "QEMU ended, or closed its QMP socket"),
    ],
)
async def test_who_ended_it(
    events: list[dict[str, Any]], then: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "EVENTS_LIMIT", 2)
    with pytest.raises(QemuGoneError, match=reason):
        await events_of(tmp_path, events, then=then)
