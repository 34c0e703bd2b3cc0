"""Frozen values that every layer shares: what a VNE is, and what a snapshot of one holds.

A *virtual networked environment* (VNE) is a set of VMs and the networks between them. Nothing here does I/O.
"""

from __future__ import annotations

from enum import Enum

from attrs import evolve, field, frozen

VNI_LIMIT = 1 << 24  #: VXLAN numbers are below


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

    AUTO = "auto"  #: overlay where qsnap made the file that the VM writes to, else the first of the others that can be
    OVERLAY = "overlay"  #: the VM goes on with a new, empty layer; the file below stays as it was at the cut
    REFLINK = "reflink"  #: ioctl FICLONE: the store gets a clone, the VM keeps writing to its own file
    LVM = "lvm"  #: a snapshot of the thin volume that the VM writes to and goes on writing to
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
    `qmp` is the QMP socket of a VM that qsnap did not start, but is attached to. `host` is where it runs, in a VNE that
    is spread over hosts, and `saved_on` the one whose store takes its RAM and device state: empty for the same one.
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
    host: str = ""
    saved_on: str = ""

    @property
    def ram_bytes(self) -> int:
        """All of the guest's RAM."""
        return self.memory_bytes + sum(self.dimms)

    @property
    def keeper(self) -> str:
        """The other host that takes its RAM and device state; empty if that is its own."""
        return "" if self.qmp or self.saved_on == self.host else self.saved_on


@frozen
class Network:
    """A layer-2 network between VMs. `bridge` is somebody else's bridge that attached VMs are on.

    `vni` is the VXLAN number of its red tunnels between hosts, and the next one that of the blue; 0 has them made.
    """

    name: str
    mtu: int = 1500
    bridge: str = ""
    vni: int = 0


@frozen
class Host:
    """A machine that VMs run on. Its agent listens at `address`:`port`; its tunnels end at the IP address `tunnel`."""

    name: str
    address: str
    port: int
    tunnel: str


@frozen
class VNE:
    """VMs + networks, as a description states them.

    `hosts` are those that it is spread over, if it is. `here` is the one whose part of it this is: all of its networks,
    and the VMs on that host.
    """

    name: str
    vms: tuple[VM, ...]
    networks: tuple[Network, ...] = ()
    hosts: tuple[Host, ...] = ()
    here: str = ""

    def part(self, host: str) -> VNE:
        """What one of the hosts has of it."""
        return evolve(self, vms=tuple(vm for vm in self.vms if vm.host == host), here=host)

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
class BootFile:
    """The store's copy of a file that a guest boots from, in place of the one that `option` of QEMU's named."""

    option: str  #: such as `-kernel`
    file: StoredFile


@frozen
class StateFiles:
    """The RAM and device state of one VM in a store; `image_bytes` are those that the files take on disk."""

    ram: tuple[RamBlockFile, ...]
    device_stream: StoredFile
    image_bytes: int


@frozen
class BaseImage:
    """An image that layers lie on, outside of the store: the user's, or a volume of LVM.

    It is not copied: size and time tell whether it is still the same. A block device has no time, and 0 here.
    """

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
    recorded migration stream. `kept_on` is the host whose store has both, if that of the disks has them not. `boot` are
    the files that `hardware` names by paths of the host that it ran on; they are where the disks are.
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
    kept_on: str = ""
    boot: tuple[BootFile, ...] = ()

    def has_state(self, host: str) -> bool:
        """Whether a host that has this has the RAM and device state too. So has one without a name, which is all."""
        return not (self.kept_on and host) or self.kept_on == host

    def has_disks(self, host: str) -> bool:
        """Whether a host that has this has the disks too."""
        return not (self.kept_on and host) or self.vm.host == host

    @property
    def recorded(self) -> bool:
        """Whether all of its state is in one stream, as engine `record` leaves it until it is converted."""
        return not self.ram


