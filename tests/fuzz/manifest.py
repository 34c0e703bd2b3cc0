"""Manifests: a snapshot that is encoded to the same again, or IntegrityError."""

from __future__ import annotations

import hashlib

from qsnap.errors import IntegrityError
from qsnap.rules.manifest import encode_manifest, parse_manifest

ZEROS = b"0" * 64


def check(data: bytes) -> None:
    digest = hashlib.sha256(data).hexdigest().encode()
    for manifest in (data, data.replace(ZEROS, digest, 1)):
        try:
            snapshot = parse_manifest(manifest, file="manifest.json")
        except IntegrityError:
            continue
        assert parse_manifest(encode_manifest(snapshot), file="again") == snapshot
