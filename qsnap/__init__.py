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
        ConnectionLostError,
        EngineRefusedError,
        HostError,
        IdentityError,
        InDoubtError,
        IntegrityError,
        ProtocolError,
        QemuError,
        QsnapError,
        StateError,
        StreamError,
    )
    from qsnap.fleet.agent import run_agent
    from qsnap.fleet.operations import (
        attach,
        console_path,
        convert,
        detach,
        down,
        hosts,
        recover,
        remove,
        report,
        restore,
        running,
        show,
        snapshot,
        snapshots,
        status,
        statuses,
        up,
        verify,
    )
    from qsnap.host.abilities import abilities
    from qsnap.host.descriptions import load_description
    from qsnap.host.domains import load_domains
    from qsnap.host.place import Place
    from qsnap.host.reporting import Report
    from qsnap.model import (
        VM,
        VNE,
        Ability,
        Accelerator,
        AttachReport,
        Backing,
        Cut,
        Disk,
        DiskEngine,
        Engine,
        Host,
        HostReport,
        Measurements,
        Network,
        Nic,
        RamMode,
        RestoreReport,
        Snapshot,
        VMSnapshot,
        VMStatus,
        VNEStatus,
    )

_HOMES = {
    "qsnap.errors": (
        "AttachRefusedError",
        "BusyError",
        "ConfigError",
        "ConnectionLostError",
        "EngineRefusedError",
        "HostError",
        "IdentityError",
        "InDoubtError",
        "IntegrityError",
        "ProtocolError",
        "QemuError",
        "QsnapError",
        "StateError",
        "StreamError",
    ),
    "qsnap.fleet.agent": ("run_agent",),
    "qsnap.fleet.operations": (
        "attach",
        "console_path",
        "convert",
        "detach",
        "down",
        "hosts",
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
    ),
    "qsnap.host.abilities": ("abilities",),
    "qsnap.host.descriptions": ("load_description",),
    "qsnap.host.domains": ("load_domains",),
    "qsnap.host.place": ("Place",),
    "qsnap.host.reporting": ("Report",),
    "qsnap.model": (
        "VM",
        "VNE",
        "Ability",
        "Accelerator",
        "AttachReport",
        "Backing",
        "Cut",
        "Disk",
        "DiskEngine",
        "Engine",
        "Host",
        "HostReport",
        "Measurements",
        "Network",
        "Nic",
        "RamMode",
        "RestoreReport",
        "Snapshot",
        "VMSnapshot",
        "VMStatus",
        "VNEStatus",
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
    "ConnectionLostError",
    "Cut",
    "Disk",
    "DiskEngine",
    "Engine",
    "EngineRefusedError",
    "Host",
    "HostError",
    "HostReport",
    "IdentityError",
    "InDoubtError",
    "IntegrityError",
    "Measurements",
    "Network",
    "Nic",
    "Place",
    "ProtocolError",
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
    "hosts",
    "load_description",
    "load_domains",
    "recover",
    "remove",
    "report",
    "restore",
    "run_agent",
    "running",
    "show",
    "snapshot",
    "snapshots",
    "status",
    "statuses",
    "up",
    "verify",
]
