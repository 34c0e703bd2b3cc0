"""Frozen values that every layer shares: what a VNE is, and what a snapshot of one holds.

A *virtual networked environment* (VNE) is a set of VMs and the networks between them. Nothing here does I/O.
"""

from __future__ import annotations

from enum import Enum

from attrs import evolve, field, frozen


class Colour(Enum):
    """One of the two bridges of a network. At rest all taps are on one of them."""

    RED = "red"
    BLUE = "blue"

    @property
    def other(self) -> Colour:
        """The colour that is post-snapshot while this one is pre-snapshot."""
        return Colour.BLUE if self is Colour.RED else Colour.RED


class Backing(Enum):
    """What guest RAM is made of."""

    AUTO = "auto"  #: hugetlb if the host has enough free huge pages, else anonymous
    ANONYMOUS = "anonymous"  #: memory-backend-ram
    MEMFD = "memfd"  #: memory-backend-memfd, shared
    TMPFS = "tmpfs"  #: memory-backend-file in /dev/shm, shared
    HUGETLB = "hugetlb"  #: memory-backend-memfd with hugetlb=on; huge pages are reserved if the host has none


class Accelerator(Enum):
    """QEMU's `-accel`. AUTO is KVM where it really boots a guest, else TCG."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class Engine(Enum):
    """How the state of one VM is captured."""

    AUTO = "auto"
    BACKGROUND = "background"  #: capability background-snapshot: userfaultfd write protection
    PRECOPY = "precopy"  #: precopy migration into a receiver that keeps the newest copy of each page
    RECORD = "record"  #: precopy migration kept as it comes, and replayed to restore; never taken by AUTO


class DiskEngine(Enum):
    """How a disk at the cut is kept."""

    AUTO = "auto"  #: overlay where qsnap made the file that the VM writes to, else reflink, else copy
    OVERLAY = "overlay"  #: the VM goes on with a new, empty layer; the file below stays as it was at the cut
    REFLINK = "reflink"  #: ioctl FICLONE: the store gets a clone, the VM keeps writing to its own file
    COPY = "copy"  #: blockdev-backup: the store gets a full copy, what the VM overwrites meanwhile is copied first


class Cut(Enum):
    """What makes the states of several VMs one consistent state."""

    COLOUR = "colour"  #: frames are separated by two bridges and a one-way link; each VM resumes when it can
    BARRIER = "barrier"  #: no VM resumes before every VM has stopped


class RamMode(Enum):
    """How a restored VM gets its RAM."""

    AUTO = "auto"
    MAP = "map"  #: copy-on-write mapping of the flat file
    EAGER = "eager"  #: the flat file copied into RAM of the VM's own before the guest runs


@frozen
class Disk:
    """A disk of a VM. `file` is a base image and is never written: writes go to an overlay of the VNE's own."""

    file: str
    format: str = "qcow2"
    interface: str = "virtio-blk-pci"


@frozen
class Nic:
    """A network card: `mac` is seen by the guest, `network` is the name of the network it is on.

    `tap` is the interface of a card whose VM qsnap did not start; others are named by qsnap.
    """

    network: str
    mac: str
    model: str = "virtio-net-pci"
    tap: str = ""


@frozen
class VM:
    """One VM as described.

    `numa` are the sizes of its NUMA nodes, which add up to `memory_bytes`; `dimms` are memory devices beside that.
    `qmp` is the QMP socket of a VM that qsnap did not start, but is attached to.
    """

    name: str
    memory_bytes: int
    numa: tuple[int, ...] = ()
    dimms: tuple[int, ...] = ()
    backing: Backing = Backing.AUTO
    vcpus: int = 1
    machine: str = "pc"
    cpu: str = ""
    accelerator: Accelerator = Accelerator.AUTO
    qemu: str = "qemu-system-x86_64"
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    extra: tuple[str, ...] = ()
    qmp: str = ""

    @property
    def ram_bytes(self) -> int:
        """All of the guest's RAM."""
        return self.memory_bytes + sum(self.dimms)


