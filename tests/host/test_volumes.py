"""Logical volumes: which layers lie on one, and what is none. LVM itself is in the test bed's machines."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qsnap.errors import HostError
from qsnap.host.volumes import name_volume, remove_volume, thin_group, volume_below


def make_layer(path: Path, base: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", "raw", path, "1M"], check=True)
    return path


@pytest.mark.parametrize("group", ["vg0", "my-group", "a.b_c+d"])
def test_a_layer_names_its_volume(tmp_path: Path, group: str) -> None:
    path = tmp_path / "vm-1-disk0-0123456789ab.qcow2"
    volume = name_volume(group, str(path))
    assert volume == f"/dev/{group}/qsnap-0123456789ab"
    assert volume_below(make_layer(path, volume)) == volume


@pytest.mark.parametrize(
    "base",
    [
        "/dev/vg0/qsnap-ba9876543210",
        "/dev/vg0/root",
        "/dev/vg0/../vg1/qsnap-0123456789ab",
        "/dev/vg0/qsnap-0123456789abc",
        "/srv/qsnap-0123456789ab",
    ],
)
def test_no_other_volume_goes_with_a_layer(tmp_path: Path, base: str) -> None:
    assert volume_below(make_layer(tmp_path / "vm1-disk0-0123456789ab.qcow2", base)) == ""


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"QFI\xfb" + bytes(100), b"QFI\xfb" + b"\xff" * 100, bytes(4096)])
def test_what_is_no_image_lies_on_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vm1-disk0-0123456789ab.qcow2"
    path.write_bytes(content)
    assert volume_below(path) == ""
    assert volume_below(tmp_path / "missing") == ""


def test_a_file_is_no_volume(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    with pytest.raises(HostError, match="no block device"):
        thin_group(str(path))
    remove_volume(str(tmp_path / "missing"))  # it is gone already
