"""qsnap saves a running virtual network of QEMU VMs, consistently and with milliseconds of downtime."""

from qsnap.errors import (
    BusyError,
    ConfigError,
    EngineRefusedError,
    HostError,
    IntegrityError,
    QemuError,
    QsnapError,
    StateError,
    StreamError,
)
from qsnap.host.catalogue import remove, show, snapshots, verify
from qsnap.host.descriptions import load_description
from qsnap.host.lifecycle import VMStatus, VNEStatus, console_path, down, running, status, statuses, up
from qsnap.host.place import Place
from qsnap.host.restoring import RestoreReport, restore
from qsnap.host.saving import snapshot
from qsnap.model import VM, VNE, Accelerator, Backing, Cut, Disk, Engine, Network, Nic, RamMode, Snapshot

__all__ = [
    "VM",
    "VNE",
    "Accelerator",
    "Backing",
    "BusyError",
    "ConfigError",
    "Cut",
    "Disk",
    "Engine",
    "EngineRefusedError",
    "HostError",
    "IntegrityError",
    "Network",
    "Nic",
    "Place",
    "QemuError",
    "QsnapError",
    "RamMode",
    "RestoreReport",
    "Snapshot",
    "StateError",
    "StreamError",
    "VMStatus",
    "VNEStatus",
    "console_path",
    "down",
    "load_description",
    "remove",
    "restore",
    "running",
    "show",
    "snapshot",
    "snapshots",
    "status",
    "statuses",
    "up",
    "verify",
]
