"""The QMP socket of a VM is gone, or its connection ends while a snapshot is under way: the VM runs on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import qsnap
from qsnap.host.capture import Background, Capture
from qsnap.host.held import HeldPrecopy
from tests.live.lab import QEMU_7, QEMU_11
from tests.live.test_faults import check_nothing_left
from tests.live.tiny import check_echo, make_boot_disk, make_tiny_vne, strike_before

BOTH = ["vm1", "vm2"]
ENGINES: list[type[Capture]] = [Background, HeldPrecopy]


def cut_connections(path: str) -> None:
    """End all of this process's connections to a Unix socket, in both directions."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        if entry.is_socket():
            with suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as ours:
                if ours.getpeername() == path:
                    ours.shutdown(socket.SHUT_RDWR)
                    found += 1
    assert found, f"nothing is connected to {path}"


async def cut_off(place: qsnap.Place, hide: Callable[[], None] = lambda: None) -> None:
    """End qsnap's conversation with vm2."""
    hide()
    cut_connections(place.runtime().qmp_path("lab", "vm2"))


def sockets(place: qsnap.Place) -> list[Path]:
    return [Path(path("lab", "vm2")) for path in (place.runtime().qmp_path, place.runtime().monitor_path)]


def hide(paths: list[Path]) -> None:
    """Nobody can connect any more; QEMU listens on."""
    for path in paths:
        path.rename(path.with_suffix(".hidden"))


def show(paths: list[Path]) -> None:
    for path in paths:
        path.with_suffix(".hidden").rename(path)


@pytest.mark.parametrize("engine", ENGINES)
async def test_the_socket_was_removed(engine: type[Capture], place: qsnap.Place, tmp_path: Path) -> None:
    """There is a second one."""
    vne = make_tiny_vne("lab", make_boot_disk(tmp_path / "boot.img"), vms=2)
    async with qsnap.running(vne, place=place):
        sockets(place)[0].unlink()
        await qsnap.snapshot("lab", "saved", engine=engine.engine, place=place)
        await check_nothing_left("lab", place, ["running"] * 2)
        sockets(place)[1].unlink()
        with pytest.raises(qsnap.QemuError, match="VM vm2: QEMU does not answer"):
            await qsnap.snapshot("lab", "doomed", engine=engine.engine, place=place)
        await check_echo("lab", BOTH, place)
        assert [saved.name for saved in await qsnap.snapshots("lab", place=place)] == ["saved"]
    await qsnap.restore("lab", "saved", place=place)
    await check_echo("lab", BOTH, place)


@pytest.mark.parametrize("step", ["prepare", "halt", "stop", "_release", "complete"])
@pytest.mark.parametrize("engine", ENGINES)
async def test_the_connection_ends(
    engine: type[Capture], step: str, place: qsnap.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vne = make_tiny_vne("lab", make_boot_disk(tmp_path / "boot.img"), vms=2)
    async with qsnap.running(vne, place=place):
        await check_echo("lab", BOTH, place)
        for gone in ([], sockets(place)[:1]):
            with monkeypatch.context() as patch:
                strike_before(patch, step, "vm2", partial(cut_off, place, partial(hide, gone)), engine)
                with pytest.raises(qsnap.QemuError, match="VM vm2"):
                    await qsnap.snapshot("lab", "doomed", engine=engine.engine, place=place)
            await check_nothing_left("lab", place, ["running"] * 2)
            await check_echo("lab", BOTH, place)
            show(gone)
        await qsnap.snapshot("lab", "again", engine=engine.engine, place=place)
        await check_nothing_left("lab", place, ["running"] * 2)


@pytest.mark.parametrize(("qemu", "engine"), [(QEMU_7, Background), (QEMU_11, Background), (QEMU_11, HeldPrecopy)])
async def test_no_socket_answers_for_a_while(
    qemu: str, engine: type[Capture], place: qsnap.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can let the VM run then; the next operation does, and until then each says what it waits for."""
    vne = make_tiny_vne("lab", make_boot_disk(tmp_path / "boot.img"), vms=2, qemu=qemu)
    async with qsnap.running(vne, place=place):
        await check_echo("lab", BOTH, place)
        with monkeypatch.context() as patch:
            strike_before(patch, "_release", "vm2", partial(cut_off, place, partial(hide, sockets(place))), engine)
            with pytest.raises(qsnap.QemuError, match="VM vm2") as caught:
                await qsnap.snapshot("lab", "doomed", engine=engine.engine, place=place)
        assert "not all of it could be undone" in "".join(caught.value.__notes__)
        with pytest.raises(qsnap.QemuError, match="VM vm2: QEMU does not answer"):
            await qsnap.snapshot("lab", "early", place=place)
        await check_echo("lab", ["vm1"], place)
        show(sockets(place))
        await qsnap.snapshot("lab", "again", place=place)
        await check_nothing_left("lab", place, ["running"] * 2)
        await check_echo("lab", BOTH, place)