@frozen
class Snapshot:
    """A consistent state of a whole VNE, as its manifest records it. `created_s` is Unix time.

    `operation` is what took it on several hosts.
    """

    name: str
    vne: VNE
    cut: Cut
    created_s: float
    vms: tuple[VMSnapshot, ...]
    discrepancy_ms: float = field(default=0.0)  #: latest minus earliest STOP instant
    operation: str = ""


@frozen
class VMStatus:
    """One VM of a running VNE. `state` is QEMU's run state, or `dead`; `busy` if its only QMP socket is in use.

    `host` is where it runs, in a VNE that is spread over hosts.
    """

    name: str
    state: str
    pid: int
    accelerator: Accelerator
    qemu_version: tuple[int, int, int]
    machine_type: str
    memory_bytes: int
    hugetlb: bool
    host: str = ""


@frozen
class VNEStatus:
    """A VNE that was brought up.

    `netns` is the network namespace that holds its VMs and networks: a name; or without root the path
    /proc/PID/ns/net, and nothing once all VMs are dead. `notes` are what its user should know, after it was started.
    """

    name: str
    netns: str
    colour: Colour
    store: str
    vms: tuple[VMStatus, ...]
    notes: tuple[str, ...] = ()


@frozen
class RestoreReport:
    """What a restore did.

    Attributes:
        ready_ms: from the call to the moment all VMs ran.
        ram: how each VM got its RAM.
        running_ms: for each VM, from the start of its QEMU to its RESUME; none of those that stay paused.
    """

    snapshot: Snapshot
    ready_ms: float
    ram: dict[str, str]
    running_ms: dict[str, float]


@frozen
class AttachReport:
    """What qsnap is attached to now. `barrier_only` is why snapshots of it take the barrier cut, or nothing.

    `outside` are, for each VM, the network backends that no cut separates: what they carry is lost at a restore.
    """

    status: VNEStatus
    barrier_only: str
    outside: dict[str, tuple[str, ...]]


@frozen
class Ability:
    """Something that VNEs need or are better for: whether it is here, what was found, and how to come by it."""

    name: str
    here: bool
    finding: str
    remedy: str = ""


@frozen
class HostReport:
    """What the agent of a host is and can do; or in `fault` why it cannot be asked, and in `remedy` what to do then."""

    host: Host
    version: str
    abilities: tuple[Ability, ...]
    fault: str = ""
    remedy: str = ""


@frozen
class SnapshotOrder:
    """What snapshot is to be taken.

    `id` is that of the operation on several hosts, and `decider` the host that knows its outcome, for one that is not
    the decider itself. `clock_offset_s` is what the initiator's clock shows more than that of the host.
    """

    vne: str
    name: str
    engine: Engine = Engine.AUTO
    cut: Cut = Cut.COLOUR
    disks: DiskEngine = DiskEngine.AUTO
    clock_offset_s: float = 0.0
    id: str = ""
    decider: str = ""


@frozen
class UpOrder:
    """What is to be started. `id` and `decider` as in `SnapshotOrder`."""

    vne: VNE
    id: str = ""
    decider: str = ""


@frozen
class RestoreOrder:
    """What is to be started as it was saved: `part` of the VNE, or all that this host has of it in the snapshot.

    `qemu` replaces the program that the snapshot names. With `paused` the VMs are loaded and not let run. `id` and
    `decider` as in `SnapshotOrder`.
    """

    vne: str
    name: str
    ram: RamMode = RamMode.AUTO
    qemu: str = ""
    paused: bool = False
    part: VNE | None = None
    id: str = ""
    decider: str = ""


@frozen
class Outcome:
    """What is decided of a snapshot of several hosts when it is committed: what no host could know by itself."""

    created_s: float = 0.0
    discrepancy_ms: float = 0.0

    def applied(self, part: Snapshot) -> Snapshot:
        """The part of one host with these figures."""
        return evolve(part, created_s=self.created_s, discrepancy_ms=self.discrepancy_ms)


def version_text(version: tuple[int, int, int]) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))
