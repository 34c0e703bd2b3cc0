"""The examples of docs/examples on real VMs, and the description of the demonstration."""

from __future__ import annotations

import runpy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import qsnap
from testbed.guests import kernel_append

ROOT = Path(__file__).resolve().parents[1]
GUEST = ROOT / "build/guest"
LAB = f"""
name = "demo-example"

[network.lan]

[defaults]
memory = "96M"
network = "lan"
qemu = "{ROOT}/build/qemu-11.1/bin/qemu-system-x86_64"
kernel = "{GUEST}/vmlinuz"
initrd = "{GUEST}/initrd"

[vm.alice]
[vm.bob]
"""


def example(name: str) -> dict[str, Any]:
    """What an example defines; nothing of it is run yet."""
    return runpy.run_path(str(ROOT / "docs/examples" / f"{name}.py"))


@pytest.fixture
def place() -> Iterator[qsnap.Place]:
    with tempfile.TemporaryDirectory(prefix="qsnap-", dir="/var/tmp") as root:
        yield qsnap.Place(f"{root}/run", f"{root}/store")


@pytest.fixture
def lab(tmp_path: Path) -> str:
    path = tmp_path / "lab.toml"
    path.write_text(LAB)
    return str(path)


def names_of(found: tuple[qsnap.Snapshot, ...]) -> list[str]:
    return [each.name for each in found]


@pytest.mark.live
async def test_save(lab: str, place: qsnap.Place, capsys: pytest.CaptureFixture[str]) -> None:
    await example("save")["main"](lab, place)
    assert names_of(await qsnap.snapshots("demo-example", place=place)) == ["before"]
    assert not await qsnap.statuses(place=place)
    assert "demo-example runs as it did then" in capsys.readouterr().out


@pytest.mark.live
async def test_every(lab: str, place: qsnap.Place) -> None:
    seen: set[Path] = set()
    main = example("every")["main"]
    async with qsnap.running(qsnap.load_description(lab), place=place), trio.open_nursery() as nursery:
        nursery.start_soon(main, "demo-example", 1.1, 2, place)
        with trio.fail_after(120):
            present: set[Path] = set()
            while len(seen) < 4 or len(present) > 2:
                present = set(place.store.glob("demo-example/snapshots/*/manifest.json"))
                seen |= present
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    assert sorted(present) == sorted(seen)[-2:]


@pytest.mark.live
async def test_repeat(lab: str, place: qsnap.Place, capsys: pytest.CaptureFixture[str]) -> None:
    async with qsnap.running(qsnap.load_description(lab), place=place):
        await qsnap.snapshot("demo-example", "booted", place=place)
    await example("repeat")["main"]("demo-example", "booted", 2, place)
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("alice running, bob running") for line in lines] == [True, True]
    assert not await qsnap.statuses(place=place)


@pytest.mark.live
async def test_describe(place: qsnap.Place) -> None:
    module = example("describe")
    vne = module["describe"](str(GUEST / "vmlinuz"), str(GUEST / "initrd"), 2)
    await module["main"](vne, place)
    saved = await qsnap.show("star", "star-at-boot", place=place)
    assert [vm.vm.name for vm in saved.vms] == ["server", "client1", "client2"]


def test_the_demonstration_describes_guests_that_know_each_other() -> None:
    text = (ROOT / "scenarios/demo/vne.toml").read_text()
    for id in (1, 2, 3):
        assert f'append = "{kernel_append(id, 3, dirty_mb=64, rate_mb=20)}"' in text
