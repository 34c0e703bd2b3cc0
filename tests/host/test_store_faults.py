"""The store, on real files: hostile content, removal, crashes, full and read-only file systems."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from attrs import evolve

from qsnap.errors import HostError, IntegrityError, StateError
from qsnap.host.store import Store
from qsnap.rules.manifest import encode_manifest
from tests.host.storing import LAYER, MANIFEST, RAM, SEALS, STREAM, alter, present, save, write
from tests.samples import contents, snapshot


class TestHostileContent:
    async def test_a_manifest_that_leads_out(self, store: Store, home: Path) -> None:
        saved = await save(store)
        stream = evolve(saved.vms[0].device_stream, path="snapshots/../../../../etc/passwd")
        evil = evolve(saved, vms=(evolve(saved.vms[0], device_stream=stream),))
        (home / MANIFEST).write_bytes(encode_manifest(evil))
        for call in (store.load, store.check_quick, store.verify):
            with pytest.raises(IntegrityError, match="not a plain relative one"):
                await call("lab", "s1")

    @pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "disks/../../x", "secrets", "disks"])
    async def test_only_files_inside_are_sealed(self, store: Store, home: Path, path: str) -> None:
        with pytest.raises(IntegrityError, match="the path"):
            await store.seal_file("lab", path)

    @pytest.mark.parametrize("link", [RAM, "snapshots/s1/alice", "snapshots/s1", "snapshots", "disks", MANIFEST])
    async def test_symbolic_links_are_not_followed(self, store: Store, home: Path, tmp_path: Path, link: str) -> None:
        await save(store)
        (home / link).rename(tmp_path / "moved")
        (home / link).symlink_to(tmp_path / "moved")
        with pytest.raises(IntegrityError, match="symbolic link"):
            await store.check_quick("lab", "s1")
        if link == "snapshots":
            with pytest.raises(HostError, match="cannot make the directory"):
                await store.begin("lab", "s2")
        assert (tmp_path / "moved").exists()

    async def test_a_vne_that_is_a_symbolic_link(self, store: Store, home: Path, tmp_path: Path) -> None:
        await save(store)
        home.rename(tmp_path / "moved")
        home.symlink_to(tmp_path / "moved")
        for call in (store.check_quick("lab", "s1"), store.collect("lab")):
            with pytest.raises(IntegrityError, match="symbolic link"):
                await call
        with pytest.raises(HostError, match="cannot make the directory"):
            await store.begin("lab", "s2")
        assert (tmp_path / "moved/snapshots/s1/manifest.json").exists()

    async def test_other_kinds_of_files_are_refused(self, store: Store, home: Path) -> None:
        await save(store)
        (home / STREAM).unlink()
        os.mkfifo(home / STREAM)
        with pytest.raises(IntegrityError, match="not a regular file"):
            await store.check_quick("lab", "s1")
        (home / STREAM).unlink()
        (home / STREAM).mkdir()
        with pytest.raises(IntegrityError, match="not a regular file"):
            await store.check_quick("lab", "s1")

    async def test_removing_does_not_follow_links(self, store: Store, home: Path, tmp_path: Path) -> None:
        await save(store)
        write(tmp_path / "outside/manifest.json", b"precious")
        (home / "snapshots/s2").symlink_to(tmp_path / "outside")
        (home / "disks/more").symlink_to(tmp_path / "outside")
        await store.remove("lab", "s2")
        await store.remove("lab", "s1")
        assert (tmp_path / "outside/manifest.json").read_bytes() == b"precious"
        assert present(home) == set()


class TestRemoving:
    async def test_everything_of_the_last_snapshot_goes(self, store: Store, home: Path) -> None:
        await save(store)
        removed = await store.remove("lab", "s1")
        assert set(removed) == {*contents(), SEALS}
        assert present(home) == set()
        assert list((home / "snapshots").iterdir()) == []

    async def test_shared_and_used_layers_stay(self, store: Store, home: Path) -> None:
        await save(store, "s1")
        await save(store, "s2")
        write(home / "disks/alice-1.qcow2", b"the running VM's")
        await store.remove("lab", "s1", in_use=["disks/alice-1.qcow2"])
        assert {"disks/alice-1.qcow2", LAYER} <= present(home)
        await store.check_quick("lab", "s2")
        await store.remove("lab", "s2", in_use=["disks/alice-1.qcow2", LAYER])
        assert present(home) == {"disks/alice-1.qcow2", LAYER}

    @pytest.mark.parametrize("way", ["", "link/", "store/../store/"])
    async def test_paths_in_use_may_be_absolute(self, store: Store, home: Path, tmp_path: Path, way: str) -> None:
        await save(store)
        (tmp_path / "link").symlink_to(store.root)
        path = f"{tmp_path}/{way}lab/{LAYER}" if way else str(home / LAYER)
        await store.remove("lab", "s1", in_use=[path, "/images/elsewhere.qcow2"])
        assert present(home) == {LAYER}

    async def test_leftovers_are_never_listed_and_collected(self, store: Store, home: Path) -> None:
        saved = await save(store)
        write(home / "snapshots/s2/alice/pc.ram.ram", b"half of it")
        write(home / "snapshots/s2/manifest.json.tmp", encode_manifest(saved))
        write(home / "snapshots/s1/manifest.json.tmp", b"half of it")
        (home / "snapshots/s3/alice").mkdir(parents=True)
        write(home / "notes.txt", b"not the store's")
        assert await store.list() == (saved,)
        assert set(await store.collect("lab")) == {
            "snapshots/s1/manifest.json.tmp",
            "snapshots/s2/alice/pc.ram.ram",
            "snapshots/s2/manifest.json.tmp",
        }
        assert present(home) == {*contents(), MANIFEST, SEALS, "notes.txt"}
        assert os.listdir(home / "snapshots") == ["s1"]
        await store.check_quick("lab", "s1")

    async def test_a_layer_that_a_qemu_has_open_stays_and_what_it_boots_from(self, store: Store, home: Path) -> None:
        await save(store)
        for name in ("disks/open.qcow2", "disks/closed.qcow2", "boot/kernel", "snapshots/old/left.ram"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            write(home / name, b"content")
        with (home / "disks/open.qcow2").open("rb") as image:  # a shared lock on one byte, as QEMU's are
            fcntl.fcntl(image, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0))
            assert set(await store.collect("lab")) == {"disks/closed.qcow2", "snapshots/old/left.ram"}
        assert set(await store.collect("lab")) == {"disks/open.qcow2", "boot/kernel"}

    async def test_a_layer_whose_volume_is_needed_stays(
        self, store: Store, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By a VM, or by a snapshot whose layers were merged; and the volume goes with its layer."""
        removed: list[str] = []
        monkeypatch.setattr("qsnap.host.store.snapshots.remove_volume", removed.append)
        volume, path = "/dev/vg0/qsnap-0123456789ab", "disks/alice-disk0-0123456789ab.qcow2"
        write(home / path, b"QFI\xfb" + struct.pack(">IQI", 3, 24, len(volume)) + bytes(4) + volume.encode())
        saved = snapshot()
        (disk,) = saved.vms[0].disks
        assert disk.base is not None
        merged = evolve(disk, base=evolve(disk.base, file=volume))
        for file, content in contents().items():
            write(home / file, content)
            await store.seal_file("lab", file)
        await store.commit(evolve(saved, vms=(evolve(saved.vms[0], disks=(merged,)),)))
        assert await store.collect("lab") == ()
        await store.remove("lab", "s1", in_use=[volume])
        assert removed == []
        assert present(home) == {path}
        assert await store.collect("lab") == (path,)
        assert removed == [volume]

    async def test_nothing_is_collected_beside_a_damaged_manifest(self, store: Store, home: Path) -> None:
        await save(store, "s1")
        await save(store, "s2")
        alter(home / MANIFEST)
        write(home / "disks/garbage", b"")
        before = present(home)
        with pytest.raises(IntegrityError):
            await store.collect("lab")
        assert present(home) == before
        with pytest.raises(IntegrityError):
            await store.remove("lab", "s2")
        assert await store.names("lab") == (("lab", "s1"),)
        assert LAYER in present(home)
        await store.remove("lab", "s1")
        assert present(home) == set()

    async def test_an_unknown_vne_has_no_garbage(self, store: Store) -> None:
        assert await store.collect("lab") == ()
        assert not store.root.exists()

    async def test_an_unknown_snapshot_cannot_be_removed(self, store: Store, home: Path) -> None:
        await save(store)
        before = present(home)
        with pytest.raises(StateError, match="no snapshot s3"):
            await store.remove("lab", "s3")
        assert present(home) == before


