"""The disks of a VM: what they consist of, how they are kept at the cut, and how all that is undone."""

from qsnap.host.disks.chain import DiskFile, LiveDisk, find_devices, read_disks, tidy_disks
from qsnap.host.disks.cut import DiskCut, DiskPlan, DiskStep, image_of, plan_disks
from qsnap.host.disks.images import create_overlay, describe_base, image_bytes, name_base, new_path, read_chain

__all__ = [
    "DiskCut",
    "DiskFile",
    "DiskPlan",
    "DiskStep",
    "LiveDisk",
    "create_overlay",
    "describe_base",
    "find_devices",
    "image_bytes",
    "image_of",
    "name_base",
    "new_path",
    "plan_disks",
    "read_chain",
    "read_disks",
    "tidy_disks",
]
