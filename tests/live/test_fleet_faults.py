"""Faults of the network between hosts, of hosts, and of whoever talks to an agent: one outcome, and all VMs run on."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio

import qsnap
from qsnap.fleet.channel import Connection, connect
from qsnap.fleet.identity import load_identity
from qsnap.fleet.pki import init_ca, issue, revoke
from qsnap.fleet.remote import Remote, ask
from qsnap.host.migration import PAUSED
from qsnap.host.tasks import one_error
from qsnap.model import Outcome, SnapshotOrder
from qsnap.rules.commit import Phase
from qsnap.wire import messages as m
from testbed.fleet import INITIATOR, Fleet, open_fleet
from testbed.hosts import NamespaceHost, hosts_in_namespaces
from tests.live.fleet_state import check_logs, check_snapshots, check_up, take_down, wait_settled
from tests.live.test_host_faults import remount, tmpfs
from tests.live.tiny import make_boot_disk, make_tiny_vne

TWO = ("alpha", "beta")
Fault = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def running_lab(
    hosts: Sequence[str] = TWO, program: Sequence[str] = ("-m", "qsnap.cli")
) -> AsyncIterator[tuple[Fleet, dict[str, NamespaceHost]]]:
    """A VNE `lab` with a VM on each host, and all of it as it should be at the end, whatever was done to it."""
    with tempfile.TemporaryDirectory(prefix="qsnap-", dir="/dev/shm") as name:
        root = Path(name)
        async with (
            hosts_in_namespaces([*hosts, INITIATOR]) as namespaces,
            open_fleet(root, namespaces, program=program) as fleet,
        ):
            vne = fleet.spread(make_tiny_vne("lab", make_boot_disk(root / "disk.img"), vms=len(hosts)))
            try:
                await fleet.call(qsnap.up, vne)
                yield fleet, namespaces
                await check_as_ever(fleet)
            finally:
                with trio.CancelScope(shield=True):
                    for host in namespaces.values():
                        await host.plug()
                    await take_down(fleet, "lab")


async def check_as_ever(fleet: Fleet) -> set[str]:
    """All VMs run, all hosts have the same snapshots, and a further one can be taken. Returns the names."""
    await wait_settled(fleet)
    assert await check_up(fleet, "lab")
    names = await check_snapshots(fleet, "lab")
    await fleet.call(qsnap.snapshot, "lab", "further")
    await fleet.call(qsnap.verify, "lab", "further")
    await fleet.call(qsnap.remove, "lab", "further")
    check_logs(fleet)
    return names


def strike(
    patch: pytest.MonkeyPatch, host: str, step: Phase | str, *, before: Fault | None = None, during: Fault | None = None
) -> None:
    """Let a fault strike once, when the coordinator asks this host for a phase, or to commit."""
    name = "perform" if isinstance(step, Phase) else step
    real: Callable[..., Awaitable[Any]] = getattr(Remote, name)
    faults = [(before, during)]

    async def struck(self: Remote, *arguments: Any) -> Any:
        if self.host.name != host or (isinstance(step, Phase) and step not in arguments) or not faults:
            return await real(self, *arguments)
        first, meanwhile = faults.pop()
        if first is not None:
            await first()
        with one_error():
            async with trio.open_nursery() as nursery:
                if meanwhile is not None:
                    nursery.start_soon(meanwhile)
                return await real(self, *arguments)

    patch.setattr(Remote, name, struck)


async def fails(fleet: Fleet, match: str, kind: type[qsnap.QsnapError], **options: Any) -> None:
    """A snapshot `new` fails with this error, and is on no host."""
    with pytest.raises(kind, match=match) as caught:
        await fleet.call(qsnap.snapshot, "lab", "new", **options)
    print(caught.value, getattr(caught.value, "__notes__", ""))


@pytest.mark.parametrize("cut", list(qsnap.Cut))
@pytest.mark.parametrize("when", ["before", "during", "after"])
async def test_a_host_is_unplugged_about_the_cut(cut: qsnap.Cut, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_lab() as (fleet, hosts):
        phase = Phase.CUT if cut is qsnap.Cut.COLOUR else Phase.STOP
        if when == "after":
            strike(monkeypatch, "beta", Phase.COLLECT, before=hosts["beta"].unplug)
        else:
            strike(monkeypatch, "beta", phase, **{when: hosts["beta"].unplug})
        await fails(fleet, "host beta: nothing was heard of it for", qsnap.ConnectionLostError, cut=cut)
        with trio.fail_after(20):
            await wait_settled(fleet)  # also the one that is not reached: it knows by itself
        assert await check_up(fleet, "lab")
        await hosts["beta"].plug()
        assert await check_as_ever(fleet) == set()


@pytest.mark.parametrize("host", TWO)
async def test_a_host_is_unplugged_before_the_commit(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host that decides never hears of it, as it finds when it is back; the other one asks until it knows."""
    monkeypatch.setattr("qsnap.fleet.remote.INQUIRY_S", 2.0)
    async with running_lab() as (fleet, hosts):
        strike(monkeypatch, host, "commit", before=hosts[host].unplug)
        if host == "alpha":
            await fails(fleet, "host alpha: the connection was lost while it committed", qsnap.InDoubtError)
        else:
            await fleet.call(qsnap.snapshot, "lab", "new")
        await hosts[host].plug()
        assert await check_as_ever(fleet) == (set() if host == "alpha" else {"new"})