LAST_STEP = 15  #: calls that TestCrashes makes fail, counted from 0, in a commit of three files


class TestCrashes:
    """The process dies, or the disk fails, at each system call that changes a directory or syncs something."""

    @pytest.mark.parametrize("fatal", range(20))
    async def test_a_commit_is_whole_or_is_not(
        self, store: Store, home: Path, fatal: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        older = await save(store, "s0")
        await store.begin("lab", "s1")
        for path, content in contents().items():
            write(home / path, content)
        calls = iter(range(1000))

        def failing(name: str) -> Callable[..., object]:
            real: Callable[..., object] = getattr(os, name)

            def call(*args: object, **kwargs: object) -> object:
                if next(calls) >= fatal:
                    raise OSError(5, "Input/output error")
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "unlink"):
                patch.setattr(os, name, failing(name))
            failure = await outcome(store)
        again = Store(store.root)
        listed = await again.list("lab")
        assert older in listed
        assert failure or snapshot() in listed
        assert (failure is None) == (fatal > LAST_STEP)
        for each in listed:
            await again.verify("lab", each.name)
        await again.collect("lab")
        assert {path for path in present(home) if path.endswith(".tmp")} == set()
        assert len(listed) == 2 or "snapshots/s1" not in " ".join(present(home))


async def outcome(store: Store) -> HostError | None:
    try:
        await store.commit(snapshot())
    except HostError as error:
        return error
    return None


