"""Manifests: what is written is read back, and whatever was altered or is not right is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve
from hypothesis import example, given
from hypothesis import strategies as st

from qsnap.errors import IntegrityError
from qsnap.model import RamBlockFile, Snapshot, StoredFile
from qsnap.rules.manifest import (
    encode_manifest,
    files_in,
    garbage,
    is_name,
    parse_manifest,
    path_fault,
)
from tests.samples import contents, snapshot, snapshots, stored

SAMPLE = encode_manifest(snapshot())


def parse(data: bytes) -> Snapshot:
    return parse_manifest(data, file="s1/manifest.json")


def fault(data: bytes) -> str:
    with pytest.raises(IntegrityError) as caught:
        parse(data)
    assert caught.value.file == "s1/manifest.json"
    assert caught.value.advice
    return caught.value.message


def forged(change: Callable[[Any], None]) -> bytes:
    """The sample with its body changed, and its digest made right again."""
    document = json.loads(SAMPLE)
    change(document["snapshot"])
    return resealed(json.dumps({**document, "sha256": "0" * 64}).encode())


def resealed(blank: bytes) -> bytes:
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


@given(snapshots())
def test_a_snapshot_is_read_back(saved: Snapshot) -> None:
    assert parse(encode_manifest(saved)) == saved


def test_a_manifest_from_before_some_keys_is_read() -> None:
    def change(body: Any) -> None:
        del body["vms"][0]["measurements"]["start_instant_s"]
        for vm in [*body["vne"]["vms"], *(saved["vm"] for saved in body["vms"])]:
            del vm["numa"], vm["dimms"], vm["saved_on"]
        for saved in body["vms"]:
            del saved["kept_on"]

    vm = parse(forged(change)).vms[0]
    assert (vm.measurements.start_instant_s, vm.vm.numa, vm.vm.dimms) == (0.0, (), ())
    assert (vm.vm.saved_on, vm.kept_on) == ("", "")


def test_a_part_needs_the_files_of_its_host() -> None:
    saved = snapshot()
    vms = tuple(evolve(vm, vm=evolve(vm.vm, host="a"), kept_on="b") for vm in saved.vms)
    files = {here: files_in(evolve(saved, vms=vms, vne=evolve(saved.vne, here=here))) for here in ("a", "b", "")}
    assert {file.path.partition("/")[0] for file in files["a"]} == {"disks"}
    assert {file.path.partition("/")[0] for file in files["b"]} == {"snapshots"}
    assert set(files["a"]) | set(files["b"]) == set(files[""]) == set(files_in(saved))


def test_it_is_readable_and_checked_with_common_tools() -> None:
    document = json.loads(SAMPLE)
    assert document["format"] == "qsnap-1"
    assert document["snapshot"]["cut"] == "colour"
    assert document["snapshot"]["vms"][0]["engine"] == "background"
    assert b'\n  "name": "s1",\n' in SAMPLE
    assert resealed(SAMPLE.replace(document["sha256"].encode(), b"0" * 64)) == SAMPLE


@given(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255))
@example(0, 1)
@example(len(SAMPLE) - 1, 1)
def test_any_altered_byte_is_noticed(position: int, difference: int) -> None:
    altered = bytearray(SAMPLE)
    altered[position] ^= difference
    fault(bytes(altered))


@given(st.integers(0, len(SAMPLE) - 1))
def test_any_truncation_is_noticed(length: int) -> None:
    fault(SAMPLE[:length])


@given(st.binary() | st.text().map(str.encode))
@example(b"[" * 100_000)
@example(b"null")
@example(b'{"format": ' + b"9" * 5000 + b"}")
def test_garbage_is_refused(data: bytes) -> None:
    fault(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.integers(0, 12), max_size=8), JSON)
def test_a_forged_manifest_is_read_or_refused(route: list[int], replacement: object) -> None:
    """Whatever is put in place of a part of it: nothing but IntegrityError comes out, or a Snapshot."""

    def change(body: Any) -> None:
        at = body
        for step in route:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            key = keys[step % len(keys)]
            if isinstance(at[key], dict | list) and at[key]:
                at = at[key]
        keys = list(at) if isinstance(at, dict) else range(len(at))
        at[keys[sum(route) % len(keys)]] = replacement

    try:
        again = parse(forged(change))
    except IntegrityError:
        return
    assert encode_manifest(again)


def test_a_later_format_is_refused_with_advice() -> None:
    with pytest.raises(IntegrityError, match="unknown manifest format 'qsnap-2'") as caught:
        parse(resealed(SAMPLE.replace(b"qsnap-1", b"qsnap-2")))
    assert "version of qsnap" in caught.value.advice


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "disks/../../x",
        "disks/./x",
        "disks//x",
        "disks",
        "disks/",
        "",
        "x",
        "manifest.json",
        "disks/a\0b",
        "disks/a\nb",
        "disks/\ud800",
    ],
)
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    assert path_fault(path)

    def change(body: Any) -> None:
        body["vms"][0]["device_stream"]["path"] = path

    assert "the path" in fault(forged(change))


def test_plain_paths_are_accepted() -> None:
    assert not path_fault("disks/alice-0.qcow2")
    assert not path_fault("snapshots/s1/alice/0000:00:02.0%2fvga.vram.ram")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (["name"], "../s1", "is not a name"),
        (["vne", "name"], "", "is not a name"),
        (["vne", "vms"], [], "not the VMs of the VNE"),
        (["vms"], [], "not the VMs of the VNE"),
        (["cut"], 0, "not a snapshot"),
        (["cut"], "color", "not a snapshot"),
        (["created_s"], "1", "expected float @ snapshot.created_s"),
        (["created_s"], True, "expected float @ snapshot.created_s"),
        (["created_s"], -1.0, "at no time"),
        (["created_s"], 1e300, "at no time"),
        (["comment"], "x", "comment"),
        (["vms", 0, "was_running"], 1, "expected bool @ snapshot.vms[0].was_running"),
        (["vms", 0, "qemu_version"], [7, 2], "not a snapshot"),
        (["vms", 0, "vm", "vcpus"], 1.0, "expected int @ snapshot.vms[0].vm.vcpus"),
        (["vms", 0, "device_stream", "size_bytes"], -1, "size or digest"),
        (["vms", 0, "device_stream", "sha256"], "0" * 63 + "G", "size or digest"),
        (["vms", 0, "ram", 0, "used_length"], 1 << 40, "shorter than the RAMBlock"),
        (["vms", 0, "ram"], [], "the RAM of VM 'alice' is missing"),
    ],
)
def test_what_cannot_be_is_refused_though_its_digest_is_right(place: list[Any], value: object, words: str) -> None:
    def change(body: Any) -> None:
        for step in place[:-1]:
            body = body[step]
        body[place[-1]] = value

    assert words in fault(forged(change))


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"cut": "colour"', b'"cut": "colour", "cut": "colour"'), (b"1700000000.5", b"NaN"), (b"0.25", b"1e999")],
)
def test_json_that_readers_disagree_about_is_refused(old: bytes, new: bytes) -> None:
    blank = SAMPLE.replace(json.loads(SAMPLE)["sha256"].encode(), b"0" * 64)
    assert old in blank
    assert "not a manifest" in fault(resealed(blank.replace(old, new, 1)))


def test_keys_outside_the_body_are_refused() -> None:
    blank = SAMPLE.replace(json.loads(SAMPLE)["sha256"].encode(), b"0" * 64)
    assert "altered" in fault(resealed(blank.replace(b"{", b'{"x": 1,', 1)))


class TestFiles:
    def test_all_kinds_are_listed_in_order(self) -> None:
        assert [file.path for file in files_in(snapshot())] == list(contents())

    def test_what_two_vms_share_is_listed_once(self) -> None:
        one = snapshot()
        twin = evolve(one.vms[0], vm=evolve(one.vms[0].vm, name="bob"))
        assert files_in(evolve(one, vms=(*one.vms, twin))) == files_in(one)

    @given(snapshots())
    def test_none_is_left_out(self, saved: Snapshot) -> None:
        def inside(value: object) -> set[StoredFile]:
            if isinstance(value, StoredFile):
                return {value}
            if isinstance(value, tuple):
                return set().union(*map(inside, value))
            names = getattr(type(value), "__attrs_attrs__", ())
            return set().union(*(inside(getattr(value, name.name)) for name in names))

        assert set(files_in(saved)) == inside(saved)


class TestGarbage:
    OWN = ("snapshots/s1/manifest.json", "snapshots/s1/seals.json")

    def test_what_a_snapshot_needs_stays(self) -> None:
        assert garbage([snapshot()], [*self.OWN, *contents()], []) == ()

    def test_without_its_manifest_all_of_it_goes(self) -> None:
        present = [*self.OWN, *contents()]
        assert garbage([], present, []) == tuple(sorted(present))

    def test_files_and_directories_in_use_stay(self) -> None:
        present = ["disks/a", "disks/ab", "snapshots/s2/alice/x", "snapshots/s20/x"]
        assert garbage([], present, ["disks/a", "snapshots/s2"]) == ("disks/ab", "snapshots/s20/x")

    def test_a_layer_goes_with_the_last_snapshot_that_needs_it(self) -> None:
        first, second = snapshot("s1"), snapshot("s2")
        assert garbage([first, second], ["disks/alice-0.qcow2"], []) == ()
        assert garbage([second], ["disks/alice-0.qcow2"], []) == ()
        assert garbage([], ["disks/alice-0.qcow2"], []) == ("disks/alice-0.qcow2",)

    def test_leftovers_of_a_write_go(self) -> None:
        leftover = "snapshots/s1/manifest.json.tmp"
        assert garbage([snapshot()], [leftover], []) == (leftover,)

    @given(st.sets(st.sampled_from("abcdef")), st.sets(st.sampled_from("abcdef")), st.sampled_from("abcdef"))
    def test_nothing_needed_is_ever_garbage(self, present: set[str], in_use: set[str], layer: str) -> None:
        paths = {f"disks/{each}" for each in present}
        waste = garbage([snapshot(layer=f"disks/{layer}")], paths, {f"disks/{each}" for each in in_use})
        assert set(waste) == {f"disks/{each}" for each in present - in_use - {layer}}


@pytest.mark.parametrize("name", ["", "-a", ".", "..", ".a", "A", "a/b", "a\n", "a" * 65, "ä", "\u0665"])
def test_what_is_no_name(name: str) -> None:
    assert not is_name(name)
    assert is_name("a-0.b_" + "c" * 58)


def test_a_ram_file_may_be_longer_than_its_block() -> None:
    one = snapshot()
    block = RamBlockFile("pc.ram", 10, stored("snapshots/s1/alice/x", b"eleven bytes"))
    longer = evolve(one, vms=(evolve(one.vms[0], ram=(block,)),))
    assert parse(encode_manifest(longer)) == longer
