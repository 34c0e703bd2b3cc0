"""A command line taken apart and put together again makes the same machine: every device, property and address."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import trio

from qsnap.host.qmp import open_loop, open_qmp
from qsnap.model import VM, Accelerator, Nic
from qsnap.rules.adopt import adopt
from qsnap.rules.command import RAM_ID, AnonymousRam, Backends, MemoryBackend, plan_command
from tests.live.lab import GUEST, QEMU_7, QEMU_11

DATA = Path(__file__).resolve().parents[1] / "data/command-lines"
HOSTS_OWN = re.compile(r"^ *(drive|netdev|chardev|backend|audiodev|memdev) = .*\n", re.MULTILINE)

BY_HAND = {
    "bare": "",
    "old-style": "-nographic -hda {d}/a.raw -cdrom {d}/b.raw -net nic,model=virtio -net tap,ifname=t0,script=no",
    "drives": (
        "-M q35 -drive file={d}/a.qcow2,if=virtio,cache=writethrough -drive file={d}/b.raw,format=raw"
        " -drive file={d}/c.raw,format=raw,if=none,id=s,werror=stop"
        " -device virtio-scsi-pci,id=scsi -device scsi-hd,drive=s"
        " -nic tap,ifname=t0,script=no,model=e1000,mac=52:54:00:00:00:07 -device virtio-rng-pci -vga virtio"
    ),
    "nodes": (
        "-nodefaults -blockdev qcow2,node-name=n,file.driver=file,file.filename={d}/a.qcow2"
        " -device virtio-blk-pci,drive=n,id=v"
        " -netdev tap,id=lan,ifname=t0,script=no -device virtio-net-pci,netdev=lan,mac=52:54:00:00:00:07,addr=9"
        " -netdev user,id=out -device e1000,netdev=out -chardev pty,id=c -device isa-serial,chardev=c"
        " -device virtio-serial -chardev null,id=q -device virtserialport,chardev=q,name=agent -audiodev none,id=a"
        " -device intel-hda -device hda-duplex,audiodev=a -usb -device usb-tablet -smp 2 -m 64,slots=2,maxmem=256M"
    ),
}


def libvirt(name: str, directory: Path) -> str:
    """A recorded command line of libvirt's, with what libvirt would hand over replaced."""
    text = (DATA / f"{name}.txt").read_text().partition(" ")[2]
    text = re.sub(r"-(qmp|mon|sandbox|msg|spice|vnc) \S+", "", text).replace('"driver":"spice"', '"driver":"none"')
    text = re.sub(r"-object '\{\"qom-type\":\"secret\"[^']*'", "", text)
    text = re.sub(r"-chardev socket,id=(\w+),\S+", r"-chardev null,id=\1", text)
    text = re.sub(r'\{"type":"tap","fd":"\d+"', '{"type":"tap","ifname":"t0","script":"no"', text)
    files = {"/srv/vmlinuz": GUEST / "vmlinuz", "/srv/initrd": GUEST / "initrd", "/srv/d.qcow2": directory / "a.qcow2"}
    files["/srv/install.iso"] = directory / "b.raw"
    for name, path in files.items():
        text = text.replace(name, str(path))
    return " ".join(text.split("\n"))


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """The command in a network namespace of its own."""
    return subprocess.Popen(["unshare", "-n", *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def make_images(directory: Path) -> None:
    """Images of both formats, and qcow2 layers."""
    for image in ("a.qcow2", "a.raw", "b.raw", "c.raw", "layer0", "layer1", "layer2"):
        form = "qcow2" if image.startswith(("layer", "a.q")) else "raw"
        subprocess.run(["qemu-img", "create", "-q", "-f", form, directory / image, "1M"], check=True)


async def machine(command: list[str], directory: Path) -> tuple[str, str, str]:
    """(machine type, the tree of devices, PCI addresses) of a QEMU that is started, asked, and ended."""
    socket = directory / "ask.sock"
    with start(
        [*command, "-S", "-display", "none", "-accel", "tcg", "-qmp", f"unix:{socket},server=on,wait=off"]
    ) as process:
        try:
            async with open_loop():
                with trio.fail_after(60):
                    while not socket.exists():
                        assert process.poll() is None, "QEMU refuses this command line"
                        await trio.sleep(0.02)
                async with open_qmp(str(socket), vm="asked", timeout_s=60) as qmp:
                    machine_type = await qmp.execute("qom-get", {"path": "/machine", "property": "type"})
                    tree = await qmp.execute("human-monitor-command", {"command-line": "info qtree"})
                    pci = await qmp.execute("human-monitor-command", {"command-line": "info pci"})
        finally:
            process.kill()
    socket.unlink()
    return machine_type.removesuffix("-machine"), HOSTS_OWN.sub("", tree.replace("\r\n", "\n")), pci


@pytest.mark.parametrize("qemu", [QEMU_7, QEMU_11], ids=["7.2", "11.1"])
@pytest.mark.parametrize("name", [*BY_HAND, "libvirt-9.0-pc", "libvirt-9.0-q35-disks"])
async def test_the_same_machine(name: str, qemu: str, tmp_path: Path) -> None:
    make_images(tmp_path)
    text = BY_HAND[name].format(d=tmp_path) if name in BY_HAND else libvirt(name, tmp_path)
    if qemu == QEMU_11:
        text = text.replace("-no-acpi", "")  # which is no option any more
    words = shlex.split(text)
    machine_type, tree, pci = await machine([qemu, *words], tmp_path)

    taken = adopt(words, vm="x", machine_type=machine_type)
    size = 64 << 20 if name == "nodes" else 96 << 20 if "libvirt" in name else 128 << 20
    layers = tuple(str(tmp_path / f"layer{index}") for index in range(len(taken.disks)))
    taps = tuple("t0" for _ in taken.netdevs)
    backends = Backends(str(tmp_path), (MemoryBackend(RAM_ID, size, AnonymousRam()),), layers, taps)
    vm = VM("x", size, qemu=qemu, nics=tuple(Nic("lan", "") for _ in taps))
    command = plan_command(vm, "x", taken.hardware, Accelerator.TCG, backends)
    again, same_tree, same_pci = await machine(command, tmp_path)

    assert again == machine_type
    assert tree.count("dev: ") > 5
    assert same_tree == tree
    assert same_pci == pci
