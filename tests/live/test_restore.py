"""Restoring: over generations and QEMU versions, eagerly and by mapping, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import trio

import qsnap
from qsnap import Engine, RamMode
from qsnap.host.qmp import open_loop, open_qmp
from tests.live.lab import (
    QEMU_11,
    booting_from,
    check_continues,
    finish,
    judge,
    make_vne,
    open_consoles,
    ram_path,
    wait_ready,
)


async def kill(vne: str, place: qsnap.Place) -> None:
    for vm in (await qsnap.status(vne, place=place)).vms:
        os.kill(vm.pid, signal.SIGKILL)


@pytest.mark.parametrize("store", ["/var/tmp", "/dev/shm"])
async def test_five_generations(store: str, eleven: qsnap.Place, place: qsnap.Place) -> None:
    """Each generation is restored from the one before, whatever the file system, and the last still streams."""
    here = qsnap.Place(place.run, Path(store) / place.run.parent.name / "generations")
    shutil.copytree(eleven.store, here.store, symlinks=True)
    try:
        name = "booted"
        for generation in range(5):
            await qsnap.restore("eleven", name, place=here)
            await trio.sleep(0.2)
            name = f"generation-{generation}"
            saved = await qsnap.snapshot("eleven", name, place=here)
            verdict = judge(saved, here)
            assert (verdict.orphans, verdict.wrong_stamps) == (0, 0)
            await kill("eleven", here)
        await qsnap.restore("eleven", name, place=here)
        async with open_consoles("eleven", here) as consoles:
            await check_continues(consoles, verdict.states)
    finally:
        await qsnap.down("eleven", place=here)
        shutil.rmtree(here.store.parent)


async def test_saved_by_7_restored_by_11(seven: qsnap.Place) -> None:
    cut = judge(await qsnap.show("seven", "booted", place=seven), seven)
    await qsnap.restore("seven", "booted", qemu=QEMU_11, place=seven)
    status = await qsnap.status("seven", place=seven)
    assert {vm.qemu_version[0] for vm in status.vms} == {11}
    async with open_consoles("seven", seven) as consoles:
        await check_continues(consoles, cut.states)


@pytest.mark.parametrize("mode", [RamMode.MAP, RamMode.EAGER])
async def test_both_ways_to_get_ram_are_the_same_state(mode: RamMode, eleven: qsnap.Place) -> None:
    cut = judge(await qsnap.show("eleven", "booted", place=eleven), eleven)
    await qsnap.restore("eleven", "booted", ram=mode, place=eleven)
    again = await qsnap.snapshot("eleven", "again", engine=Engine.BACKGROUND, place=eleven)
    assert judge(again, eleven).wrong_stamps == 0
    async with open_consoles("eleven", eleven) as consoles:
        await check_continues(consoles, cut.states)


async def test_restored_state_is_exactly_the_cut(eleven: qsnap.Place) -> None:
    """Loaded and not yet run, a VM saved again is the same image, byte for byte."""
    booted = await qsnap.show("eleven", "booted", place=eleven)
    await qsnap.restore("eleven", "booted", paused=True, place=eleven)
    again = await qsnap.snapshot("eleven", "again", place=eleven)
    assert [vm.was_running for vm in again.vms] == [False] * 3
    assert [vm.state for vm in (await qsnap.status("eleven", place=eleven)).vms] == ["paused"] * 3
    for index in range(3):
        assert ram_path(again, eleven, index).read_bytes() == ram_path(booted, eleven, index).read_bytes()


async def test_the_image_never_changes_while_a_vm_runs_on_it(eleven: qsnap.Place) -> None:
    await qsnap.restore("eleven", "booted", ram=RamMode.MAP, place=eleven)
    async with open_consoles("eleven", eleven) as consoles:
        await finish(consoles)
    await qsnap.verify("eleven", "booted", place=eleven)


async def test_the_kernel_is_in_the_snapshot(place: qsnap.Place, tmp_path: Path) -> None:
    """A guest boots from what it was started with, whatever has become of that since."""
    await qsnap.up(booting_from(make_vne("lab", vms=2), tmp_path), place=place)
    for path in tmp_path.iterdir():
        path.write_bytes(b"an upgrade")
    async with open_consoles("lab", place, 2) as consoles:
        await wait_ready(consoles)
    saved = await qsnap.snapshot("lab", "saved", place=place)
    assert len({each.file.path for vm in saved.vms for each in vm.boot}) == 2, "one copy for all"
    await qsnap.down("lab", place=place)
    shutil.rmtree(tmp_path)
    await qsnap.restore("lab", "saved", place=place)
    async with open_consoles("lab", place, 2) as consoles:
        await check_continues(consoles, judge(saved, place).states)
    await qsnap.snapshot("lab", "again", place=place)
    await qsnap.remove("lab", "saved", place=place)
    await qsnap.verify("lab", "again", place=place)
    await check_boots_again("lab", place)
    await qsnap.down("lab", place=place)
    await qsnap.remove("lab", "again", place=place)
    assert not list((place.store / "lab/boot").iterdir())


async def check_boots_again(vne: str, place: qsnap.Place) -> None:
    async with open_consoles(vne, place, 1) as (console,):
        before = await console.status()
        async with open_loop(), open_qmp(place.runtime().qmp_path(vne, "vm1"), vm="vm1") as qmp:
            await qmp.execute("system_reset")
        now = before
        with trio.fail_after(60):
            while now.nonce == before.nonce:
                with trio.move_on_after(2):  # what is asked before it has booted is not answered
                    now = await console.status()


async def test_a_running_vne_is_not_restored_over(eleven: qsnap.Place) -> None:
    await qsnap.restore("eleven", "booted", place=eleven)
    with pytest.raises(qsnap.StateError, match="is running"):
        await qsnap.restore("eleven", "booted", place=eleven)
    assert {vm.state for vm in (await qsnap.status("eleven", place=eleven)).vms} == {"running"}


async def test_an_altered_image_is_named_and_refused(eleven: qsnap.Place) -> None:
    await qsnap.restore("eleven", "booted", place=eleven)
    saved = await qsnap.snapshot("eleven", "altered", place=eleven)
    await qsnap.down("eleven", place=eleven)
    path = ram_path(saved, eleven, 1)
    before = path.stat()
    with path.open("r+b") as image:
        image.seek(before.st_size // 2)
        byte = image.read(1)
        image.seek(before.st_size // 2)
        image.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for check in (qsnap.restore, qsnap.verify):
        with pytest.raises(qsnap.IntegrityError) as caught:
            await check("eleven", "altered", place=eleven)
        assert caught.value.file == str(path)
    assert "eleven" not in eleven.runtime().names()


async def test_an_altered_manifest_is_named_and_refused(eleven: qsnap.Place) -> None:
    await qsnap.restore("eleven", "booted", place=eleven)
    await qsnap.snapshot("eleven", "altered", place=eleven)
    await qsnap.down("eleven", place=eleven)
    manifest = eleven.store / "eleven/snapshots/altered/manifest.json"
    good = manifest.read_text()
    manifest.write_text(good.replace('"precopy"', '"background"').replace("vm1", "vm9", 1))
    for check in (qsnap.restore, qsnap.verify):
        with pytest.raises(qsnap.IntegrityError) as caught:
            await check("eleven", "altered", place=eleven)
        assert caught.value.file == str(manifest)
    manifest.write_text(good)
    assert json.loads(good)["format"]


async def test_a_damaged_manifest_stops_no_other_work(eleven: qsnap.Place) -> None:
    await qsnap.restore("eleven", "booted", place=eleven)
    await qsnap.snapshot("eleven", "damaged", place=eleven)
    (eleven.store / "eleven/snapshots/damaged/manifest.json").write_text("{}")
    await qsnap.snapshot("eleven", "good", place=eleven)
    await qsnap.down("eleven", place=eleven)
    assert "eleven" not in eleven.runtime().names()
    await qsnap.restore("eleven", "good", place=eleven)
    await qsnap.down("eleven", place=eleven)
    await qsnap.remove("eleven", "damaged", place=eleven)


async def test_a_changed_base_image_is_refused(place: qsnap.Place, tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(bytes(1 << 20))
    vne = make_vne("base", vms=1, disks=(qsnap.Disk(str(base), "raw"),))
    await qsnap.up(vne, place=place)
    await qsnap.snapshot("base", "one", place=place)
    await qsnap.down("base", place=place)
    base.write_bytes(bytes([1]) * (1 << 20))
    with pytest.raises(qsnap.IntegrityError) as caught:
        await qsnap.restore("base", "one", place=place)
    assert caught.value.file == str(base)


async def test_an_older_qemu_refuses_with_its_reason(eleven: qsnap.Place) -> None:
    with pytest.raises(qsnap.QemuError, match=r"unsupported machine type"):
        await qsnap.restore("eleven", "booted", qemu="qemu-system-x86_64", place=eleven)
    assert "eleven" not in eleven.runtime().names()
    await qsnap.restore("eleven", "booted", place=eleven)
    async with open_consoles("eleven", eleven) as consoles:
        await wait_ready(consoles)


async def test_a_damaged_state_file_does_not_keep_a_vne_up(eleven: qsnap.Place) -> None:
    await qsnap.restore("eleven", "booted", place=eleven)
    status = await qsnap.status("eleven", place=eleven)
    (eleven.run / "eleven/vne.json").write_text("{")
    with pytest.raises(qsnap.HostError, match="damaged"):
        await qsnap.status("eleven", place=eleven)
    await qsnap.down("eleven", place=eleven)
    assert "eleven" not in eleven.runtime().names()
    assert not Path(f"/run/netns/{status.netns}").exists()
    await qsnap.restore("eleven", "booted", place=eleven)
