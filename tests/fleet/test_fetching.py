"""Files of a snapshot between two agents: what comes, what comes again, and what is refused."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from attrs import define, evolve

from qsnap.errors import ConnectionLostError, IntegrityError, QsnapError, StateError
from qsnap.fleet.agent import run_agent
from qsnap.fleet.channel import connect
from qsnap.fleet.fetching import fetch
from qsnap.fleet.identity import load_identity
from qsnap.host.place import Place, no_progress
from qsnap.model import VM, VNE, Cut, DiskEngine, DiskImage, Host, Network, Snapshot, VMSnapshot
from qsnap.rules.manifest import files_in
from qsnap.wire import messages as m
from tests.samples import vm_snapshot

RAM_BYTES = 24 << 20
DATA = {(3 << 20) + 5: 6 << 20, 14 << 20: 4096, 20 << 20: (1 << 20) + 1}  #: offset -> bytes of what is no hole
SENT_BYTES = sum(DATA.values())


@define
class Line:
    """The way to a host: it counts what that sends, ends after `limit` bytes, and flips the byte at `flip`."""

    port: int
    sent: int = 0
    limit: int = 1 << 60
    flip: int = -1

    async def carry(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, client, server, nursery.cancel_scope, False)
            nursery.start_soon(self._copy, server, client, nursery.cancel_scope, True)

    async def _copy(
        self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope, counts: bool
    ) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                await sink.send_all(self._count(data) if counts else data)
                if self.sent > self.limit:
                    break
        scope.cancel()

    def _count(self, data: bytes | bytearray) -> bytes:
        start, self.sent = self.sent, self.sent + len(data)
        if start <= self.flip < self.sent:
            data = bytearray(data)
            data[self.flip - start] ^= 1
        return bytes(data)


@define
class Pair:
    """Two hosts: alpha has the snapshot, and an agent that is reached by `line`; gamma fetches in this process."""

    alpha: Place
    gamma: Place
    line: Line
    table: tuple[Host, ...]

    async def fetch(self, *vms: str, name: str = "s1") -> Snapshot:
        saved = await self.alpha.snapshots().load("lab", name)
        moved = tuple(evolve(vm, host="gamma") for vm in saved.vne.vms if vm.name in vms)
        part = evolve(saved.vne, vms=moved, hosts=self.table, here="gamma")
        return await fetch(self.gamma, m.Fetch(part, name, dict.fromkeys(vms, ("alpha",))), no_progress)

    def files(self, place: Place) -> dict[str, Path]:
        home = place.store / "lab"
        return {str(path.relative_to(home)): path for path in home.rglob("*") if path.is_file()}


@pytest.fixture
async def pair(ca: Path, tmp_path: Path) -> AsyncIterator[Pair]:
    places = [
        Place(tmp_path / name / "run", tmp_path / name / "store", ca / f"{name}.pem") for name in ("alpha", "gamma")
    ]
    for place in places:
        place.store.mkdir(parents=True)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(run_agent, ("127.0.0.1", 0), places[0])
        line = Line(port)
        listeners = await nursery.start(partial(trio.serve_tcp, line.carry, 0, host="127.0.0.1"))
        ports = (listeners[0].socket.getsockname()[1], 9)
        table = tuple(
            Host(name, "127.0.0.1", port, "127.0.0.1") for name, port in zip(("alpha", "gamma"), ports, strict=True)
        )
        await save(places[0], "s1", table, {"a": b"a" * 10, "b": b""})
        yield Pair(places[0], places[1], line, table)
        nursery.cancel_scope.cancel()


async def save(place: Place, name: str, table: tuple[Host, ...], layers: Mapping[str, bytes]) -> Snapshot:
    """A snapshot of VMs, each with sparse RAM and a disk of one layer of this content."""
    store = place.snapshots()
    directory = await store.begin("lab", name)
    vms: list[VMSnapshot] = []
    for vm, layer in layers.items():
        (directory / vm).mkdir()
        with (directory / vm / "pc.ram.ram").open("wb") as ram:
            for offset, length in DATA.items():
                ram.seek(offset)
                ram.write(os.urandom(length))
            ram.truncate(RAM_BYTES)
        (directory / vm / "device.stream").write_bytes(f"{name} {vm}".encode())
        path = f"disks/{vm}-{name}.qcow2"
        (place.store / "lab" / path).write_bytes(layer)
        state, stream, disk = [
            await store.seal_file("lab", file)
            for file in (f"snapshots/{name}/{vm}/pc.ram.ram", f"snapshots/{name}/{vm}/device.stream", path)
        ]
        saved = vm_snapshot(VM(vm, RAM_BYTES, kernel="/boot/vmlinuz", host="alpha"), state, stream)
        vms.append(evolve(saved, disks=(DiskImage(DiskEngine.OVERLAY, "asked for", (disk,), "raw", None),)))
    vne = VNE("lab", tuple(vm.vm for vm in vms), (Network("lan"),), table, "alpha")
    part = Snapshot(name, vne, Cut.COLOUR, 1700000000.5, tuple(vms), operation=f"of {name}")
    await store.commit(part)
    return part


async def test_vms_come_as_they_were_stored(pair: Pair) -> None:
    part = await pair.fetch("a")
    assert part == await pair.gamma.snapshots().verify("lab", "s1")
    assert ([vm.name for vm in part.vne.vms], part.vne.here, part.vms[0].vm.host) == (["a"], "gamma", "gamma")
    both = await pair.fetch("b")
    assert both == await pair.gamma.snapshots().verify("lab", "s1")
    saved = await pair.alpha.snapshots().load("lab", "s1")
    assert set(files_in(both)) == set(files_in(saved))
    assert pair.files(pair.gamma).keys() == pair.files(pair.alpha).keys(), "something was left"
    for path, there in pair.files(pair.alpha).items():
        assert path.endswith(".json") or pair.files(pair.gamma)[path].stat().st_blocks <= there.stat().st_blocks
    assert 2 * SENT_BYTES < pair.line.sent < 2 * SENT_BYTES + (1 << 20), "holes were sent"


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.99])
async def test_what_came_before_the_connection_was_lost_does_not_come_again(pair: Pair, share: float) -> None:
    pair.line.limit = int(share * SENT_BYTES)
    with pytest.raises(ConnectionLostError):
        await pair.fetch("a")
    assert await pair.gamma.snapshots().names("lab") == ()
    pair.line.sent, pair.line.limit = 0, 1 << 60
    part = await pair.fetch("a")
    assert pair.line.sent < (1 - share) * SENT_BYTES + (2 << 20)  # and what was under way
    assert part == await pair.gamma.snapshots().verify("lab", "s1")


async def test_a_byte_that_is_altered_on_the_way_ends_the_connection(pair: Pair) -> None:
    pair.line.flip = SENT_BYTES // 2
    with pytest.raises(QsnapError, match="host alpha"):
        await pair.fetch("a")
    assert await pair.fetch("a") == await pair.gamma.snapshots().verify("lab", "s1")


@pytest.mark.parametrize("file", ["snapshots/s1/a/pc.ram.ram", "snapshots/s1/a/device.stream", "disks/a-s1.qcow2"])
async def test_a_file_that_was_altered_is_refused_by_name(pair: Pair, file: str) -> None:
    there = pair.files(pair.alpha)[file]
    content = there.read_bytes()
    there.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=f"{file}: it is not what was stored.*from alpha"):
        await pair.fetch("a")
    assert await pair.gamma.snapshots().names("lab") == ()
    there.write_bytes(content)
    assert await pair.fetch("a") == await pair.gamma.snapshots().verify("lab", "s1")


@pytest.mark.parametrize("length", [1, RAM_BYTES - 1, RAM_BYTES, RAM_BYTES + 1])
async def test_what_was_there_before_is_of_no_use_if_it_is_wrong(pair: Pair, length: int) -> None:
    directory = pair.gamma.store / "lab/snapshots/s1/a"
    directory.mkdir(parents=True)
    (directory / "pc.ram.ram").write_bytes(b"x" * length)
    assert await pair.fetch("a") == await pair.gamma.snapshots().verify("lab", "s1")


async def test_a_symbolic_link_is_not_followed(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"precious")
    directory = pair.gamma.store / "lab/snapshots/s1/a"
    directory.mkdir(parents=True)
    (directory / "pc.ram.ram").symlink_to(tmp_path / "mine")
    with pytest.raises(QsnapError, match="symbolic link"):
        await pair.fetch("a")
    assert (tmp_path / "mine").read_bytes() == b"precious"


async def test_another_snapshot_of_the_same_name_stays(pair: Pair) -> None:
    other = await save(pair.gamma, "s1", pair.table, {"c": b"c"})
    other = evolve(other, operation="another")
    await pair.gamma.snapshots().replace(other)
    with pytest.raises(IntegrityError, match="different snapshots of this name"):
        await pair.fetch("a")
    assert await pair.gamma.snapshots().verify("lab", "s1") == other


async def test_a_layer_that_is_here_does_not_come_again(pair: Pair) -> None:
    """Nor does what it lies on: here that may be something else."""
    (old,) = (await pair.fetch("a")).vms[0].disks
    saved = await save(pair.alpha, "s2", pair.table, {"a": b"newer"})
    (vm,), (disk,) = saved.vms, saved.vms[0].disks
    on_top = evolve(disk, layers=(*disk.layers, *old.layers), format="raw")
    await pair.alpha.snapshots().replace(evolve(saved, vms=(evolve(vm, disks=(on_top,)),)))
    (pair.alpha.store / "lab" / old.layers[0].path).write_bytes(b"would be wrong")
    part = await pair.fetch("a", name="s2")
    assert part.vms[0].disks[0].layers == on_top.layers
    assert await pair.gamma.snapshots().verify("lab", "s2") == part


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "snapshots/s1/manifest.json", "snapshots/s1/a/../../../x", "disks/unknown.qcow2", ""]
)
async def test_nothing_but_the_files_of_the_snapshot_is_given_away(pair: Pair, path: str) -> None:
    async with connect(pair.table[0], load_identity(pair.gamma.identity)) as connection:
        await connection.send(m.ReadFile("lab", "s1", path, 0))
        with pytest.raises(StateError, match="has no file"):
            await connection.receive_data()
        with pytest.raises(StateError, match="lies on"):
            await connection.ask(m.GetBase("lab", "s1", path))
        await connection.send(m.ReadFile("lab", "s1", "disks/a-s1.qcow2", 4))
        assert (await connection.receive_data())[-6:] == b"a" * 6
        assert await connection.receive_data() == b""
