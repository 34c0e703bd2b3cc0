"""Engine record: the stream kept as it comes is replayed, converted without QEMU, and mapped."""

from __future__ import annotations

import pytest

import qsnap
from qsnap import Cut, Engine, RamMode
from qsnap.host import saving
from tests.live.lab import check_continues, judge, make_vne, open_consoles, ram_path, wait_ready
from tests.live.test_faults import check_unharmed
from tests.live.test_snapshot import check_measurements


async def restore_and_check(cut: qsnap.Snapshot, place: qsnap.Place) -> qsnap.RestoreReport:
    """Restore a snapshot, and let its guests go on from the states in `cut`, which is the same one in flat form."""
    report = await qsnap.restore(cut.vne.name, cut.name, place=place)
    async with open_consoles(cut.vne.name, place) as consoles:
        await check_continues(consoles, judge(cut, place).states)
    await qsnap.down(cut.vne.name, place=place)
    return report


@pytest.mark.parametrize("cut", Cut)
async def test_replayed_converted_and_mapped(cut: Cut, eleven: qsnap.Place) -> None:
    await qsnap.restore("eleven", "booted", place=eleven)
    for name in ("one", "two"):
        saved = await qsnap.snapshot("eleven", name, engine=Engine.RECORD, cut=cut, place=eleven)
        check_measurements(saved, Engine.RECORD)
        assert all(vm.recorded for vm in saved.vms)
    await qsnap.down("eleven", place=eleven)
    with pytest.raises(qsnap.StateError, match="cannot be mapped"):
        await qsnap.restore("eleven", "one", ram=RamMode.MAP, place=eleven)

    flat = await qsnap.convert("eleven", "two", place=eleven)
    assert flat == await qsnap.verify("eleven", "two", place=eleven)
    verdict = judge(flat, eleven)
    assert (verdict.orphans, verdict.wrong_stamps) == (0, 0)
    with pytest.raises(qsnap.StateError, match="flat already"):
        await qsnap.convert("eleven", "two", place=eleven)
    mapped = await restore_and_check(flat, eleven)
    assert "mapped" in mapped.ram["vm1"]

    report = await qsnap.restore("eleven", "one", place=eleven)
    assert "replayed" in report.ram["vm1"]
    flat = await qsnap.convert("eleven", "one", place=eleven)  # beside the guests that were replayed from it
    async with open_consoles("eleven", eleven) as consoles:
        await check_continues(consoles, judge(flat, eleven).states)
    again = await qsnap.snapshot("eleven", "again", engine=Engine.BACKGROUND, place=eleven)
    assert judge(again, eleven).wrong_stamps == 0


async def test_a_busy_guest_is_recorded(place: qsnap.Place) -> None:
    """Many copies of a page are in the stream, and the last one counts."""
    vne = make_vne("busy", vms=1, memory=192 << 20, guest={"rate_mb": 1000, "dirty_mb": 48})
    await qsnap.up(vne, place=place)
    async with open_consoles("busy", place, 1) as consoles:
        await wait_ready(consoles)
    saved = await qsnap.snapshot("busy", "cut", engine=Engine.RECORD, place=place)
    await qsnap.down("busy", place=place)
    report = await qsnap.restore("busy", "cut", place=place)
    assert "replayed" in report.ram["vm1"]
    flat = await qsnap.convert("busy", "cut", place=place)
    assert flat.vms[0].measurements.image_bytes < saved.vms[0].measurements.image_bytes
    assert judge(flat, place).wrong_stamps == 0
    await qsnap.down("busy", place=place)
    await qsnap.restore("busy", "cut", place=place)


async def test_the_limit(eleven: qsnap.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    await qsnap.restore("eleven", "booted", place=eleven)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "record_limit", lambda memory_bytes: 5 << 20)
        with pytest.raises(qsnap.HostError, match="limit of 5242880 bytes") as caught:
            await qsnap.snapshot("eleven", "doomed", engine=Engine.RECORD, place=eleven)
    assert "precopy" in caught.value.advice
    await check_unharmed("eleven", eleven, ["running"] * 3)
    await qsnap.snapshot("eleven", "again", engine=Engine.RECORD, place=eleven)


async def test_an_altered_stream_is_named_and_left(eleven: qsnap.Place) -> None:
    await qsnap.restore("eleven", "booted", place=eleven)
    saved = await qsnap.snapshot("eleven", "altered", engine=Engine.RECORD, place=eleven)
    path = eleven.store / "eleven" / saved.vms[1].device_stream.path
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    for use in (qsnap.convert, qsnap.verify):
        with pytest.raises(qsnap.IntegrityError) as caught:
            await use("eleven", "altered", place=eleven)
        assert caught.value.file == str(path)
    path.write_bytes(good)
    assert await qsnap.verify("eleven", "altered", place=eleven) == saved
    flat = await qsnap.convert("eleven", "altered", place=eleven)
    assert ram_path(flat, eleven, 1).parent == path.parent
    assert not path.exists()
