"""Values that tests of several parts need: a small snapshot, and Hypothesis strategies for all of the model."""

from __future__ import annotations

import hashlib

from attrs import evolve
from hypothesis import strategies as st

from qsnap.model import (
    VM,
    VNE,
    Accelerator,
    Backing,
    BaseImage,
    Cut,
    Disk,
    DiskEngine,
    DiskImage,
    Engine,
    Measurements,
    Network,
    Nic,
    RamBlockFile,
    Snapshot,
    StoredFile,
    VMSnapshot,
)

MEASUREMENTS = Measurements(
    total_ms=812.5,
    iterations=2,
    last_iteration_pages=1234,
    stop_instant_s=1700000000.25,
    resume_instant_s=1700000000.251,
    downtime_ms=1.0,
    image_bytes=8192,
    image_to_memory=0.001,
    start_instant_s=1700000000.125,
)


def stored(path: str, content: bytes = b"") -> StoredFile:
    """The record of a file with that content."""
    return StoredFile(path, len(content), hashlib.sha256(content).hexdigest())


def vm_snapshot(vm: VM, ram: StoredFile, stream: StoredFile, *layers: StoredFile) -> VMSnapshot:
    """A VM with one RAMBlock, and one disk if there are layers."""
    base = BaseImage("/images/base.qcow2", "qcow2", 196624, 1700000000_000000000)
    disks = (DiskImage(DiskEngine.OVERLAY, "asked for", layers, "qcow2", base),) if layers else ()
    return VMSnapshot(
        vm=vm,
        engine=Engine.BACKGROUND,
        reason="RAM in huge pages",
        accelerator=Accelerator.TCG,
        qemu_version=(7, 2, 22),
        machine_type="pc-i440fx-7.2",
        hardware=("-machine", "pc-i440fx-7.2,memory-backend=pc.ram"),
        ram=(RamBlockFile("pc.ram", ram.size_bytes, ram),),
        device_stream=stream,
        disks=disks,
        was_running=True,
        measurements=MEASUREMENTS,
    )


def snapshot(name: str = "s1", vne: str = "lab", layer: str = "disks/alice-0.qcow2") -> Snapshot:
    """One VM called alice, with a disk of one layer; the contents are those of `contents`."""
    alice = VM("alice", 4 << 20, kernel="/boot/vmlinuz", nics=(Nic("lan", "52:54:00:00:00:01"),))
    held = {path: stored(path, content) for path, content in contents(name, layer).items()}
    ram, stream, disk = held.values()
    return Snapshot(
        name=name,
        vne=VNE(vne, (alice,), (Network("lan"),)),
        cut=Cut.COLOUR,
        created_s=1700000000.5,
        vms=(vm_snapshot(alice, ram, stream, disk),),
        discrepancy_ms=0.25,
    )


def contents(name: str = "s1", layer: str = "disks/alice-0.qcow2") -> dict[str, bytes]:
    """Path -> content of the files of `snapshot(name)`."""
    ram = b"page".ljust(1 << 16, b"\0") + b"last page"
    return {
        f"snapshots/{name}/alice/pc.ram.ram": ram,
        f"snapshots/{name}/alice/device.stream": b"QEVM" + bytes(range(256)),
        layer: b"QFI\xfb a layer",
    }


def snapshot_of(*vms: tuple[str, Measurements], name: str = "s1", created_s: float = 1700000000.5) -> Snapshot:
    """A snapshot of VMs with these names and measurements, which ran."""
    one = snapshot(name)
    saved = tuple(evolve(one.vms[0], vm=evolve(one.vms[0].vm, name=vm), measurements=cost) for vm, cost in vms)
    stops = [cost.stop_instant_s for _, cost in vms]
    return evolve(
        one,
        vne=evolve(one.vne, vms=tuple(each.vm for each in saved)),
        created_s=created_s,
        vms=saved,
        discrepancy_ms=(max(stops) - min(stops)) * 1e3,
    )


