"""Command lines of others: what is kept of them, what becomes a slot, and what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnap.errors import AttachRefusedError
from qsnap.model import VM, Nic
from qsnap.rules.adopt import Adopted, Card, Netdev, adopt, match_nics, parse_cards, strip_loader
from qsnap.rules.options import Properties, parse_properties

DATA = Path(__file__).resolve().parents[1] / "data/command-lines"


def read(name: str) -> list[str]:
    return shlex.split((DATA / f"{name}.txt").read_text())[1:]


def taken(text: str, machine_type: str = "pc-i440fx-7.2") -> Adopted:
    return adopt(shlex.split(text), vm="web", machine_type=machine_type, directory="/home/me")


def hardware(text: str, machine_type: str = "pc-i440fx-7.2") -> str:
    return shlex.join(taken(text, machine_type).hardware)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("-m 1G", "-m 1G"),
        ("-global migration.switchover-ack-legacy=on -global a.b=c", "-global a.b=c"),
        ("-name x -pidfile p -D log -daemonize -S -accel kvm -enable-kvm -display gtk -vnc :1 -monitor stdio", ""),
        ("-machine q35,accel=kvm:tcg -M usb=off", ""),
        ("-kernel vmlinuz -append 'a b'", "-kernel /home/me/vmlinuz -append 'a b'"),
        ("-fw_cfg name=opt/x,file=x", "-fw_cfg opt/x,file=/home/me/x"),
        ("-fw_cfg opt/x,string=y", "-fw_cfg opt/x,string=y"),
        ("-hda a.img", "-drive index=0,media=disk,node-name=disk0"),
        ("a.img", "-drive index=0,media=disk,node-name=disk0"),
        ("-cdrom a.iso", "-drive file=/home/me/a.iso,index=2,media=cdrom"),
        ("-drive if=ide,index=2,media=cdrom", "-drive if=ide,index=2,media=cdrom"),
        ("-drive file=a.qcow2,if=virtio,cache=none,aio=native", "-drive if=virtio,node-name=disk0"),
        (
            "-drive file=a,if=none,id=d,format=raw,cache=writethrough,werror=stop -device scsi-hd,drive=d,serial=1",
            "-drive if=none,id=d,werror=stop,cache.writeback=off,node-name=disk0 -device scsi-hd,drive=d,serial=1",
        ),
        ("-drive if=pflash,readonly=on,file=/fw/code.fd", "-drive if=pflash,readonly=on,file=/fw/code.fd"),
        ("-drive if=pflash,file=vars.fd", "-drive if=pflash,node-name=disk0"),
        (
            "-blockdev qcow2,node-name=n,file=f -blockdev file,node-name=f,filename=a -device nvme,drive=n,addr=5",
            "-device nvme,drive=disk0,addr=5",
        ),
        (
            "-blockdev raw,node-name=n,file=f,read-only=on -blockdev file,node-name=f,filename=a"
            " -device ide-cd,drive=n",
            "-blockdev file,node-name=f,filename=/home/me/a -blockdev raw,node-name=n,file=f,read-only=on"
            " -device ide-cd,drive=n",
        ),
        ("-netdev tap,id=a,ifname=t0,vhost=on -device e1000,netdev=a,mac=1", "-device e1000,netdev=net0,mac=1"),
        (
            "-netdev user,id=a,hostfwd=x -device e1000,netdev=a",
            "-netdev user,id=outside0,hostfwd=x -device e1000,netdev=outside0",
        ),
        ("-net nic,model=virtio -net tap,ifname=t0", "-net nic,model=virtio,netdev=net0"),
        ("-net tap,ifname=t0 -net nic", "-net nic,netdev=net0"),
        ("-nic tap,ifname=t0,model=virtio,mac=1", "-net nic,netdev=net0,model=virtio,macaddr=1"),
        ("-nic user,model=e1000", "-netdev user,id=outside0 -net nic,netdev=outside0,model=e1000"),
        ("-net none", "-net none"),
        ("-vga none -parallel none -usb -usbdevice tablet", "-vga none -parallel none -usb -usbdevice tablet"),
        ("-device pc-dimm,memdev=m -object memory-backend-file,id=m,size=1G,mem-path=/x", "-device pc-dimm,memdev=m"),
        ("-object iothread,id=i -device lsi,iothread=i", "-object iothread,id=i -device lsi,iothread=i"),
        ("-audiodev pa,id=a,server=x -device AC97,audiodev=a", "-audiodev none,id=a -device AC97,audiodev=a"),
        ("-device virtio-net-pci,romfile=", "-device virtio-net-pci,romfile="),
    ],
)
def test_what_becomes_of_an_option(given: str, expected: str) -> None:
    words = shlex.split(hardware(f"-nodefaults {given}"))
    assert words[0] == "-machine"
    assert words[1].startswith("pc-i440fx-7.2,")
    assert words[1].endswith("memory-backend=pc.ram")
    words.remove("-nodefaults")
    assert words[2:] == shlex.split(expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "-serial chardev:console"),
        ("-nographic", "-serial chardev:console"),
        ("-serial mon:stdio -serial tcp::1", "-chardev null,id=null1 -serial chardev:console -serial chardev:null1"),
        ("-serial none", "-serial none"),
        ("-nodefaults", "-nodefaults"),
        (
            "-nodefaults -chardev pty,id=c -device isa-serial,chardev=c"
            " -chardev socket,id=q,path=/x -device virtserialport,chardev=q",
            "-chardev null,id=null1 -nodefaults -device isa-serial,chardev=console"
            " -device virtserialport,chardev=null1",
        ),
    ],
)
def test_the_first_serial_port_is_the_console(given: str, expected: str) -> None:
    assert shlex.split(hardware(given))[2:] == shlex.split(expected)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("-some-new-option x", "-some-new-option"),
        ("-tpmdev emulator,id=t,chardev=c", "-tpmdev"),
        ("-virtfs local,path=/x,mount_tag=x,security_model=none", "-virtfs"),
        ("-readconfig x", "-readconfig"),
        ("-snapshot", "-snapshot"),
        ("-hda x -drive file=y,snapshot=on", "snapshot=on"),
        ("-device vfio-pci,host=01:00.0", "vfio-pci"),
        ("-device vhost-vsock-pci,guest-cid=3", "vhost-vsock-pci"),
        ("-device vhost-user-blk-pci,chardev=c", "vhost-user-blk-pci"),
        ("-device usb-host,hostbus=1", "usb-host"),
        ("-device qxl-vga", "qxl-vga"),
        ("-device virtio-vga-gl", "virtio-vga-gl"),
        ("-netdev vhost-user,id=a,chardev=c -device virtio-net-pci,netdev=a", "vhost-user"),
        ("-netdev tap,id=a,queues=4 -device virtio-net-pci,netdev=a,mq=on", "several queues"),
        ("-net nic -net nic -net tap", "several NICs"),
        ("-object filter-dump,id=f,netdev=a,file=x", "filter-dump"),
        ("-usbdevice serial:tcp::1", "serial:tcp::1"),
        ("-device e1000,netdev=gone", "'gone'"),
        ("-device virtio-blk-pci,drive=gone", "'gone'"),
        ("-device '{\"driver\": '", "cannot be read"),
    ],
)
def test_what_could_not_come_back_is_refused_by_name(given: str, named: str) -> None:
    with pytest.raises(AttachRefusedError) as caught:
        taken(given)
    assert named in caught.value.message
    assert caught.value.where == "VM web"


def test_libvirt() -> None:
    found = adopt(read("libvirt-9.0-pc"), vm="alice", machine_type="pc-i440fx-7.2")
    text = shlex.join(found.hardware)
    for word in ("/var/lib", "fd", "secret", "vnc", "monitor", "sandbox", "/srv/alice", "accel", "hostnet0"):
        assert word not in text
    assert found.netdevs == (Netdev("hostnet0", fd="31"),)
    assert found.ids[:3] == ("usb", "virtio-serial0", "net0")
    devices = [json.loads(word) for word in found.hardware if word.startswith('{"driver"')]
    assert [(each["driver"], each.get("addr")) for each in devices][:3] == [
        ("piix3-usb-uhci", "0x1.0x2"),
        ("virtio-serial-pci", "0x5"),
        ("virtio-net-pci", "0x3"),
    ]
    by_id = {each["id"]: each for each in devices}
    assert by_id["net0"]["netdev"] == "net0"
    assert by_id["serial0"]["chardev"] == "console"
    assert by_id["sound0-codec0"]["audiodev"] == "audio1"


def test_libvirt_with_disks() -> None:
    found = adopt(read("libvirt-9.0-q35-disks"), vm="bob", machine_type="pc-q35-7.2")
    assert found.disks == ("libvirt-2-format",)
    devices = [json.loads(word) for word in found.hardware if word.startswith('{"driver"')]
    by_id = {each["id"]: each for each in devices if "id" in each}
    assert by_id["virtio-disk0"] == {
        "driver": "virtio-blk-pci",
        "bus": "pci.4",
        "addr": "0x0",
        "drive": "disk0",
        "id": "virtio-disk0",
        "bootindex": 1,
        "write-cache": "on",
    }
    assert by_id["sata0-0-0"]["drive"] == "libvirt-1-format"  # only read: it stays where it is
    assert "/srv/install.iso" in shlex.join(found.hardware)
    assert "/srv/d.qcow2" not in shlex.join(found.hardware)


@pytest.mark.parametrize(
    ("given", "machine_type", "names"),
    [
        ("-hda a -hdb b -drive file=c", "pc-i440fx-7.2", ("ide0-hd0", "ide0-hd1", "ide1-hd0")),
        ("-hda a -drive file=c", "pc-q35-7.2", ("ide0-hd0", "ide1-hd0")),
        ("-drive file=a,if=virtio -drive file=b,if=virtio,id=x", "pc-q35-7.2", ("virtio0", "x")),
        ("-drive file=a,if=scsi,bus=0,unit=3 -fda f", "pc-i440fx-7.2", ("scsi0-hd3", "floppy0")),
    ],
)
def test_backends_are_called_as_qemu_calls_them(given: str, machine_type: str, names: tuple[str, ...]) -> None:
    assert taken(given, machine_type).disks == names


def test_what_was_taken_apart_can_be_taken_apart_again() -> None:
    """A VM that qsnap restored may itself be attached to: its command line has the same hardware."""
    for name, machine_type in (("libvirt-9.0-pc", "pc-i440fx-7.2"), ("libvirt-9.0-q35-disks", "pc-q35-7.2")):
        once = adopt(read(name), vm="x", machine_type=machine_type)
        backends = "-chardev null,id=console -netdev tap,id=net0 -blockdev qcow2,node-name=disk0,file=f"
        again = adopt([*shlex.split(backends), *once.hardware], vm="x", machine_type=machine_type)
        assert again.hardware == once.hardware


def test_a_program_given_to_the_dynamic_linker() -> None:
    linker = "/q/ld-linux-x86-64.so.2 --argv0 qemu --library-path /q/lib:/q/more /q/bin/qemu-system-x86_64 -m 1G"
    assert strip_loader(linker.split()) == ("/q/bin/qemu-system-x86_64", ("-m", "1G"))
    assert strip_loader(["qemu-system-x86_64", "-m", "1G"]) == ("qemu-system-x86_64", ("-m", "1G"))


WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="="), min_size=1)


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9.-]*", fullmatch=True), WORDS, min_size=1))
def test_properties_survive(values: dict[str, str]) -> None:
    for is_json in (False, True):
        found = parse_properties(Properties(values, "", is_json).encode(), "")
        assert found.values == values


INFO = """\
hub 0
 \\ hub0port1: #net172: index=0,type=tap,ifname=t0,script=no,downscript=no
 \\ hub0port0: virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:57
 \\ u0: index=0,type=tap,fd=3
