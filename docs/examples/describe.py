"""Describe a VNE in Python instead of TOML: as many clients as you like, and a server on two networks.

python describe.py vmlinuz initrd 4
"""

import sys
from functools import partial

import trio

import qsnap

MIB = 1 << 20


def describe(kernel: str, initrd: str, clients: int) -> qsnap.VNE:
    vm = partial(qsnap.VM, kernel=kernel, initrd=initrd, append="console=ttyS0 quiet")
    lan, backbone = qsnap.Network("lan"), qsnap.Network("backbone", mtu=9000)
    server = vm(
        "server",
        256 * MIB,
        nics=(qsnap.Nic("lan", "52:54:00:00:00:01"), qsnap.Nic("backbone", "52:54:00:00:01:01")),
    )
    others = [
        vm(f"client{n}", 128 * MIB, nics=(qsnap.Nic("lan", f"52:54:00:00:00:{n + 1:02x}"),))
        for n in range(1, clients + 1)
    ]
    return qsnap.VNE("star", (server, *others), (lan, backbone))


async def main(vne: qsnap.VNE, place: qsnap.Place) -> None:
    async with qsnap.running(vne, place=place) as status:
        for vm in status.vms:
            print(
                f"{vm.name}: {vm.state}, process {vm.pid}, console {qsnap.console_path(vne.name, vm.name, place=place)}"
            )
        saved = await qsnap.snapshot(vne.name, "star-at-boot", cut=qsnap.Cut.BARRIER, place=place)
        print(f"Saved {len(saved.vms)} VMs, stopped within {saved.discrepancy_ms:.1f} ms of each other")


if __name__ == "__main__":
    trio.run(main, describe(sys.argv[1], sys.argv[2], int(sys.argv[3])), qsnap.Place())
