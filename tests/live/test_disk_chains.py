"""Chains of disk layers stay short, however many snapshots are taken, and no snapshot depends on another's removal."""

from __future__ import annotations

import random

import pytest

import qsnap
from qsnap.host.disks import read_disks, tidy_disks
from qsnap.host.qmp import open_loop, open_qmp
from qsnap.rules.disks import LONGEST_CHAIN
from tests.live.lab import QEMU_7, QEMU_11, make_vne
from tests.live.test_disks import bases, holds, write

__all__ = ["bases"]
SNAPSHOTS = 50


@pytest.mark.parametrize("qemu", [QEMU_7, QEMU_11], ids=["7.2", "11.1"])
async def test_fifty_snapshots_in_a_row(qemu: str, bases: tuple[qsnap.Disk, ...], place: qsnap.Place) -> None:
    quiet = {"dirty_mb": 1, "rate_mb": 1}
    await qsnap.up(make_vne("disks", vms=1, qemu=qemu, disks=bases, guest=quiet), place=place)
    names = [f"s{number}" for number in range(SNAPSHOTS)]
    order = random.Random(7).sample(names, SNAPSHOTS)
    kept: list[str] = []
    for number, name in enumerate(names):
        await write(place, 1 + number, f"{number * 64}k")
        saved = await qsnap.snapshot("disks", name, place=place)
        assert all(len(disk.layers) < LONGEST_CHAIN for disk in saved.vms[0].disks)
        running = place.runtime().load("disks").vms[0].disks
        assert all(len(disk.layers) <= LONGEST_CHAIN for disk in running)
        kept.append(name)
        if number % 2:  # some go while others come
            kept.remove(doomed := next(each for each in order if each in kept))
            await qsnap.remove("disks", doomed, place=place)
    for name in kept:
        await qsnap.verify("disks", name, place=place)
    for number in range(SNAPSHOTS):
        assert await holds(place, 1 + number, f"{number * 64}k"), "the running VM has lost something"
    await qsnap.down("disks", place=place)
    for name in [each for each in order if each in kept][-3:]:
        await qsnap.restore("disks", name, place=place)
        for number in range(SNAPSHOTS):
            pattern = 1 + number if number <= int(name[1:]) else 0xEE
            assert await holds(place, pattern, f"{number * 64}k")
        await qsnap.down("disks", place=place)
    for name in kept:
        await qsnap.remove("disks", name, place=place)
    assert list((place.store / "disks/disks").iterdir()) == []


@pytest.mark.parametrize("qemu", [QEMU_7, QEMU_11], ids=["7.2", "11.1"])
async def test_a_merge_that_qsnap_did_not_live_to_see(
    qemu: str, bases: tuple[qsnap.Disk, ...], place: qsnap.Place
) -> None:
    """QEMU has ended it by itself, or is still at it; what the state file says is no longer true."""
    await qsnap.up(make_vne("disks", vms=1, qemu=qemu, disks=bases), place=place)
    for pattern in (1, 2, 3):
        await write(place, pattern, f"{pattern * 64}k")
        await qsnap.snapshot("disks", f"s{pattern}", place=place)
    believed = place.runtime().load("disks").vms[0].disks
    directory, devices = str(place.store / "disks/disks"), [disk.device for disk in believed]
    async with open_loop(), open_qmp(place.runtime().qmp_path("disks", "vm1"), vm="vm1") as qmp:
        for disk in believed:
            arguments = {"job-id": disk.job, "device": disk.node, "base": disk.below[0].path, "auto-dismiss": False}
            await qmp.execute("block-stream", arguments)
    await qsnap.snapshot("disks", "s4", place=place)
    async with open_loop(), open_qmp(place.runtime().qmp_path("disks", "vm1"), vm="vm1") as qmp:
        found = await read_disks(qmp, devices, directory)
        assert found == place.runtime().load("disks").vms[0].disks
        assert [len(disk.layers) for disk in found] == [2, 2]
        nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
        named = {node["node-name"] for node in nodes if not node["node-name"].startswith("#")}
        assert named == {disk.node for disk in (*believed, *found)}, "layers are still open"
        assert await qmp.execute("query-jobs") == []
        assert await tidy_disks(qmp, devices, directory) == found
    for pattern in (1, 2, 3):
        assert await holds(place, pattern, f"{pattern * 64}k")
    for name in ("s1", "s2", "s3", "s4"):
        await qsnap.verify("disks", name, place=place)
