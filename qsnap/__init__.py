"""qsnap saves a running virtual network of QEMU VMs, consistently and with milliseconds of downtime.

The names are imported when they are first used: the receiver, one process per VM, is part of this package and needs
none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qsnap.errors import (
        AttachRefusedError,
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
    from qsnap.host.abilities import Ability, abilities
    from qsnap.host.attaching import AttachReport, attach, detach
    from qsnap.host.catalogue import remove, show, snapshots, verify
    from qsnap.host.converting import convert
    from qsnap.host.descriptions import load_description
    from qsnap.host.domains import load_domains
    from qsnap.host.lifecycle import VMStatus, VNEStatus, console_path, down, running, status, statuses, up
    from qsnap.host.place import Place
    from qsnap.host.recovery import recover
    from qsnap.host.reporting import Report, report
    from qsnap.host.restoring import RestoreReport, restore
    from qsnap.host.saving import snapshot
    from qsnap.model import (
        VM,
        VNE,
        Accelerator,
        Backing,
        Cut,
        Disk,
        DiskEngine,
        Engine,
        Measurements,
        Network,
        Nic,
        RamMode,
        Snapshot,
        VMSnapshot,
    )

_HOMES = {
    "qsnap.errors": (
        "AttachRefusedError",
        "BusyError",
        "ConfigError",
        "EngineRefusedError",
        "HostError",
        "IntegrityError",
        "QemuError",
        "QsnapError",
        "StateError",
        "StreamError",
    ),
    "qsnap.host.abilities": (
        "Ability",
        "abilities",
    ),
    "qsnap.host.attaching": (
        "AttachReport",
        "attach",
        "detach",
    ),
    "qsnap.host.catalogue": (
        "remove",
        "show",
        "snapshots",
        "verify",
    ),
    "qsnap.host.converting": ("convert",),
    "qsnap.host.descriptions": ("load_description",),
    "qsnap.host.domains": ("load_domains",),
    "qsnap.host.lifecycle": (
        "VMStatus",
        "VNEStatus",
        "console_path",
        "down",
        "running",
        "status",
        "statuses",
        "up",
    ),
    "qsnap.host.place": ("Place",),
    "qsnap.host.recovery": ("recover",),
    "qsnap.host.reporting": (
        "Report",
        "report",
    ),
    "qsnap.host.restoring": (
        "RestoreReport",
        "restore",
    ),
    "qsnap.host.saving": ("snapshot",),
    "qsnap.model": (
        "VM",
        "VNE",
        "Accelerator",
        "Backing",
        "Cut",
        "Disk",
        "DiskEngine",
        "Engine",
        "Network",
        "Nic",
        "RamMode",
        "Snapshot",
        "VMSnapshot",
        "Measurements",
    ),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'qsnap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "VM",
    "VNE",
    "Ability",
    "Accelerator",
    "AttachRefusedError",
    "AttachReport",
    "Backing",
    "BusyError",
    "ConfigError",
    "Cut",
    "Disk",
    "DiskEngine",
    "Engine",
    "EngineRefusedError",
    "HostError",
    "IntegrityError",
    "Measurements",
    "Network",
    "Nic",
    "Place",
    "QemuError",
    "QsnapError",
    "RamMode",
    "Report",
    "RestoreReport",
    "Snapshot",
    "StateError",
    "StreamError",
    "VMSnapshot",
    "VMStatus",
    "VNEStatus",
    "abilities",
    "attach",
    "console_path",
    "convert",
    "detach",
    "down",
    "load_description",
    "load_domains",
    "recover",
    "remove",
    "report",
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
