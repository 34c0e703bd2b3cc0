"""Image files, by the real qemu-img."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsnap.errors import HostError
from qsnap.host.disks import create_overlay


@pytest.mark.parametrize(
    ("content", "advice"),
    [(bytes(1 << 16), "is it `raw`"), (None, "in order"), (b"QFI\xfb" + bytes(1 << 16), "in order")],
    ids=["raw", "missing", "damaged"],
)
async def test_an_image_that_no_layer_can_lie_on(content: bytes | None, advice: str, tmp_path: Path) -> None:
    base, layer = tmp_path / "base.img", tmp_path / "layer.qcow2"
    if content is not None:
        base.write_bytes(content)
    with pytest.raises(HostError, match="cannot make a disk layer") as caught:
        await create_overlay("qemu-img", str(layer), base=str(base), base_format="qcow2")
    assert advice in caught.value.advice
    assert str(base) in caught.value.advice
    assert not layer.exists()
