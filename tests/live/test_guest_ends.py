"""A guest panics or powers off, before a snapshot or in the middle of one: the others run on, and it stays as it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

import qsnap
from qsnap import Cut
from qsnap.host.capture import Background, Capture
from qsnap.host.held import HeldPrecopy
from tests.live.lab import QEMU_7, QEMU_11
from tests.live.test_faults import check_nothing_left
from tests.live.tiny import check_echo, make_boot_disk, make_tiny_vne, strike_before, tell, wait_state

PVPANIC = ("-device", "pvpanic")
ENDS = [
    (b"p", (*PVPANIC, "-action", "panic=pause"), "guest-panicked"),
    (b"p", PVPANIC, "dead"),
    (b"s", (*PVPANIC, "-no-shutdown"), "shutdown"),
    (b"s", PVPANIC, "dead"),
]
CAPTURES = [
    pytest.param(QEMU_7, Background, Cut.COLOUR, id="7-background"),
    pytest.param(QEMU_11, Background, Cut.BARRIER, id="11-background-barrier"),
    pytest.param(QEMU_11, HeldPrecopy, Cut.COLOUR, id="11-precopy"),
]


async def end_guest(place: qsnap.Place, word: bytes, state: str) -> None:
    await tell("lab", "vm2", place, word)
    await wait_state("lab", "vm2", place, state)


@pytest.mark.parametrize(("word", "extra", "state"), ENDS, ids=["panic", "panic-quits", "shutdown", "shutdown-quits"])
async def test_before(word: bytes, extra: tuple[str, ...], state: str, place: qsnap.Place, tmp_path: Path) -> None:
    vne = make_tiny_vne("lab", make_boot_disk(tmp_path / "boot.img"), vms=2, extra=extra)
    async with qsnap.running(vne, place=place):
        await check_echo("lab", ["vm1", "vm2"], place)
        await end_guest(place, word, state)
        with pytest.raises(qsnap.StateError, match=f"vm2.* is {state}"):
            await qsnap.snapshot("lab", "doomed", place=place)
        await check_nothing_left("lab", place, ["running", state])
        await check_echo("lab", ["vm1"], place)


@pytest.mark.parametrize("step", ["prepare", "halt", "complete"])
@pytest.mark.parametrize(("qemu", "engine", "cut"), CAPTURES)
async def test_meanwhile(
    qemu: str,
    engine: type[Capture],
    cut: Cut,
    step: str,
    place: qsnap.Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = make_boot_disk(tmp_path / "boot.img")
    for word, extra, state in ENDS:
        vne = make_tiny_vne("lab", disk, vms=2, qemu=qemu, extra=extra)
        async with qsnap.running(vne, place=place):
            await check_echo("lab", ["vm1", "vm2"], place)
            with monkeypatch.context() as patch:
                strike_before(patch, step, "vm2", partial(end_guest, place, word, state), engine)
                with pytest.raises(qsnap.QemuError, match="VM vm2"):
                    await qsnap.snapshot("lab", "doomed", engine=engine.engine, cut=cut, place=place)
            await check_nothing_left("lab", place, ["running", state])
            await check_echo("lab", ["vm1"], place)
