"""The store, on real files: saving snapshots, and checking them by seal and by digest."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from attrs import evolve

from qsnap.errors import HostError, IntegrityError, StateError
from qsnap.host.store import Store
from qsnap.host.store import seals as seals_module
from qsnap.rules.manifest import files_in
from tests.host.storing import LAYER, MANIFEST, RAM, SEALS, STREAM, alter, save, save_into, write
from tests.samples import contents, snapshot


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that were hashed since the list was last cleared."""
    sizes: list[int] = []
    digest = seals_module._digest

    def counted(fd: int, size_bytes: int, report: Callable[[int], None]) -> str:
        sizes.append(size_bytes)
        return digest(fd, size_bytes, report)

    monkeypatch.setattr(seals_module, "_digest", counted)
    return sizes


class TestSaving:
    async def test_a_committed_snapshot_is_listed_loaded_and_sound(self, store: Store) -> None:
        saved = await save(store)
        assert await store.names() == (("lab", "s1"),)
        assert await store.list() == await store.list("lab") == (saved,)
        assert await store.load("lab", "s1") == saved
        assert await store.check_quick("lab", "s1") == saved
        assert await store.verify("lab", "s1") == saved

    async def test_layers_have_a_private_directory(self, store: Store, home: Path) -> None:
        for _ in range(2):
            assert await store.layers_directory("lab") == home / "disks"
            assert {path.stat().st_mode & 0o777 for path in (store.root, home, home / "disks")} == {0o700}

    async def test_a_seal_has_size_and_digest(self, store: Store, home: Path) -> None:
        write(home / LAYER, b"content")
        sealed = await store.seal_file("lab", LAYER)
        assert (sealed.path, sealed.size_bytes) == (LAYER, 7)
        assert sealed.sha256 == hashlib.sha256(b"content").hexdigest()

    async def test_a_file_of_somebody_elses_is_kept_once(self, store: Store, home: Path, tmp_path: Path) -> None:
        kernel = tmp_path / "vmlinuz"
        kernel.write_bytes(b"kernel")
        kept = await store.keep_file("lab", str(kernel))
        assert kept.path == f"boot/{kept.sha256[:12]}"
        assert kept.sha256 == hashlib.sha256(b"kernel").hexdigest()
        shutil.copy(kernel, tmp_path / "again")
        assert await store.keep_file("lab", str(tmp_path / "again")) == kept
        kernel.write_bytes(b"another")
        assert (await store.keep_file("lab", str(kernel))).path != kept.path
        (home / kept.path).write_bytes(b"altered")
        assert await store.keep_file("lab", str(tmp_path / "again")) == kept
        assert (home / kept.path).read_bytes() == b"kernel"
        with pytest.raises(HostError, match="cannot read the file"):
            await store.keep_file("lab", str(tmp_path / "nowhere"))

    async def test_modes_whatever_the_umask(self, store: Store, home: Path) -> None:
        before = os.umask(0o277)
        try:
            await store.begin("lab", "s1")
        finally:
            os.umask(before)
        (home / "snapshots/s1/alice").mkdir(mode=0o755)
        await save_into(store, home)
        modes = {path: path.stat().st_mode & 0o777 for path in [store.root, *store.root.rglob("*")]}
        assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
        assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}

    async def test_snapshots_are_listed_oldest_first(self, store: Store) -> None:
        late = await save(store, "a")
        await store.remove("lab", "a")
        early = await save(store, "b")
        await store.begin("lab", "a")
        for path, content in contents("a").items():
            write(store.root / "lab" / path, content)
        late = evolve(late, created_s=early.created_s + 1)
        await store.commit(late)
        assert await store.list("lab") == (early, late)
        assert await store.names() == (("lab", "a"), ("lab", "b"))

    async def test_a_name_is_taken_once(self, store: Store) -> None:
        saved = await save(store)
        with pytest.raises(StateError, match="there is a snapshot s1"):
            await store.begin("lab", "s1")
        with pytest.raises(StateError, match="there is a snapshot s1"):
            await store.commit(saved)
        assert await store.load("lab", "s1") == saved

    async def test_a_leftover_is_replaced(self, store: Store) -> None:
        directory = await store.begin("lab", "s1")
        write(directory / "alice/pc.ram.ram", b"half of it")
        assert list((await store.begin("lab", "s1")).iterdir()) == []

    @pytest.mark.parametrize("path", [RAM, STREAM, LAYER])
    async def test_what_lacks_a_file_is_not_committed(self, store: Store, home: Path, path: str) -> None:
        await store.begin("lab", "s1")
        for other, content in contents().items():
            write(home / other, content)
        (home / path).unlink()
        with pytest.raises(IntegrityError, match="missing") as caught:
            await store.commit(snapshot())
        assert caught.value.file == str(home / path)
        assert await store.names() == ()

    async def test_what_could_not_be_read_back_is_not_committed(self, store: Store) -> None:
        await store.begin("lab", "s1")
        with pytest.raises(IntegrityError, match="not the VMs"):
            await store.commit(evolve(snapshot(), vms=()))
        assert await store.names() == ()

    async def test_what_changed_since_it_was_sealed_is_not_committed(self, store: Store, home: Path) -> None:
        await store.begin("lab", "s1")
        for path, content in contents().items():
            write(home / path, content)
            await store.seal_file("lab", path)
        alter(home / RAM)
        with pytest.raises(IntegrityError, match="altered"):
            await store.commit(snapshot())

    @pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "A", ".a", "a" * 65])
    async def test_names_that_are_none(self, store: Store, name: str) -> None:
        for call in (store.begin, store.load, store.check_quick, store.verify, store.remove):
            with pytest.raises(StateError, match="is not a name"):
                await call(name, "s1")
            with pytest.raises(StateError, match="is not a name"):
                await call("lab", name)
        with pytest.raises(StateError, match="is not a name"):
            await store.collect(name)
        assert not store.root.exists()

    async def test_unknown_names_bring_the_nearest(self, store: Store) -> None:
        with pytest.raises(StateError, match="lab has no snapshots\n  The store is empty"):
            await store.load("lab", "s1")
        await save(store, "before-upgrade")
        with pytest.raises(StateError, match=r"lab has no snapshot .*\n  Did you mean before-upgrade\?"):
            await store.load("lab", "before-upgrad")
        with pytest.raises(StateError, match=r"labb has no snapshots\n  Did you mean lab\?"):
            await store.load("labb", "s1")


