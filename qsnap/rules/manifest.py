"""The manifest: the one file that makes a snapshot of the files around it.

A manifest is JSON for people to read. Its `sha256` is the digest of the manifest file itself, taken with 64
zeros in the digest's place: any altered byte is noticed, and another program can check it without sharing our
idea of how JSON is laid out. Files are named relative to the VNE's directory; `docs/format.md` has it all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from qsnap.errors import IntegrityError, StateError
from qsnap.model import Engine, Snapshot, StoredFile, VMSnapshot
from qsnap.wire.strict import make_converter, parse_object, structure

FORMAT = "qsnap-1"
MANIFEST = "manifest.json"
SEALS = "seals.json"
DIRECTORIES = ("boot", "disks", "snapshots")  #: of a VNE, that hold files of snapshots

END_OF_TIME_S = 2**37  #: the year 6325: what calendars and clocks can show

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ZEROS = "0" * 64
_UNUSABLE = "Put back a copy of it, or remove the snapshot."
_converter = make_converter()


def is_name(text: str) -> bool:
    """Whether `text` can name a VNE, a snapshot or a VM in a store."""
    return _NAME.fullmatch(text) is not None


def check_names(*names: str) -> None:
    """Raise StateError for the first that cannot name a VNE, a snapshot or a VM: no other may be part of a path."""
    for name in names:
        if not is_name(name):
            advice = (
                "VNEs and VMs have names of 1 to 32 of a-z, 0-9 and '-', snapshots of 1 to 64 of these, '.' and '_'; "
                "they start with a letter or a digit."
            )
            raise StateError(f"{name[:80]!r} is not a name", advice=advice)


def snapshot_dir(snapshot: str) -> str:
    """The directory of a snapshot, relative to its VNE's."""
    return f"snapshots/{snapshot}"


def encode_manifest(snapshot: Snapshot) -> bytes:
    """The manifest of `snapshot`, self-digest included."""
    document = {"format": FORMAT, "sha256": _ZEROS, "snapshot": _converter.unstructure(snapshot)}
    blank = json.dumps(document, indent=1, allow_nan=False).encode() + b"\n"
    return blank.replace(_ZEROS.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def parse_manifest(data: bytes, *, file: str) -> Snapshot:
    """The snapshot that the manifest `data` records. `file` is its name for messages.

    Raises:
        IntegrityError: it is of another format, altered, or does not record a complete snapshot with all of
            its files inside the VNE's directory.
    """
    document = _parse_json(data, file)
    found = document.get("format")
    if found != FORMAT:
        shown = repr(found[:40]) if isinstance(found, str) else "(none)"
        advice = f"This qsnap reads {FORMAT}. Take the version of qsnap that wrote it."
        raise IntegrityError(f"unknown manifest format {shown}", file=file, advice=advice)
    _check_self_digest(document, data, file)
    try:
        snapshot = structure(_converter, document.get("snapshot"), Snapshot, path="snapshot")
    except ValueError as error:
        raise IntegrityError(f"not a snapshot: {error}", file=file, advice=_UNUSABLE) from None
    for fault in _faults(snapshot):
        raise IntegrityError(fault, file=file, advice=_UNUSABLE)
    return snapshot


def files_in(snapshot: Snapshot) -> tuple[StoredFile, ...]:
    """Every file that `snapshot` needs, once each: RAM, device streams, disks, kernel. Of a part, those of its host."""
    return tuple(dict.fromkeys(file for vm in snapshot.vms for file in files_of(vm, snapshot.vne.here)))


def files_of(vm: VMSnapshot, here: str = "") -> tuple[StoredFile, ...]:
    """The same of one of its VMs: all, or those that the host `here` has."""
    state = (*(block.file for block in vm.ram), vm.device_stream) if vm.has_state(here) else ()
    if not vm.has_disks(here):
        return state
    return (*state, *(file for disk in vm.disks for file in disk.layers), *(each.file for each in vm.boot))


def garbage(snapshots: Iterable[Snapshot], present: Iterable[str], in_use: Iterable[str]) -> tuple[str, ...]:
    """Those of the files `present` in a VNE's directory that nothing refers to, sorted.

    `snapshots` are all the committed ones of that VNE. `in_use` are files, and directories with all in
    them, that a running VM or a snapshot in the making needs: for a disk, every layer of the chain. All paths
    are relative to the VNE's directory.
    """
    kept = set(in_use)
    for snapshot in snapshots:
        own = snapshot_dir(snapshot.name)
        kept |= {f"{own}/{MANIFEST}", f"{own}/{SEALS}", *(file.path for file in files_in(snapshot))}
    return tuple(sorted(path for path in set(present) if kept.isdisjoint(_and_parents(path))))


def path_fault(path: str) -> str:
    """Why `path` cannot be the path of a stored file, or an empty string if it can."""
    parts = path.split("/")
    if len(parts) < 2 or parts[0] not in DIRECTORIES:
        return f"the path {path[:200]!r} is in none of {', '.join(f'{name}/' for name in DIRECTORIES)}"
    if not path.isprintable() or {"", ".", ".."} & set(parts):
        return f"the path {path[:200]!r} is not a plain relative one"
    return ""


def _and_parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _parse_json(data: bytes, file: str) -> dict[str, Any]:
    try:
        return parse_object(data)
    except ValueError as error:
        message = f"not a manifest: {str(error)[:200]}"
        raise IntegrityError(message, file=file, advice=_UNUSABLE) from None


def _check_self_digest(document: dict[str, Any], data: bytes, file: str) -> None:
    digest = document.get("sha256")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise IntegrityError("the manifest has no digest of itself", file=file, advice=_UNUSABLE)
    blank = data.replace(digest.encode(), _ZEROS.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != digest or document.keys() != {"format", "sha256", "snapshot"}:
        raise IntegrityError("the manifest was altered: its digest is wrong", file=file, advice=_UNUSABLE)


def _faults(snapshot: Snapshot) -> Iterable[str]:
    """What keeps a well-formed manifest from recording a complete snapshot."""
    names = [vm.vm.name for vm in snapshot.vms]
    for name in (snapshot.name, snapshot.vne.name, *names):
        if not is_name(name):
            yield f"{name[:80]!r} is not a name"
    if sorted(names) != sorted(vm.name for vm in snapshot.vne.vms) or len(set(names)) < len(names):
        yield "the VMs saved are not the VMs of the VNE"
    if not 0 <= snapshot.created_s < END_OF_TIME_S:
        yield "it was created at no time that can be"
    for file in (file for vm in snapshot.vms for file in files_of(vm)):
        fault = path_fault(file.path)
        if fault:
            yield fault
        if file.size_bytes < 0 or not _DIGEST.fullmatch(file.sha256):
            yield f"size or digest of {file.path} cannot be right"
    for vm in snapshot.vms:
        if vm.recorded and vm.engine is not Engine.RECORD:
            yield f"the RAM of VM {vm.vm.name[:80]!r} is missing"
        for block in vm.ram:
            if block.file.size_bytes < block.used_length:
                yield f"{block.file.path} is shorter than the RAMBlock {block.idstr[:80]!r}"