"""


def test_cards() -> None:
    found = parse_cards([Netdev("u0", fd="3"), Netdev("", "t0")], ["t1", "t0"], INFO.replace("\n", "\r\n"))
    assert found == (Card("t1", "e1000", "52:54:00:12:34:57"), Card("t0", "virtio-net-pci", "52:54:00:12:34:56"))


CARDS = (Card("t0", "e1000", "m0"), Card("t1", "e1000", "m1"), Card("", "e1000", "m2"))


def test_nics_are_found_by_tap_and_then_by_order() -> None:
    vm = VM("web", 0, nics=(Nic("outer", ""), Nic("lan", "", tap="t1"), Nic("wan", "")))
    nics = match_nics(vm, CARDS)
    assert [(nic.network, nic.mac, nic.tap) for nic in nics] == [
        ("outer", "m0", "t0"),
        ("lan", "m1", "t1"),
        ("wan", "m2", ""),
    ]


@pytest.mark.parametrize(
    ("nics", "named"),
    [
        ((Nic("lan", "", tap="t0"), Nic("lan", "")), "m2"),
        ((Nic("lan", "", tap="t7"), Nic("lan", "")), "t1"),
        ((Nic("lan", ""),) * 4, "lan"),
    ],
)
def test_a_nic_too_many_or_too_few(nics: tuple[Nic, ...], named: str) -> None:
    with pytest.raises(AttachRefusedError) as caught:
        match_nics(VM("web", 0, nics=nics), CARDS)
    assert named in caught.value.message
