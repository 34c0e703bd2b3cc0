"""Instants of events do not depend on the wall clock being left alone."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from qsnap.host import clock, qmp
from qsnap.host.clock import place_stamp, sleep_until, steady_s
from qsnap.host.qmp import open_loop, open_qmp

HOUR_S = 3600.0
GREETING = {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": ""}, "capabilities": []}}


@pytest.mark.parametrize(
    ("stamp_s", "wall_s", "placed_s"),
    [
        (1000.0, 1000.5, 99.5),  # it was half a second on the way
        (1000.0, 1000.0 - HOUR_S, 100.0),  # the clock was set back meanwhile: it cannot be yet to come
        (1000.0, 1000.0 + HOUR_S, 90.0),  # set forward: not before the event before it
    ],
)
def test_one_stamp(stamp_s: float, wall_s: float, placed_s: float) -> None:
    assert place_stamp(stamp_s, wall_s=wall_s, now_s=100.0, earliest_s=90.0) == placed_s


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 0.5), st.floats(-1e6, 1e6)), min_size=1))
def test_order_and_durations(steps: list[tuple[float, float, float]]) -> None:
    """Each event is placed where it happened, however the clock was set between them."""
    wall_s, now_s, earliest_s = 1e9, 100.0, 0.0
    for gap_s, way_s, jump_s in steps:
        wall_s += jump_s
        happened_s = now_s + gap_s
        now_s = happened_s + way_s
        wall_s += gap_s + way_s
        placed_s = place_stamp(wall_s - way_s, wall_s=wall_s, now_s=now_s, earliest_s=earliest_s)
        assert placed_s == pytest.approx(happened_s, abs=1e-4)
        assert earliest_s <= placed_s <= now_s
        earliest_s = placed_s


def test_it_is_unix_time() -> None:
    assert steady_s() == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("ahead_s", [-1.0, 0.0, 0.001, 0.05])
async def test_an_instant_is_slept_until(ahead_s: float) -> None:
    begun_s = steady_s()
    await sleep_until(begun_s + ahead_s)
    assert steady_s() >= begun_s + ahead_s


async def test_who_sleeps_until_an_instant_lets_others_work() -> None:
    """And can be cancelled: only the very last of it blocks."""
    with trio.move_on_after(0.01) as scope:
        await sleep_until(steady_s() + 30)
    assert scope.cancelled_caught


class JumpingClock:
    """Stands for `time` in a module: the real one, but set forward and back by whoever holds it."""

    ahead_s = 0.0
    monotonic = staticmethod(time.monotonic)

    def time(self) -> float:
        return time.time() + self.ahead_s


async def serve(listener: trio.SocketListener, wall: JumpingClock) -> None:
    """A QMP server that sends STOP and, 20 ms later, RESUME, for each command; an hour is lost or won in between."""
    jump_s = HOUR_S
    async with listener, await listener.accept() as stream:

        async def send(message: dict[str, Any]) -> None:
            await stream.send_all(json.dumps(message).encode() + b"\r\n")

        async def send_event(name: str) -> None:
            seconds, fraction = divmod(wall.time(), 1)
            await send({"event": name, "timestamp": {"seconds": int(seconds), "microseconds": int(fraction * 1e6)}})

        await send(GREETING)
        while chunk := await stream.receive_some(65536):  # one command at a time
            command = json.loads(chunk)
            if command["execute"] == "stop":
                await send_event("STOP")
                await trio.sleep(0.02)
                wall.ahead_s += jump_s
                jump_s *= -2
                await send_event("RESUME")
            await send({"return": {}, "id": command.get("id")})


@pytest.mark.parametrize("jumps", [1, 2, 3])
async def test_a_session_while_the_clock_is_set(jumps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wall = JumpingClock()
    monkeypatch.setattr(qmp, "time", wall)
    monkeypatch.setattr(clock, "time", wall)
    socket = trio.socket.socket(trio.socket.AF_UNIX)
    await socket.bind(str(tmp_path / "qmp.sock"))
    socket.listen()
    async with trio.open_nursery() as nursery, open_loop():
        nursery.start_soon(serve, trio.SocketListener(socket), wall)
        began_s = steady_s()
        async with open_qmp(str(tmp_path / "qmp.sock"), vm="vm1") as session:
            for _ in range(jumps):
                await session.execute("stop")
            instants = [event.instant_s for event in session.events]
        nursery.cancel_scope.cancel()
    assert len(instants) == 2 * jumps
    assert began_s <= instants[0]
    assert instants[-1] <= steady_s()
    for stop_s, resume_s in zip(instants[::2], instants[1::2], strict=True):
        assert 0.0 <= resume_s - stop_s < 5.0
    assert all(before <= after for before, after in pairwise(instants))
