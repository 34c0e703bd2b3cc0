"""What qsnap relies on in QEMU's answers and events. The rest of them is ignored.

Written as in QEMU's schema (qapi/*.json): a name with `*` before it is of a member that may be missing. A guest that
has taken over its QEMU may answer with anything.
"""

from __future__ import annotations

from collections.abc import Mapping

Shape = type | range | list["Shape"] | dict[str, "Shape"]

NATURAL = range(1 << 64)
POSITIVE = range(1, 1 << 64)
EVENT: Shape = {
    "event": str,
    "*data": dict,
    "timestamp": {"seconds": range(-1, 1 << 40), "microseconds": range(-1, 1_000_000)},  # -1: no time to be had
}
EVENT_DATA: Mapping[str, Shape] = {
    "MIGRATION": {"status": str},
}
_RAM: Shape = {
    "dirty-sync-count": NATURAL,
    "page-size": POSITIVE,
    "*normal-bytes": NATURAL,
    "*downtime-bytes": NATURAL,
}
_IMAGE: dict[str, Shape] = {"filename": str, "format": str, "virtual-size": NATURAL}
_IMAGE["*backing-image"] = _IMAGE
_JOB: Shape = {"id": str, "status": str, "current-progress": NATURAL, "total-progress": NATURAL, "*error": str}
ANSWERS: Mapping[str, Shape] = {
    "human-monitor-command": str,
    "qom-list": [{"name": str, "type": str}],
    "query-block": [{"*device": str, "*qdev": str, "*inserted": {"node-name": str, "image": _IMAGE}}],
    "query-cpus-fast": [dict],
    "query-jobs": [_JOB],
    "query-kvm": {"enabled": bool},
    "query-memdev": [{"id": str, "size": NATURAL}],
    "query-memory-size-summary": {"base-memory": NATURAL, "*plugged-memory": NATURAL},
    "query-migrate": {"*status": str, "*error-desc": str, "*blocked-reasons": [str], "*ram": _RAM},
    "query-migrate-capabilities": [{"capability": str, "state": bool}],
    "query-migrate-parameters": {"max-bandwidth": NATURAL, "downtime-limit": NATURAL},
    "query-named-block-nodes": [{"node-name": str, "file": str, "backing_file_depth": NATURAL}],
    "query-status": {"status": str},
    "query-version": {"qemu": {"major": NATURAL, "minor": NATURAL, "micro": NATURAL}},
}


def matches(value: object, shape: Shape) -> bool:
    """Whether a JSON value has what `shape` names."""
    match shape:
        case dict():
            return isinstance(value, dict) and all(_member_matches(value, name, shape[name]) for name in shape)
        case list():
            return isinstance(value, list) and all(matches(item, shape[0]) for item in value)
        case range():
            return isinstance(value, int) and value in shape
    return isinstance(value, shape)


def _member_matches(value: dict[str, object], name: str, shape: Shape) -> bool:
    member = name.removeprefix("*")
    return matches(value[member], shape) if member in value else name != member


def event_matches(message: Mapping[str, object]) -> bool:
    """Whether an event is one that can be worked with."""
    message = dict(message)
    return matches(message, EVENT) and matches(message.get("data", {}), EVENT_DATA.get(str(message["event"]), dict))