async def test_a_command_is_interrupted_between_two_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupt() -> None:
        raise KeyboardInterrupt

    async with running_lab() as (fleet, _):
        strike(monkeypatch, "beta", "commit", before=interrupt)
        with pytest.raises(KeyboardInterrupt):
            await fleet.call(qsnap.snapshot, "lab", "new")
        assert await check_as_ever(fleet) == {"new"}


async def test_a_full_disk_on_one_of_three_hosts() -> None:
    async with running_lab(("alpha", "beta", "gamma")) as (fleet, _):
        home = fleet.place("beta").store / "lab/snapshots"
        with tmpfs(home):
            remount(home, "size=64k")
            await fails(fleet, "host beta.*No space left", qsnap.HostError)
            await wait_settled(fleet)
            assert await check_up(fleet, "lab")
            assert await check_snapshots(fleet, "lab") == set()
        assert await check_as_ever(fleet) == set()


CHANGED = "import sys; {change}; from qsnap.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("change", "match", "kind"),
    [
        ("sys.argv += ['--allow', 'other-*']", "initiator may not use VNE lab here", qsnap.StateError),
    ],
)
async def test_an_agent_that_is_another(change: str, match: str, kind: type[qsnap.QsnapError]) -> None:
    async with running_lab() as (fleet, _):
        usual = fleet.program
        fleet.program = ("-c", CHANGED.format(change=change))
        await fleet.kill("beta")
        await fleet.start("beta")
        await fails(fleet, match, kind)
        fleet.program = usual
        await fleet.kill("beta")
        await fleet.start("beta")
        assert await check_as_ever(fleet) == set()


async def test_two_coordinators_at_once() -> None:
    async with running_lab() as (fleet, _):
        won = 0
        for attempt in range(5):
            names: list[str] = []

            async def save(name: str, names: list[str] = names) -> None:
                try:
                    await fleet.call(qsnap.snapshot, "lab", name)
                    names.append(name)
                except qsnap.BusyError as error:
                    print(error)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(save, f"one-{attempt}")
                nursery.start_soon(save, f"two-{attempt}")
            await wait_settled(fleet)
            assert await check_snapshots(fleet, "lab") == set(names)
            won += len(names)
            for name in names:
                await fleet.call(qsnap.remove, "lab", name)
        print(won, "of", 10)
        assert await check_as_ever(fleet) == set()


# Whoever talks to an agent


async def talk(fleet: Fleet, host: str, say: Callable[[Connection], Awaitable[Any]]) -> Any:
    """Say something to an agent, over a connection like a coordinator's."""
    (at,) = (each for each in fleet.table if each.name == host)

    async def inside(*, place: qsnap.Place) -> Any:
        async with connect(at, load_identity(place.identity)) as connection:
            return await say(connection)

    return await fleet.call(inside)


def snapshot_order(cut: qsnap.Cut = qsnap.Cut.COLOUR) -> m.Begin:
    return m.Begin.of(SnapshotOrder("lab", "new", cut=cut, id=uuid4().hex))


async def perform(connection: Connection, *phases: Phase) -> None:
    for phase in phases:
        await ask(connection, m.Perform(phase.value), m.Performed)


async def states(fleet: Fleet, host: str) -> set[str]:
    return {vm.state for vm in (await qsnap.status("lab", place=fleet.place(host))).vms}


async def test_a_coordinator_is_silent_at_a_barrier() -> None:
    async with running_lab() as (fleet, _):

        async def say(connection: Connection) -> None:
            await ask(connection, snapshot_order(qsnap.Cut.BARRIER), m.Begun)
            await perform(connection, Phase.PREPARE, Phase.STOP)
            assert await states(fleet, "alpha") <= set(PAUSED)
            with trio.fail_after(5):
                while await states(fleet, "alpha") != {"running"}:
                    await trio.sleep(0.1)

        await talk(fleet, "alpha", say)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\1\0\x40\0\1", "a frame of 4194305 bytes"),
        (b"\1\0\0\0\4null", "not a message: no JSON object"),
        (os.urandom(8) + b"\xff" * 5000, "a frame of"),
        (b"\1\0\0\1\0{", "the connection|closed"),
    ],
    ids=["oversized", "no-message", "garbage", "truncated"],
)
async def test_a_peer_sends_nonsense_in_the_midst_of_a_snapshot(data: bytes, reason: str) -> None:
    async with running_lab() as (fleet, _):

        async def say(connection: Connection) -> None:
            await ask(connection, snapshot_order(), m.Begun)
            await perform(connection, Phase.PREPARE, Phase.CUT)
            await connection._stream.send_all(data)
            if reason.startswith("the connection"):
                await trio.aclose_forcefully(connection._stream)
            with pytest.raises(qsnap.QsnapError):
                await connection.receive()

        await talk(fleet, "alpha", say)
        await wait_settled(fleet)
        print(fleet.log("alpha"))
        assert await check_as_ever(fleet) == set()


