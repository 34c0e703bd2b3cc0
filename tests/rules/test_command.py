"""The command line: what the guest can see is apart from what the host gives it."""

from __future__ import annotations

import itertools
import json

import pytest
from attrs import evolve

from qsnap.model import VM, Accelerator, Disk, Nic
from qsnap.rules.command import (
    TOLD_TO_HOLD,
    AnonymousRam,
    Backends,
    FilledRam,
    MappedRam,
    MemfdRam,
    MemoryBackend,
    Ram,
    TmpfsRam,
    boot_paths,
    plan_command,
    plan_hardware,
    plan_ram,
    with_boot_files,
    with_machine_type,
)

VM_ = VM(
    "web",
    1 << 29,
    kernel="/boot/k",
    append="quiet",
    disks=(Disk("/a.qcow2"), Disk("/b.raw", "raw", "ide-hd")),
    nics=(Nic("lan", "52:54:00:00:00:01"),),
    extra=("-device", "VGA"),
)
BACKENDS = Backends("/run/q,snap/web", plan_ram(VM_, AnonymousRam()), ("/s/0.qcow2", "/s/1.qcow2"), ("tap0-0",))


def test_hardware_names_nothing_of_the_host() -> None:
    hardware = " ".join(plan_hardware(VM_, Accelerator.TCG))
    for word in ("/run", "/s/", "tap0-0", "accel", "incoming"):
        assert word not in hardware


def test_the_same_hardware_whatever_the_host_gives() -> None:
    hardware = plan_hardware(VM_, Accelerator.TCG)
    one = plan_command(VM_, "lab/web", hardware, Accelerator.TCG, BACKENDS)
    other = Backends("/elsewhere", plan_ram(VM_, MappedRam("/x")), ("/y", "/z"), ("tap5-0",), incoming=True)
    two = plan_command(VM_, "lab/web", hardware, Accelerator.TCG, other)
    assert " ".join(hardware) in " ".join(one)
    assert " ".join(hardware) in " ".join(two)
    assert two[-2:] == ["-incoming", "defer"]
    assert "-incoming" not in one


def test_the_kernel_moves_packets_of_virtio_cards_alone() -> None:
    vm = evolve(VM_, nics=(*VM_.nics, Nic("lan", "52:54:00:00:00:02", "e1000")))
    backends = evolve(BACKENDS, taps=("tap0-0", "tap0-1"))
    for vhost in (False, True):
        command = plan_command(vm, "lab/web", (), Accelerator.KVM, evolve(backends, vhost=vhost))
        netdevs = [word for option, word in itertools.pairwise(command) if option == "-netdev"]
        assert ["vhost=on" in netdev for netdev in netdevs] == [vhost, False]


def test_a_machine_alias_is_resolved() -> None:
    hardware = with_machine_type(plan_hardware(VM_, Accelerator.TCG), "pc-i440fx-7.2")
    assert hardware[:2] == ("-machine", "pc-i440fx-7.2,memory-backend=pc.ram")
    assert hardware[2:] == plan_hardware(VM_, Accelerator.TCG)[2:]
    assert with_machine_type(("-machine", "pc", "-m"), "pc-q35-7.2") == ("-machine", "pc-q35-7.2", "-m")


@pytest.mark.parametrize(
    ("ram", "expected"),
    [
        (AnonymousRam(), {"qom-type": "memory-backend-ram"}),
        (MemfdRam(hugetlb=True), {"qom-type": "memory-backend-memfd", "hugetlb": True, "prealloc": True}),
        (MappedRam("/f,ile"), {"qom-type": "memory-backend-file", "mem-path": "/f,ile", "share": False}),
        (TmpfsRam(), {"qom-type": "memory-backend-file", "mem-path": "/dev/shm", "share": True}),
        (FilledRam(7), {"qom-type": "memory-backend-file", "mem-path": "/proc/self/fd/7", "share": True}),
    ],
)
def test_ram(ram: Ram, expected: dict[str, object]) -> None:
    (found,) = ram_objects(*plan_ram(VM_, ram))
    assert found | expected == found
    assert (found["id"], found["size"]) == ("pc.ram", 1 << 29)


