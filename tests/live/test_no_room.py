"""Not enough room, for each operation and at each of its writes: a clear error, and all is as it was."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from attrs import define

import qsnap
from qsnap.host.netns import netns_path
from tests.live.test_faults import check_nothing_left
from tests.live.test_host_faults import remount, tmpfs
from tests.live.tiny import check_echo, make_boot_disk, make_tiny_vne

Step = Callable[[], Awaitable[object]]
MOST_ATTEMPTS = 20
BISECTIONS = 3


@define
class Room:
    """The room in a tmpfs: its bytes or its files, which are given out in units."""

    directory: Path
    option: str  #: `size` or `nr_inodes`

    @property
    def unit(self) -> int:
        return 4096 if self.option == "size" else 1

    def leave(self, spare: int) -> None:
        """Leave room for so many bytes or files more."""
        self.open()
        usage = os.statvfs(self.directory)
        used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
        if self.option == "nr_inodes":
            used = usage.f_files - usage.f_ffree
        remount(self.directory, f"{self.option}={max(used + spare, 1)}")  # 0 would be no limit

    def open(self) -> None:
        """Leave plenty."""
        remount(self.directory, "size=1g,nr_inodes=100000")


async def failure_of(operation: Step) -> qsnap.QsnapError | None:
    """What it fails with, if it does."""
    try:
        await operation()
    except qsnap.QsnapError as error:
        return error
    return None


async def squeeze(room: Room, operation: Step, undo: Step, check: Step) -> None:
    """Try it with more and more room until it succeeds, and then around the least room that it needs.

    `undo` follows a success, `check` a failure.
    """

    async def succeeds(spare: int) -> bool:
        room.leave(spare)
        failure = await failure_of(operation)
        room.open()
        if failure is None:
            await undo()
            return True
        said = str(failure).lower()
        assert "no space" in said or "full" in said, said
        assert failure.advice, said
        await check()
        return False

    least, enough = 0, room.unit
    for _ in range(MOST_ATTEMPTS):
        if await succeeds(least):
            assert least > 0, "there was room from the beginning"
            break
        least, enough = max(2 * least, room.unit), least
    else:
        pytest.fail("it fails for another reason")
    least, enough = enough, least
    for _ in range(BISECTIONS):
        middle = (least + enough) // 2 // room.unit * room.unit
        least, enough = (least, middle) if await succeeds(middle) else (middle, enough)


@pytest.fixture
async def lab(place: qsnap.Place, tmp_path: Path) -> AsyncIterator[qsnap.Place]:
    """A VNE `lab` that runs, with a snapshot; run directory and store are file systems of their own."""
    with ExitStack() as mounts:
        for directory in (place.run, place.store):
            mounts.enter_context(tmpfs(directory))
        disk = make_boot_disk(tmp_path / "boot.img")
        async with qsnap.running(make_tiny_vne("lab", disk), place=place):
            await check_echo("lab", ["vm1"], place)
            await qsnap.snapshot("lab", "before", place=place)
            yield place


@pytest.fixture(params=["size", "nr_inodes"])
def option(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["store", "run"])
def room(request: pytest.FixtureRequest, option: str, place: qsnap.Place) -> Room:
    return Room(getattr(place, request.param), option)


async def test_snapshot(lab: qsnap.Place, room: Room) -> None:
    async def check() -> None:
        await qsnap.recover(place=lab)  # what was committed and not noted is finished by whoever comes next
        if len(await qsnap.snapshots("lab", place=lab)) > 1:
            await qsnap.remove("lab", "more", place=lab)
        await check_nothing_left("lab", lab, ["running"])
        await check_echo("lab", ["vm1"], lab)
        await qsnap.verify("lab", "before", place=lab)

    await squeeze(
        room,
        lambda: qsnap.snapshot("lab", "more", place=lab),
        lambda: qsnap.remove("lab", "more", place=lab),
        check,
    )


async def test_restore(lab: qsnap.Place, room: Room) -> None:
    async def check() -> None:
        assert not lab.runtime().names()
        assert not Path(netns_path(lab.runtime().netns("lab"))).exists()
        assert {path.name for path in lab.run.iterdir()} <= {"lab.lock"}
        await qsnap.verify("lab", "before", place=lab)

    await qsnap.down("lab", place=lab)
    await squeeze(room, lambda: qsnap.restore("lab", "before", place=lab), lambda: qsnap.down("lab", place=lab), check)


async def test_convert(lab: qsnap.Place, option: str) -> None:
    async def check() -> None:
        assert {saved.name for saved in await qsnap.snapshots("lab", place=lab)} == {"before", "stream"}
        await qsnap.verify("lab", "stream", place=lab)
        assert {path.name for path in (lab.store / "lab/snapshots/stream/vm1").iterdir()} == {"migration.stream"}

    async def save() -> None:
        if "stream" in {saved.name for saved in await qsnap.snapshots("lab", place=lab)}:
            await qsnap.remove("lab", "stream", place=lab)
        await qsnap.snapshot("lab", "stream", engine=qsnap.Engine.RECORD, place=lab)

    await save()
    await squeeze(Room(lab.store, option), lambda: qsnap.convert("lab", "stream", place=lab), save, check)


async def test_a_removal_makes_room(lab: qsnap.Place) -> None:
    for option in ("size", "nr_inodes"):
        await qsnap.snapshot("lab", "doomed", place=lab)
        room = Room(lab.store, option)
        room.leave(0)
        await qsnap.remove("lab", "doomed", place=lab)
        room.open()
        await qsnap.verify("lab", "before", place=lab)
        await check_nothing_left("lab", lab, ["running"])