async def test_a_bad_network() -> None:
    """A snapshot works, or fails with an error that says what it was. Thirty percent of all frames are lost."""
    async with running_lab() as (fleet, hosts):
        taken, failures = set(), list[str]()
        async with hosts["beta"].bad_link(delay_s=0.2, loss=0.3):
            for attempt in range(4):
                try:
                    await fleet.call(qsnap.snapshot, "lab", f"bad-{attempt}")
                    taken.add(f"bad-{attempt}")
                except (qsnap.ConnectionLostError, qsnap.BusyError, qsnap.InDoubtError) as error:
                    failures.append(str(error))
        assert all("beta" in failure for failure in failures)
        assert await check_as_ever(fleet) >= taken


@pytest.mark.parametrize(("pause_s", "works"), [(2.0, True), (8.0, False)])
async def test_a_host_stalls(pause_s: float, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_lab() as (fleet, _):

        async def stall() -> None:
            os.kill(fleet.agents["beta"].pid, signal.SIGSTOP)
            try:
                await trio.sleep(pause_s)
            finally:
                os.kill(fleet.agents["beta"].pid, signal.SIGCONT)

        strike(monkeypatch, "beta", Phase.CUT, during=stall)
        if works:
            await fleet.call(qsnap.snapshot, "lab", "new")
        else:
            await fails(fleet, "host beta: nothing was heard of it for", qsnap.ConnectionLostError)
        assert await check_as_ever(fleet) == ({"new"} if works else set())


async def test_identities_that_are_not_accepted() -> None:
    async with running_lab() as (fleet, _):
        ca, mine = fleet.root / "ca", fleet.place().identity
        mine.rename(ca / "mine")
        init_ca(fleet.root / "other")
        issue(fleet.root / "other", INITIATOR, file=mine)
        await fails(fleet, "not of our CA|unknown CA|is not of", qsnap.IdentityError)
        mine.unlink()
        issue(ca, INITIATOR, ("other-*",), file=mine)
        await fails(fleet, "initiator may not use VNE lab here", qsnap.StateError)
        mine.unlink()
        (ca / "mine").rename(mine)
        assert await check_as_ever(fleet) == set()
        revoke(ca, "beta", [mine])
        await fails(fleet, "host beta: .*revoked", qsnap.IdentityError)
        fleet.place("beta").identity.unlink()
        issue(ca, "beta")
        assert await check_as_ever(fleet) == set()


async def test_a_commit_that_comes_again() -> None:
    """On the same connection and on a new one; and one that comes too early."""
    again = m.Commit(Outcome(1.0))

    async def commit_again(connection: Connection) -> None:
        with pytest.raises(qsnap.StateError, match="no operation is under way"):
            await ask(connection, again, m.Committed)

    async def commit_early(connection: Connection) -> None:
        await ask(connection, snapshot_order(), m.Begun)
        await perform(connection, Phase.PREPARE)
        with pytest.raises(qsnap.ProtocolError, match="COMMIT cannot happen while"):
            await ask(connection, again, m.Committed)

    async def commit(connection: Connection) -> qsnap.Snapshot:
        await ask(connection, snapshot_order(), m.Begun)
        await perform(connection, Phase.PREPARE, Phase.CUT, Phase.COLLECT)
        committed = await ask(connection, again, m.Committed)
        with suppress(qsnap.StateError):  # by then the operation may be forgotten here
            assert await ask(connection, again, m.Committed) == committed
        assert committed.snapshot is not None
        return committed.snapshot

    async with running_lab() as (fleet, _):
        await talk(fleet, "alpha", commit_early)
        assert await check_as_ever(fleet) == set()
        saved = await talk(fleet, "alpha", commit)
        await talk(fleet, "alpha", commit_again)
        assert await qsnap.show("lab", "new", place=fleet.place("alpha")) == saved
        await fleet.call(qsnap.remove, "lab", "new")


async def test_a_client_without_tls() -> None:
    async with running_lab() as (fleet, _):
        table = {host.name: host for host in fleet.table}

        async def shout(*, place: qsnap.Place) -> None:
            async with await trio.open_tcp_stream(table["alpha"].address, table["alpha"].port) as stream:
                await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
                with trio.fail_after(10):
                    while await stream.receive_some():
                        pass

        await fleet.call(shout)
        with trio.fail_after(10):  # the agent waits for the client to close, and says then why it has closed
            while "it does not speak TLS 1.3" not in fleet.log("alpha"):
                await trio.sleep(0.05)
