"""Asking libvirt for its domains. Needs libvirt-python, the extra `qsnap[libvirt]`."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from qsnap.errors import HostError, StateError
from qsnap.model import VNE
from qsnap.rules.domains import describe_domains

SYSTEM = "qemu:///system"


async def load_domains(name: str, domains: Sequence[str], *, connect: str = SYSTEM) -> VNE:
    """A VNE called `name` of these running domains of the libvirt at the URI `connect`, to be attached to."""
    return describe_domains(name, await trio.to_thread.run_sync(_read, domains, connect))


def _read(domains: Sequence[str], connect: str) -> list[str]:
    try:
        import libvirt
    except ImportError as error:
        advice = "Install it: pip install 'qsnap[libvirt]', which needs libvirt's headers (libvirt-dev, pkg-config)."
        raise HostError("libvirt-python is not installed", advice=advice) from error
    libvirt.registerErrorHandler(lambda context, error: None, None)  # what it would print is raised as well
    try:
        connection = libvirt.openReadOnly(connect)
        try:
            found = [connection.lookupByName(domain) for domain in domains]
            for domain in found:
                if not domain.isActive():
                    raise StateError("it is not running", where=f"domain {domain.name()}", advice="virsh start DOMAIN")
            return [str(domain.XMLDesc()) for domain in found]
        finally:
            connection.close()
    except libvirt.libvirtError as error:
        raise StateError(f"libvirt: {error}", where=connect, advice="See `virsh list`, or give --connect.") from error
