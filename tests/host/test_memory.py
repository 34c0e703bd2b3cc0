"""Memory that is taken in advance, on a small tmpfs, and what there is of it."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsnap.host.memory import is_memory_file, resident_bytes, spare_bytes
from qsnap.host.reserve import PIECE_BYTES, Reserve
from tests.host.test_receiver import Daemon
from tests.wire import building as b

SIZE_BYTES = 16 * PIECE_BYTES
LONG_S = 60.0


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory on a tmpfs of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "memory"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "qsnap-test", str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def used_bytes(place: Path) -> int:
    room = os.statvfs(place)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def test_a_reserve_is_given_back_ahead_of_what_is_needed(memory: Path) -> None:
    reserve = Reserve(str(memory), 3 * PIECE_BYTES - 1, LONG_S)
    assert used_bytes(memory) == 3 * PIECE_BYTES
    assert not list(memory.iterdir())
    for needed, left in ((1, 2), (PIECE_BYTES - 1, 2), (1, 1), (PIECE_BYTES, 0), (9 * PIECE_BYTES, 0)):
        reserve.give_back(needed)
        assert used_bytes(memory) == left * PIECE_BYTES
    reserve.close()


def test_what_is_left_is_given_back_in_the_end(memory: Path) -> None:
    reserve = Reserve(str(memory), 2 * PIECE_BYTES, LONG_S)
    reserve.close()
    assert used_bytes(memory) == 0


def test_no_time_for_a_reserve(memory: Path) -> None:
    reserve = Reserve(str(memory), SIZE_BYTES, 0.0)
    assert used_bytes(memory) == 0
    reserve.give_back(1)
    reserve.close()


def test_where_there_is_not_enough_nothing_is_held(memory: Path) -> None:
    """Others may need what is left."""
    reserve = Reserve(str(memory), SIZE_BYTES + PIECE_BYTES, LONG_S)
    assert used_bytes(memory) == 0
    reserve.give_back(PIECE_BYTES)
    reserve.close()


def test_a_receiver_fills_the_store_with_its_reserve(memory: Path) -> None:
    """There is no room for both: what it writes takes the place of what it has reserved."""
    pages = (SIZE_BYTES - PIECE_BYTES) // b.PAGE
    daemon = Daemon(memory, "--reserve", str(pages * b.PAGE))
    try:
        assert daemon.message() == {"event": "ready"}
        assert used_bytes(memory) >= pages * b.PAGE
        content = b"".join(b.data_page(index * b.PAGE, b"%04d" % index * 1024, "pc.ram") for index in range(pages))
        done = daemon.finish(b.stream(b.part(content), b.end(), blocks={"pc.ram": SIZE_BYTES}))
        assert (done["event"], done["data_pages"]) == ("done", pages)
        assert daemon.exit_code() == 0
        assert used_bytes(memory) < (pages + 16) * b.PAGE
    finally:
        daemon.close()


def test_spare_memory_is_bounded_by_the_file_system(memory: Path) -> None:
    assert spare_bytes(memory) == SIZE_BYTES
    (memory / "file").write_bytes(bytes(PIECE_BYTES))
    assert spare_bytes(memory) == SIZE_BYTES - PIECE_BYTES
    subprocess.run(["mount", "-o", "remount,size=0", str(memory)], check=True)  # no limit
    assert SIZE_BYTES < spare_bytes(memory) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_directory_in_memory_is_told_from_one_on_a_disk(memory: Path) -> None:
    assert is_memory_file(memory)
    assert not is_memory_file(Path("/proc"))


def test_the_memory_of_a_process() -> None:
    before = resident_bytes(os.getpid())
    with mmap.mmap(-1, SIZE_BYTES, mmap.MAP_PRIVATE) as memory:
        memory.write(b"x" * SIZE_BYTES)
        assert resident_bytes(os.getpid()) >= before + SIZE_BYTES
    assert resident_bytes(1 << 22 | 1) == 0  # beyond the largest process id there is