class TestChecking:
    async def test_unbroken_seals_spare_the_hashing(self, store: Store, hashed: list[int]) -> None:
        await save(store)
        assert len(hashed) == 3
        hashed.clear()
        await Store(store.root).check_quick("lab", "s1")
        assert hashed == []
        await store.verify("lab", "s1")
        assert len(hashed) == 3

    async def test_another_store_object_commits_as_well(self, store: Store, hashed: list[int]) -> None:
        await store.begin("lab", "s1")
        for path, content in contents().items():
            write(store.root / "lab" / path, content)
        await Store(store.root).commit(snapshot())
        hashed.clear()
        await store.check_quick("lab", "s1")
        assert hashed == []

    async def test_a_layer_of_an_older_snapshot_is_not_hashed_again(self, store: Store, hashed: list[int]) -> None:
        await save(store)
        await store.begin("lab", "s2")
        for path, content in contents("s2").items():
            if path != LAYER:
                write(store.root / "lab" / path, content)
                await store.seal_file("lab", path)
        hashed.clear()
        await store.commit(snapshot("s2"))
        await store.check_quick("lab", "s2")
        assert hashed == []

    @pytest.mark.parametrize("path", [RAM, STREAM, LAYER])
    @pytest.mark.parametrize("check", ["check_quick", "verify"])
    async def test_an_altered_byte_is_found(self, store: Store, home: Path, path: str, check: str) -> None:
        await save(store)
        alter(home / path)
        with pytest.raises(IntegrityError, match="altered") as caught:
            await getattr(store, check)("lab", "s1")
        assert caught.value.file == str(home / path)

    async def test_a_byte_altered_right_after_the_commit_is_found(self, store: Store, home: Path) -> None:
        """Within one tick of the kernel's clock, as far as that can be brought about."""
        for number in range(20):
            name = f"s{number}"
            await save(store, name)
            alter(home / f"snapshots/{name}/alice/device.stream")
            with pytest.raises(IntegrityError, match="altered"):
                await store.check_quick("lab", name)

    async def test_a_byte_put_back_is_sound_again(self, store: Store, home: Path, hashed: list[int]) -> None:
        await save(store)
        alter(home / RAM)
        alter(home / RAM)
        hashed.clear()
        await store.check_quick("lab", "s1")
        assert hashed == [(home / RAM).stat().st_size]
        hashed.clear()
        await store.check_quick("lab", "s1")
        assert hashed == []

    async def test_a_copied_store_is_hashed_once(self, store: Store, tmp_path: Path, hashed: list[int]) -> None:
        saved = await save(store)
        shutil.copytree(store.root, tmp_path / "copy")
        copy = Store(tmp_path / "copy")
        hashed.clear()
        assert await copy.check_quick("lab", "s1") == saved
        assert len(hashed) == 3
        await copy.check_quick("lab", "s1")
        assert len(hashed) == 3

    @pytest.mark.parametrize("seals", [b"", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000])
    async def test_seals_that_make_no_sense_cost_time_only(self, store: Store, home: Path, seals: bytes) -> None:
        saved = await save(store)
        (home / SEALS).write_bytes(seals)
        assert await store.check_quick("lab", "s1") == saved
        assert RAM in (home / SEALS).read_text()

    async def test_seals_may_be_lost(self, store: Store, home: Path) -> None:
        await save(store)
        (home / SEALS).unlink()
        alter(home / RAM)
        with pytest.raises(IntegrityError, match="altered"):
            await store.check_quick("lab", "s1")

    @pytest.mark.parametrize("path", [RAM, STREAM, LAYER])
    async def test_a_deleted_file_is_found(self, store: Store, home: Path, path: str) -> None:
        await save(store)
        (home / path).unlink()
        with pytest.raises(IntegrityError, match="missing") as caught:
            await store.check_quick("lab", "s1")
        assert caught.value.file == str(home / path)

    @pytest.mark.parametrize("size", [0, 10, 1 << 20])
    async def test_another_size_is_found(self, store: Store, home: Path, size: int) -> None:
        await save(store)
        os.truncate(home / RAM, size)
        with pytest.raises(IntegrityError, match=f"has {size} bytes instead of"):
            await store.check_quick("lab", "s1")

    async def test_an_altered_manifest_is_found(self, store: Store, home: Path) -> None:
        await save(store)
        alter(home / MANIFEST)
        with pytest.raises(IntegrityError) as caught:
            await store.load("lab", "s1")
        assert caught.value.file == str(home / MANIFEST)
        assert await store.names() == (("lab", "s1"),)

    async def test_a_manifest_in_the_wrong_place_is_found(self, store: Store, home: Path) -> None:
        await save(store)
        (home / "snapshots/s1").rename(home / "snapshots/s2")
        with pytest.raises(IntegrityError, match="is of snapshot s1 of lab"):
            await store.load("lab", "s2")

    async def test_progress_adds_up_and_runs_in_the_trio_thread(self, store: Store) -> None:
        saved = await save(store)
        done: list[int] = []

        def progress(more: int) -> None:
            trio.lowlevel.current_task()
            done.append(more)

        await store.verify("lab", "s1", progress)
        assert sum(done) == sum(file.size_bytes for file in files_in(saved))

    async def test_a_verification_can_be_cancelled(self, store: Store) -> None:
        saved = await save(store)
        done: list[int] = []
        with trio.CancelScope() as scope:

            def progress(more: int) -> None:
                done.append(more)
                scope.cancel()

            await store.verify("lab", "s1", progress)
        assert scope.cancelled_caught
        assert len(done) == 1
        assert await store.check_quick("lab", "s1") == saved


