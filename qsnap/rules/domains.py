"""A libvirt domain's XML (of the running domain: libvirt.org/formatdomain.html) as a VM that can be attached to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree import ElementTree

from qsnap.errors import AttachRefusedError
from qsnap.model import VM, VNE, Network, Nic
from qsnap.rules.manifest import is_name
from qsnap.rules.options import parse_properties, split_options

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_OUTSIDE = ("user", "vhostuser", "hostdev", "vdpa")
_SNIPPET = """\
<domain type='...' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
    ...
    <qemu:commandline>
      <qemu:arg value='-qmp'/>
      <qemu:arg value='unix:/run/NAME.qmp,server=on,wait=off'/>
    </qemu:commandline>
  </domain>"""


def describe_domains(name: str, xmls: Iterable[str]) -> VNE:
    """The VNE of these running domains. Their networks are named after the bridges, or what else joins them.

    Raises AttachRefusedError for a domain without a QMP socket beside libvirt's own.
    """
    vms = tuple(_vm(ElementTree.fromstring(xml)) for xml in xmls)
    networks = dict.fromkeys(nic.network for vm in vms for nic in vm.nics)
    return VNE(name, vms, tuple(Network(network) for network in networks))


def _vm(domain: ElementTree.Element) -> VM:
    name = domain.findtext("name", "")
    if not is_name(name):
        raise AttachRefusedError(
            "its name cannot be a VM's",
            where=f"domain {name}",
            advice="Describe it in a TOML file, under another name.",
        )
    nics = [_nic(each) for each in domain.iterfind("devices/interface") if each.get("type") not in _OUTSIDE]
    return VM(name, 0, qemu="", nics=tuple(nics), qmp=_qmp(domain, name))


def _nic(interface: ElementTree.Element) -> Nic:
    source, target = interface.find("source"), interface.find("target")
    kinds = ("bridge", "network", "dev")
    found = [source.get(kind, "") for kind in kinds if source.get(kind)] if source is not None else []
    network = re.sub(r"[^a-z0-9-]", "-", (found or [interface.get("type", "")])[0].lower()).strip("-")
    return Nic(network or "net", "", tap=target.get("dev", "") if target is not None else "")


def _qmp(domain: ElementTree.Element, name: str) -> str:
    words = [arg.get("value", "") for arg in domain.iterfind(f"{_QEMU}commandline/{_QEMU}arg")]
    for option, argument in split_options(words, frozenset()):
        if option in ("qmp", "qmp-pretty") and argument.startswith("unix:"):
            return parse_properties(argument.removeprefix("unix:"), "path").get("path")
    raise AttachRefusedError(
        "it has no QMP socket but libvirt's own",
        where=f"domain {name}",
        advice=f"Add a second one (virsh edit {name}) and start it anew:\n  {_SNIPPET.replace('NAME', name)}",
    )
