"""Logical volumes of LVM that keep disks: a snapshot of a thin volume takes no room, and shares its data (lvmthin(7)).

Each is made for a layer in the store, which names it as what it lies on, and has a part of its name in common with it.
So a layer tells which volume goes when it goes.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
import subprocess
from pathlib import Path

from qsnap.errors import HostError
from qsnap.host.births import starting

_HEADER = struct.Struct(">4sIQI")  #: of qcow2 images: magic, version, where the base's name is, its length
_MAGIC = b"QFI\xfb"
_NAME_LIMIT = 1023
_BUSY = "Is it mounted, or in use by a program?"


def thin_group(path: str) -> str:
    """The volume group of a thin volume. Raises HostError that says what else it is."""
    status = os.stat(path)
    if not stat.S_ISBLK(status.st_mode):
        raise HostError("it is no block device", where=path)
    number = f"lv_kernel_major={os.major(status.st_rdev)} && lv_kernel_minor={os.minor(status.st_rdev)}"
    told = _run("lvs", "--reportformat", "json", "-o", "vg_name,segtype", "-S", number, where=path)
    for volume in json.loads(told)["report"][0]["lv"]:
        if volume["segtype"] == "thin":
            return str(volume["vg_name"])
        raise HostError(f"it is a logical volume, but a {volume['segtype']} one, not a thin one", where=path)
    raise HostError("it is no logical volume", where=path)


def name_volume(group: str, layer: str) -> str:
    """The path of the volume that goes with a layer."""
    return f"/dev/{group}/qsnap-{_mark(layer)}"


def _mark(layer: str) -> str:
    return Path(layer).stem.rpartition("-")[2]


def snapshot_volume(origin: str, volume: str, layer: str) -> None:
    """Make `volume`, which stays what the thin volume `origin` is now, for a layer. Raises HostError if LVM refuses."""
    device = os.stat(origin).st_rdev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/dm/name").read_text().strip()
    options = ("--permission", "r", "--setactivationskip", "n", "--ignoremonitoring")
    command = ("lvcreate", "-q", "--snapshot", *options, "--name", Path(volume).name, f"/dev/mapper/{name}")
    with starting(os.path.dirname(layer)) as fd:
        _run(*command, where=origin, inherited=(fd,))


def volume_below(layer: Path) -> str:
    """The volume that goes with a layer, by path, or nothing if that lies on none."""
    try:
        with layer.open("rb") as image:
            magic, _, offset, length = _HEADER.unpack(image.read(_HEADER.size))
            if magic != _MAGIC or not 0 < length <= _NAME_LIMIT:
                return ""
            image.seek(offset)
            name = image.read(length).decode(errors="replace")
    except (OSError, struct.error):
        return ""
    mark = re.escape(_mark(layer.name))
    return name if re.fullmatch(rf"/dev/[\w.+-]+/qsnap-{mark}", name) else ""


def remove_volume(volume: str) -> None:
    """Remove a volume, if it is there. Raises HostError if LVM refuses."""
    if os.path.exists(volume):
        _run("lvremove", "-q", "-y", volume.removeprefix("/dev/"), where=volume, advice=_BUSY)


def _run(*command: str, where: str, advice: str = "", inherited: tuple[int, ...] = ()) -> str:
    quiet = {**os.environ, "LVM_SUPPRESS_FD_WARNINGS": "1"}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=quiet,
            pass_fds=inherited,
            check=False,
        )
    except FileNotFoundError as error:
        raise HostError(f"there is no {command[0]} here", where=where, advice="Install LVM: lvm2.") from error
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise HostError(f"{command[0]}: {said}", where=where, advice=advice)
    return done.stdout