def fill(filler: Path) -> None:
    """Use up the file system."""
    with suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)


def make_read_only(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)


class TestPlaces:
    @pytest.fixture
    def small(self, tmp_path: Path) -> Iterator[Path]:
        """A file system of 256 KiB."""
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")
        place = tmp_path / "small"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "qsnap-test", str(place)], check=True)
        yield place
        subprocess.run(["umount", str(place)], check=True)

    async def test_a_full_file_system(self, small: Path) -> None:
        store = Store(small / "store")
        await store.begin("lab", "s1")
        for path, content in contents().items():
            write(store.root / "lab" / path, content)
            await store.seal_file("lab", path)
        fill(small / "filler")
        with pytest.raises(HostError, match=f"{small}.*No space left.*\n  Free some space"):
            await store.commit(snapshot())
        assert await store.names() == ()
        (small / "filler").unlink()
        await store.commit(snapshot())
        await store.check_quick("lab", "s1")

    async def test_a_store_made_read_only_is_still_good_to_restore(self, small: Path) -> None:
        store = Store(small / "store")
        saved = await save(store)
        os.utime(store.root / "lab" / RAM)
        make_read_only(small)
        assert await store.check_quick("lab", "s1") == saved
        with pytest.raises(HostError, match="Read-only file system\n  The file system is read-only"):
            await store.begin("lab", "s2")
        with pytest.raises(HostError, match="Read-only file system"):
            await store.remove("lab", "s1")

    async def test_a_missing_place(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "no/store")
        with pytest.raises(HostError, match="cannot make the directory: No such file"):
            await store.begin("lab", "s1")
        with pytest.raises(HostError, match="there is no store"):
            await store.list()

    async def test_a_new_place_is_empty(self, store: Store) -> None:
        assert await store.list() == ()
        assert await store.list("lab") == ()

    async def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        write(tmp_path / "store", b"")
        with pytest.raises(HostError, match="cannot make the directory: File exists"):
            await Store(tmp_path / "store").begin("lab", "s1")

    async def test_what_else_lies_in_a_store_is_left_out(self, store: Store) -> None:
        saved = await save(store)
        (store.root / "lost+found").mkdir()
        (store.root / "empty").mkdir()
        write(store.root / "readme", b"")
        assert await store.list() == (saved,)
