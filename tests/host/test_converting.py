"""Converting recorded streams of real QEMUs, and failing at it in every way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve

import qsnap
from qsnap.host.journal import Kind, Operation
from qsnap.host.store import Store
from qsnap.model import Engine, Snapshot
from tests.host.storing import present, write
from tests.samples import contents, snapshot
from tests.wire.folding import RECORDED, fold, read_recorded

STREAM = "snapshots/s1/alice/migration.stream"
PRECOPIES = [name for name in RECORDED if "precopy" in name]


@pytest.fixture
def place(tmp_path: Path) -> qsnap.Place:
    return qsnap.Place(tmp_path / "run", tmp_path / "store")


async def save(place: qsnap.Place, stream: bytes) -> Snapshot:
    """Store a snapshot as engine record leaves it."""
    store, home = Store(place.store), place.store / "lab"
    await store.begin("lab", "s1")
    layer, content = list(contents().items())[-1]
    write(home / layer, content)
    write(home / STREAM, stream)
    flat = snapshot()
    vm = evolve(flat.vms[0], engine=Engine.RECORD, ram=(), device_stream=await store.seal_file("lab", STREAM))
    saved = evolve(flat, vms=(vm,))
    await store.commit(saved)
    return saved


@pytest.mark.parametrize("name", PRECOPIES)
async def test_the_flat_form_is_the_stream(name: str, place: qsnap.Place) -> None:
    data = read_recorded(name)
    saved = await save(place, data)
    home = place.store / "lab"
    write(home / "snapshots/s1/alice/pc.ram.ram", b"what a killed attempt left")
    told: list[tuple[str, int, int]] = []
    flat = await qsnap.convert(
        "lab", "s1", place=place, progress=lambda stage, vm, *amount: told.append((stage, *amount))
    )

    original = fold([data])
    (vm,) = flat.vms
    (block,) = vm.ram
    assert (home / block.file.path).read_bytes() == original.images["pc.ram"]
    again = fold([(home / vm.device_stream.path).read_bytes()])
    assert again.sent == {key for key in original.sent if key[0] != "pc.ram"}
    assert again.devices == original.devices

    assert flat == await qsnap.verify("lab", "s1", place=place)
    assert not (home / STREAM).exists()
    assert len(present(home)) == 5, "something was left behind"
    was = saved.vms[0].measurements
    image_bytes = sum(path.stat().st_blocks * 512 for path in (home / "snapshots/s1/alice").iterdir())
    assert vm.measurements == evolve(was, image_bytes=image_bytes, image_to_memory=image_bytes / vm.vm.memory_bytes)
    assert evolve(vm, ram=(), device_stream=saved.vms[0].device_stream, measurements=was) == saved.vms[0]
    assert ("convert", 0, len(data)) in told


FAULTY = {"truncated": lambda data: data[:-1], "no stream": lambda data: b"GET / HTTP/1.1\r\n\r\n"}


@pytest.mark.parametrize("spoil", FAULTY.values(), ids=FAULTY)
async def test_a_stream_that_cannot_be_read(spoil: Callable[[bytes], bytes], place: qsnap.Place) -> None:
    """Its digest is right: it was stored like this."""
    saved = await save(place, spoil(read_recorded(PRECOPIES[0])))
    before = present(place.store / "lab")
    with pytest.raises(qsnap.StreamError) as caught:
        await qsnap.convert("lab", "s1", place=place)
    assert caught.value.where == str(place.store / "lab" / STREAM)
    assert present(place.store / "lab") == before
    assert await qsnap.verify("lab", "s1", place=place) == saved


LAST_STEP = 18  #: calls that are made to fail, counted from 0


@pytest.mark.parametrize("fatal", range(20))
async def test_one_form_or_the_other(fatal: int, place: qsnap.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's disk fails for good at each system call that changes a directory or syncs something."""
    saved = await save(place, read_recorded(PRECOPIES[0]))
    calls = iter(range(1000))

    def failing(name: str) -> Callable[..., object]:
        real: Callable[..., object] = getattr(os, name)

        def call(file: int | Path, *args: object, **kwargs: object) -> object:
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)
            if path.startswith(str(place.store)) and next(calls) >= fatal:
                raise OSError(5, "Input/output error")
            return real(file, *args, **kwargs)

        return call

    failed = False
    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "unlink"):
            patch.setattr(os, name, failing(name))
        try:
            await qsnap.convert("lab", "s1", place=place)
        except qsnap.HostError:
            failed = True
    assert failed == (fatal <= LAST_STEP)
    found = await qsnap.verify("lab", "s1", place=place)
    if found == saved:
        found = await qsnap.convert("lab", "s1", place=place)
    assert not found.vms[0].recorded
    await Store(place.store).collect("lab")
    assert len(present(place.store / "lab")) == 5


async def test_what_a_killed_attempt_left_is_removed(place: qsnap.Place) -> None:
    await save(place, read_recorded(PRECOPIES[0]))
    home = place.store / "lab"
    before = present(home)
    with place.runtime().locked("lab"):
        journal = place.runtime().journal("lab")
        journal.begin(Operation(Kind.CONVERT, "s1", str(place.store)))
        journal.close()
        write(home / "snapshots/s1/alice/pc.ram.ram", b"half of it")
    assert await qsnap.recover(place=place) == ("lab",)
    assert present(home) == before


async def test_a_flat_snapshot_is_left(place: qsnap.Place) -> None:
    await save(place, read_recorded(PRECOPIES[0]))
    await qsnap.convert("lab", "s1", place=place)
    with pytest.raises(qsnap.StateError, match="s1 of lab is flat already"):
        await qsnap.convert("lab", "s1", place=place)
    with pytest.raises(qsnap.StateError, match="no snapshot s2"):
        await qsnap.convert("lab", "s2", place=place)


async def test_an_altered_stream_is_named(place: qsnap.Place) -> None:
    await save(place, read_recorded(PRECOPIES[0]))
    path = place.store / "lab" / STREAM
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(qsnap.IntegrityError) as caught:
        await qsnap.convert("lab", "s1", place=place)
    assert caught.value.file == str(path)