def ram_objects(*ram: MemoryBackend) -> list[dict[str, object]]:
    command = plan_command(VM_, "lab/web", (), Accelerator.TCG, Backends("/run", ram, (), ("tap0-0",)))
    return [json.loads(after) for word, after in itertools.pairwise(command) if word == "-object"]


def test_ram_in_pieces() -> None:
    vm = evolve(VM_, numa=(1 << 28, 1 << 28), dimms=(1 << 27,))
    hardware = " ".join(plan_hardware(vm, Accelerator.TCG))
    assert hardware.startswith("-machine pc -m 536870912B,slots=1,maxmem=671088640B ")
    for backend in ram_objects(*plan_ram(vm, AnonymousRam())):
        assert f"memdev={backend['id']}" in hardware
    assert sum(backend.size_bytes for backend in plan_ram(vm, AnonymousRam())) == vm.ram_bytes


@pytest.mark.parametrize("idstr", ["mem0", "/objects/mem0"])
def test_a_saved_block_keeps_its_name(idstr: str) -> None:
    (found,) = ram_objects(MemoryBackend(idstr, 4096, MappedRam("/x")))
    assert found["id"] == "mem0"
    assert found["x-use-canonical-path-for-ramblock-id"] is (idstr != "mem0")


def test_commas_in_a_path_are_no_new_option() -> None:
    command = plan_command(VM_, "lab/web", (), Accelerator.TCG, BACKENDS)
    sockets = [word for word in command if word.startswith("socket,")]
    assert all("path=/run/q,,snap/web/" in word for word in sockets)


def test_qemu_is_told_to_wait_with_its_switchover_only_where_it_has_to_be() -> None:
    without = plan_command(VM_, "lab/web", (), Accelerator.TCG, BACKENDS)
    told = plan_command(VM_, "lab/web", (), Accelerator.TCG, BACKENDS, told_to_hold=True)
    assert TOLD_TO_HOLD not in without
    assert told[told.index(TOLD_TO_HOLD) - 1] == "-global"
    assert len(told) == len(without) + 2


def test_flash_memory_belongs_to_the_machine() -> None:
    flash = tuple(Disk(f"/{name}.fd", "raw", "pflash") for name in ("code", "vars"))
    hardware = plan_hardware(evolve(VM_, disks=(*flash, Disk("/a.qcow2"))), Accelerator.TCG)
    assert hardware[1] == "pc,memory-backend=pc.ram,pflash0=disk0,pflash1=disk1"
    assert [word for word in hardware if "drive=" in word] == ["virtio-blk-pci,drive=disk2,id=disk2-device"]


def test_only_a_card_on_pci_has_a_boot_rom() -> None:
    nics = tuple(Nic("lan", "52:54:00:00:00:01", model) for model in ("e1000", "virtio-net-device"))
    hardware = plan_hardware(evolve(VM_, nics=nics), Accelerator.TCG)
    assert [word.endswith("romfile=") for word in hardware if "netdev=" in word] == [True, False]


def test_kvm_takes_the_hosts_processor_unless_told_otherwise() -> None:
    assert plan_hardware(VM_, Accelerator.KVM)[6:8] == ("-cpu", "host")
    assert "-cpu" not in plan_hardware(VM_, Accelerator.TCG)


def test_a_copy_takes_the_place_of_what_a_guest_boots_from() -> None:
    hardware = ("-machine", "pc", "-kernel", "/boot/vmlinuz", "-append", "-initrd", "-bios", "x", "-smp", "1")
    paths = {"-kernel": "/store/boot-1", "-dtb": "/store/boot-2"}
    assert boot_paths(hardware)["-kernel"] == "/boot/vmlinuz"
    changed = with_boot_files(hardware, paths)
    assert changed == ("-machine", "pc", "-kernel", "/store/boot-1", *hardware[4:])
    assert with_boot_files(hardware, {}) == hardware
