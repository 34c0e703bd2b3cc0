"""The same guest under libvirt, with the system's own QEMU, since Debian 12's libvirt starts no newer one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from typing import Any
from xml.sax.saxutils import escape

import trio

import qsnap
from bench.guest import Guest, describe, pause_ms, ready_guest
from bench.ways import SNAPSHOT, Saved, Way, wait_resumed
from qsnap.host import hugepages
from qsnap.host.disks import create_overlay
from qsnap.host.netns import create_netns, remove_netns
from qsnap.host.qemu import find_processes, find_program
from qsnap.model import Backing
from testbed.libvirt import Libvirt, LibvirtError, open_libvirtd

LIBVIRT = "libvirt, external snapshot"
NETNS = "qsnap-bench-libvirt"
HUGE_PAGES = "<memoryBacking><hugepages/><source type='memfd'/></memoryBacking>"
DOMAIN = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name><memory unit='b'>{memory}</memory><vcpu>1</vcpu>{backing}
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{append}</cmdline>
  </os>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    <interface type='ethernet'><mac address='{mac}'/><model type='virtio'/></interface>
    <serial type='unix'><source mode='bind' path='{console}'/></serial>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/><qemu:arg value='unix:{monitor},server=on,wait=off'/>
  </qemu:commandline>
</domain>
"""
_numbers = count()


@asynccontextmanager
async def open_libvirt(place: qsnap.Place) -> AsyncIterator[Libvirt]:
    """A libvirtd in a namespace of its own, where VMs get taps."""
    await create_netns(NETNS)
    try:
        async with open_libvirtd(place.run.parent / "libvirt", NETNS) as libvirt:
            yield libvirt
    finally:
        with trio.CancelScope(shield=True):
            await remove_netns(NETNS)


@asynccontextmanager
async def running_domain(libvirt: Libvirt, place: qsnap.Place, **settings: Any) -> AsyncIterator[Guest]:
    """A single guest, its vCPU busy all the time."""
    (vm,) = describe(place, work=1, **settings).vms
    root = place.run.parent
    paths = {"disk": root / "domain.qcow2", "console": root / "console.sock", "monitor": root / "monitor.sock"}
    base = vm.disks[0]
    await create_overlay(find_program("qemu-img"), str(paths["disk"]), base=base.file, base_format=base.format)
    pool, huge = place.runtime().huge_pages(), vm.backing is Backing.HUGETLB
    if huge:
        pool.reserve(NETNS, hugepages.pages_for(vm.memory_bytes))
    (root / "domain.xml").write_text(
        DOMAIN.format(
            name=vm.name,
            memory=vm.memory_bytes,
            backing=HUGE_PAGES if huge else "",
            machine=vm.machine,
            kernel=vm.kernel,
            initrd=vm.initrd,
            append=escape(vm.append),
            emulator=find_program("qemu-system-x86_64"),
            mac=vm.nics[0].mac,
            **paths,
        )
    )
    try:
        await libvirt.virsh("create", str(root / "domain.xml"))
        (process,) = find_processes([f"unix:{paths['monitor']}"])
        async with ready_guest(place, vm, process.pid, str(paths["console"]), str(paths["monitor"])) as guest:
            yield guest
    finally:
        with trio.CancelScope(shield=True):
            with suppress(LibvirtError):  # it did not even start
                await libvirt.virsh("destroy", vm.name)
            pool.give_back(NETNS)


def by_libvirt(libvirt: Libvirt) -> Way:
    """An external snapshot of memory and disk."""
    return Way(LIBVIRT, partial(_save, libvirt), partial(_tidy, libvirt))


async def _save(libvirt: Libvirt, guest: Guest) -> Saved:
    root = guest.place.run.parent
    disk = f"vda,snapshot=external,file={root}/domain-{next(_numbers)}.qcow2"
    async with guest.monitor() as qmp:
        started_s = trio.current_time()
        await libvirt.virsh(
            *("snapshot-create-as", guest.name, SNAPSHOT),
            *("--memspec", f"file={root}/memory,snapshot=external", "--diskspec", disk),
        )
        total_ms = (trio.current_time() - started_s) * 1e3
        await wait_resumed(qmp, 0)
        return Saved(pause_ms(qmp.events), total_ms)


async def _tidy(libvirt: Libvirt, guest: Guest) -> None:
    await libvirt.virsh("snapshot-delete", guest.name, SNAPSHOT, "--metadata")
    (guest.place.run.parent / "memory").unlink()