_ALNUM = "abyz0189"
NAMES = st.builds(str.__add__, st.sampled_from(_ALNUM), st.text(_ALNUM + "-", max_size=31))
WORDS = st.builds(str.__add__, st.sampled_from(_ALNUM), st.text(_ALNUM + "AZ._-", max_size=15))
TEXTS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20)
FILES = st.text(st.characters(min_codepoint=33, blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=20)
MACS = st.integers(0, 2**40 - 1).map(lambda low: "52:" + low.to_bytes(5, "big").hex(":"))
SIZES = st.integers(1, 8192).map(lambda huge_pages: huge_pages << 21)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
STORED_FILES = st.builds(
    StoredFile,
    st.lists(NAMES, min_size=1, max_size=3).map(lambda names: "/".join(["snapshots", *names])),
    st.integers(0, 1 << 40),
    st.binary(min_size=32, max_size=32).map(bytes.hex),
)


@st.composite
def vnes(draw: st.DrawFn) -> VNE:
    """VNEs that a description can state: unique names, unique MACs, something to boot from."""
    networks = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    macs = iter(draw(st.lists(MACS, min_size=6, max_size=6, unique=True)))
    return VNE(
        draw(NAMES),
        tuple(_vm(draw, name, networks, [next(macs), next(macs)]) for name in names),
        tuple(Network(name, draw(st.integers(68, 65521))) for name in networks),
    )


def _vm(draw: st.DrawFn, name: str, networks: list[str], macs: list[str]) -> VM:
    formats = st.sampled_from(["qcow2", "raw", "vmdk"])
    disks = tuple(draw(st.lists(st.builds(Disk, FILES, formats, WORDS), max_size=2)))
    kernel = draw(FILES if not disks else st.just("") | FILES)
    used = macs[: draw(st.integers(0, 2))]
    nodes, dimms = (tuple(draw(st.lists(SIZES, max_size=2))) for _ in range(2))
    return VM(
        name=name,
        memory_bytes=sum(nodes) or draw(SIZES),
        numa=nodes,
        dimms=dimms,
        backing=draw(st.sampled_from(Backing)),
        vcpus=draw(st.integers(1, 255)),
        machine=draw(WORDS),
        cpu=draw(TEXTS),
        accelerator=draw(st.sampled_from(Accelerator)),
        qemu=draw(FILES),
        kernel=kernel,
        initrd=draw(FILES) if kernel else "",
        append=draw(TEXTS) if kernel else "",
        disks=disks,
        nics=tuple(Nic(draw(st.sampled_from(networks)), mac, draw(WORDS)) for mac in used),
        extra=draw(st.sampled_from([(), ("-device", "virtio-rng-pci"), ("-usb", "-rtc", "base=utc")])),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Snapshots that a manifest can record."""
    vne = draw(vnes())
    return Snapshot(
        name=draw(NAMES),
        vne=vne,
        cut=draw(st.sampled_from(Cut)),
        created_s=draw(st.floats(0, 1e11)),
        vms=tuple(_vm_snapshot(draw, vm) for vm in vne.vms),
        discrepancy_ms=draw(FINITE),
    )


def _vm_snapshot(draw: st.DrawFn, vm: VM) -> VMSnapshot:
    blocks = draw(st.lists(st.tuples(TEXTS, STORED_FILES), max_size=3))
    layers = st.lists(STORED_FILES, min_size=1, max_size=3).map(tuple)
    bases = st.none() | st.builds(BaseImage, FILES, WORDS, st.integers(0), st.integers())
    return VMSnapshot(
        vm=vm,
        engine=draw(st.sampled_from(Engine)) if blocks else Engine.RECORD,
        reason=draw(TEXTS),
        accelerator=draw(st.sampled_from(Accelerator)),
        qemu_version=draw(st.tuples(*[st.integers(0, 99)] * 3)),
        machine_type=draw(WORDS),
        hardware=tuple(draw(st.lists(TEXTS, max_size=4))),
        ram=tuple(RamBlockFile(idstr, file.size_bytes, file) for idstr, file in blocks),
        device_stream=draw(STORED_FILES),
        disks=tuple(
            draw(st.lists(st.builds(DiskImage, st.sampled_from(DiskEngine), TEXTS, layers, WORDS, bases), max_size=2))
        ),
        was_running=draw(st.booleans()),
        measurements=draw(
            st.builds(Measurements, *[FINITE, *[st.integers(0)] * 2, *[FINITE] * 3, st.integers(0), FINITE, FINITE])
        ),
    )
