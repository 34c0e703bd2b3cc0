"""The console of a VM on another host: bytes both ways through an agent, and how either side ends it."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from attrs import define, evolve

import qsnap
from qsnap.errors import BusyError, ConnectionLostError, ProtocolError, StateError
from qsnap.fleet import channel
from qsnap.fleet.agent import run_agent
from qsnap.fleet.spread import remember
from qsnap.host.place import Place
from qsnap.host.qemu import Process
from qsnap.host.runtime import LiveVM, LiveVNE
from qsnap.model import Colour, Host
from tests.samples import snapshot

GONE = Process(pid=1, start_ticks=-1)
MUCH = os.urandom(1 << 20)


@define
class Far:
    """Alpha has alice and an agent, and `listener` takes QEMU's place; gamma is this process."""

    gamma: Place
    listener: trio.SocketListener
    agent: trio.CancelScope


async def run_in(agent: trio.CancelScope, place: Place, *, task_status: trio.TaskStatus[int]) -> None:
    with agent:
        await run_agent(("127.0.0.1", 0), place, task_status=task_status)


@pytest.fixture
async def far(ca: Path, tmp_path: Path) -> AsyncIterator[Far]:
    alpha, gamma = (Place(tmp_path / name, tmp_path / name, ca / f"{name}.pem") for name in ("alpha", "gamma"))
    runtime, vm = alpha.runtime(), snapshot().vms[0]
    agent = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        port = await nursery.start(run_in, agent, alpha)
        table = (Host("alpha", "127.0.0.1", port, "127.0.0.1"), Host("gamma", "127.0.0.1", 9, "127.0.0.1"))
        whole = evolve(snapshot().vne, vms=(evolve(vm.vm, host="alpha"),), hosts=table)
        live = LiveVM(whole.vms[0], GONE, vm.hardware, vm.machine_type, vm.accelerator, vm.qemu_version, False, ())
        runtime.save(LiveVNE(whole.part("alpha"), str(alpha.store), "qsnap-lab", Colour.RED, (live,)))
        runtime.make_vm_directory("lab", "alice")
        remember(whole, gamma)
        with trio.socket.socket(socket.AF_UNIX) as listening:
            await listening.bind(runtime.console_path("lab", "alice"))
            listening.listen()
            yield Far(gamma, trio.SocketListener(listening), agent)
            agent.cancel()


async def receive_all(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    data = b""
    with trio.fail_after(30):
        while len(data) < count:
            data += await stream.receive_some()
    return data


async def test_much_goes_both_ways_and_the_user_leaves(far: Far) -> None:
    async with qsnap.open_console("lab", "alice", place=far.gamma) as console:
        qemu = await far.listener.accept()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(console.send_all, MUCH)
            nursery.start_soon(qemu.send_all, MUCH[::-1])
            assert await receive_all(qemu, len(MUCH)) == MUCH
            assert await receive_all(console, len(MUCH)) == MUCH[::-1]
    with trio.fail_after(30):
        assert await qemu.receive_some() == b""
    await qemu.aclose()
    async with qsnap.open_console("lab", "alice", place=far.gamma):  # QEMU is free for the next one
        pass


async def test_the_vm_ends(far: Far) -> None:
    async with qsnap.open_console("lab", "alice", place=far.gamma) as console:
        await (await far.listener.accept()).aclose()
        with trio.fail_after(30):
            assert await console.receive_some() == b""


async def test_a_guest_that_takes_nothing_can_still_be_left(far: Far) -> None:
    with trio.fail_after(30):
        async with qsnap.open_console("lab", "alice", place=far.gamma) as console:
            qemu = await far.listener.accept()
            with trio.move_on_after(0.5) as typing:
                await console.send_all(MUCH * 16)
            assert typing.cancelled_caught
        ended = select.poll()
        ended.register(qemu.socket.fileno(), select.POLLHUP)
        async with qemu:
            while not ended.poll(0):  # the agent lets go, although QEMU has not taken what it has
                await trio.sleep(0.1)


async def test_the_agent_goes_away(far: Far) -> None:
    async def look_on() -> None:
        async with qsnap.open_console("lab", "alice", place=far.gamma):
            far.agent.cancel()
            await trio.sleep(30)

    with pytest.raises(ConnectionLostError, match="host alpha"):
        await look_on()


async def test_one_at_a_time(far: Far) -> None:
    async with qsnap.open_console("lab", "alice", place=far.gamma):
        qemu = await far.listener.accept()
        with qemu.socket, pytest.raises(BusyError, match="somebody else") as caught:
            async with qsnap.open_console("lab", "alice", place=far.gamma):
                pass
        assert "host alpha" in caught.value.where


async def test_what_there_is_not(far: Far) -> None:
    with pytest.raises(StateError, match="bob"):
        async with qsnap.open_console("lab", "bob", place=far.gamma):
            pass
    await far.listener.aclose()
    with pytest.raises(StateError, match="does not answer"):
        async with qsnap.open_console("lab", "alice", place=far.gamma):
            pass


async def test_an_agent_that_does_not_know_of_consoles(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "CAPABILITIES", ())
    with pytest.raises(ProtocolError, match="does not pass on") as caught:
        async with qsnap.open_console("lab", "alice", place=far.gamma):
            pass
    assert caught.value.where == "host alpha"