class TestHashing:
    @pytest.mark.parametrize(
        ("size", "pieces"),
        [
            (0, {}),
            (1, {}),
            (9 << 20, {}),
            (9 << 20, {0: b"first"}),
            (9 << 20, {(9 << 20) - 4: b"last"}),
            ((9 << 20) + 1, {4096: b"a" * 4096, 5 << 20: b"b" * 70000}),
            (5 << 20, {0: b"c" * (5 << 20)}),
        ],
    )
    async def test_holes_count_as_zeros(self, store: Store, home: Path, size: int, pieces: dict[int, bytes]) -> None:
        write(home / LAYER, b"")
        with (home / LAYER).open("r+b") as stream:
            stream.truncate(size)
            for offset, content in pieces.items():
                stream.seek(offset)
                stream.write(content)
        sealed = await store.seal_file("lab", LAYER)
        assert sealed.size_bytes == size
        assert sealed.sha256 == hashlib.sha256((home / LAYER).read_bytes()).hexdigest()

    @pytest.mark.parametrize("change", [lambda path: os.truncate(path, 5 << 20), alter])
    async def test_a_file_that_changes_meanwhile_is_refused(
        self, store: Store, home: Path, change: Callable[[Path], None]
    ) -> None:
        write(home / LAYER, b"x" * (20 << 20))
        once = iter([home / LAYER])

        def progress(_: int) -> None:
            for path in once:
                change(path)

        with pytest.raises(IntegrityError, match="changed while it was read"):
            await store.seal_file("lab", LAYER, progress)