@frozen
class Network:
    """A layer-2 network between VMs. `bridge` is somebody else's bridge that attached VMs are on."""

    name: str
    mtu: int = 1500
    bridge: str = ""


@frozen
class VNE:
    """VMs + networks, as a description states them."""

    name: str
    vms: tuple[VM, ...]
    networks: tuple[Network, ...] = ()

    @property
    def attached(self) -> bool:
        """Whether somebody else has started the VMs, and made their networks."""
        return any(vm.qmp for vm in self.vms)

    def as_own(self) -> VNE:
        """The same VNE as qsnap would start it: without what belongs to somebody else."""
        return evolve(
            self,
            vms=tuple(vm_as_own(vm) for vm in self.vms),
            networks=tuple(evolve(network, bridge="") for network in self.networks),
        )


def vm_as_own(vm: VM) -> VM:
    """The VM as qsnap would start it: without the socket and the taps of an attached one."""
    return evolve(vm, qmp="", nics=tuple(evolve(nic, tap="") for nic in vm.nics))


@frozen
class StoredFile:
    """A file of a snapshot: `path` relative to the store's VNE directory, and the SHA-256 of its content."""

    path: str
    size_bytes: int
    sha256: str


@frozen
class RamBlockFile:
    """A RAMBlock kept as a flat sparse file: the page at guest offset X is at file offset X, zero pages are holes."""

    idstr: str
    used_length: int
    file: StoredFile


@frozen
class BaseImage:
    """An image of the user's that layers lie on. It is not copied: size and time tell whether it is still the same."""

    file: str
    format: str
    size_bytes: int
    mtime_ns: int


@frozen
class DiskImage:
    """A disk at the cut, and why it was kept by this engine.

    `layers` are files of the store, newest first. All are qcow2 but for the oldest, which is of `format`: it lies on
    `base`, or is complete where there is none.
    """

    engine: DiskEngine
    reason: str
    layers: tuple[StoredFile, ...]
    format: str
    base: BaseImage | None

    @property
    def top_format(self) -> str:
        """The format of the newest layer."""
        return self.format if len(self.layers) == 1 else "qcow2"


@frozen
class Measurements:
    """What a snapshot cost one VM. Instants are seconds since the Unix epoch, from QEMU's own QMP timestamps.

    They are comparable within one snapshot, even if the wall clock was set meanwhile.
    """

    total_ms: float  #: from the start of the capture to its last byte
    iterations: int  #: passes over dirty pages (`dirty-sync-count`)
    last_iteration_pages: int  #: pages sent while the VM was stopped (precopy), or in all (background)
    stop_instant_s: float
    resume_instant_s: float
    downtime_ms: float
    image_bytes: int  #: bytes allocated on disk for RAM and device state
    image_to_memory: float  #: `image_bytes` over the size of the guest's RAM
    start_instant_s: float = 0.0  #: the start that `total_ms` counts from; 0 in manifests older than this field


@frozen
class VMSnapshot:
    """One VM inside a snapshot.

    `hardware` is the part of QEMU's command line that the guest can see, recorded so that the very same machine
    is built at restore whatever qsnap's defaults have become. Without `ram`, `device_stream` is the whole of a
    recorded migration stream.
    """

    vm: VM
    engine: Engine
    reason: str
    accelerator: Accelerator
    qemu_version: tuple[int, int, int]
    machine_type: str
    hardware: tuple[str, ...]
    ram: tuple[RamBlockFile, ...]
    device_stream: StoredFile
    disks: tuple[DiskImage, ...]
    was_running: bool
    measurements: Measurements

    @property
    def recorded(self) -> bool:
        """Whether all of its state is in one stream, as engine `record` leaves it until it is converted."""
        return not self.ram


@frozen
class Snapshot:
    """A consistent state of a whole VNE, as its manifest records it. `created_s` is Unix time."""

    name: str
    vne: VNE
    cut: Cut
    created_s: float
    vms: tuple[VMSnapshot, ...]
    discrepancy_ms: float = field(default=0.0)  #: latest minus earliest STOP instant


def version_text(version: tuple[int, int, int]) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))
