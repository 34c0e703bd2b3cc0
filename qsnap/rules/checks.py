"""What has to be right of a VNE that was made by a program: what a description is told with line and key."""

from __future__ import annotations

from collections import Counter

from qsnap.errors import ConfigError
from qsnap.model import VNE
from qsnap.rules.manifest import check_names


def check_vne(vne: VNE) -> None:
    """Raise ConfigError, with the key that a description would have, for what no description can say.

    Raises StateError for a name that cannot be one.
    """
    names = {"VM": [vm.name for vm in vne.vms], "network": [network.name for network in vne.networks]}
    check_names(vne.name, *names["VM"], *names["network"])
    if not vne.vms:
        raise _error(vne, "vm", "a VNE needs at least one VM")
    nics = [(f"vm.{vm.name}.nics[{index}]", nic) for vm in vne.vms for index, nic in enumerate(vm.nics)]
    for key, nic in nics:
        if nic.network not in names["network"]:
            raise _error(vne, key, f"unknown network {nic.network!r}", f"Known: {', '.join(names['network'])}.")
    names["MAC"] = [nic.mac.lower() for _, nic in nics if nic.mac]
    for what, words in names.items():
        for word, count in Counter(words).items():
            if count > 1:
                raise _error(vne, "", f"{what} {word} is there {count} times")


def _error(vne: VNE, key: str, message: str, advice: str = "") -> ConfigError:
    return ConfigError(message, file=f"VNE {vne.name}", line=0, key=key, advice=advice)
