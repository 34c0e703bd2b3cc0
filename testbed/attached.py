"""python -m testbed.attached: libvirt's domains with KVM, vhost-net and thin volumes as disks, saved and restored.

Runs in a machine of the test bed, as root: it loads modules, makes volumes and a bridge there, and leaves them. Each
line that it prints is something that held.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio
from attrs import frozen

import qsnap
from qsnap.host.qmp import open_loop, open_qmp
from testbed.guests import GuestConsole, kernel_append
from testbed.libvirt import Libvirt, open_libvirtd
from testbed.proofs import prove_all, read_cut, require
from testbed.state import GuestState
from testbed.tasks import together

GUEST = Path("/opt/testbed/guest")
OWN_NETNS = "/proc/1/ns/net"  #: the machine's
NAME = "virt"
GROUP = "testbed"
NUMBERS = (1, 2)
OPTIONS = {"dirty_mb": 8, "rate_mb": 2, "udp": 20, "tcp": 1, "tcp_kbps": 500}
ENGINES = (qsnap.Engine.BACKGROUND, qsnap.Engine.PRECOPY)
BEFORE, AFTER = 0x11, 0x22  #: what the disks hold at the cut, and what is written there later
DISK = "/machine/peripheral/virtio-disk0/virtio-backend"
READY_S = 600.0
TRAFFIC_S = 10.0
DEADLINE_S = 180.0
PREPARE = f"""\
modprobe -a loop dm-thin-pool vhost_net bridge
truncate -s 1G {{root}}/volumes
device=$(losetup -f --show {{root}}/volumes)
pvcreate -q $device && vgcreate -q {GROUP} $device
lvcreate -q --type thin-pool -L 800M -n pool {GROUP}
for number in 1 2; do lvcreate -q -V 64M --thinpool pool -n disk$number {GROUP}; done
ip link add virt0 up type bridge
"""
DOMAIN = """\
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm{number}</name>
  <memory unit='MiB'>96</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{guest}/vmlinuz</kernel>
    <initrd>{guest}/initrd</initrd>
    <cmdline>{append}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='host-passthrough'/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/>
      <source dev='/dev/{group}/disk{number}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='bridge'>
      <source bridge='virt0'/>
      <mac address='52:54:00:00:01:0{number}'/>
      <model type='virtio'/>
      <driver name='vhost'/>
      <rom enabled='no'/>
    </interface>
    <serial type='unix'><source mode='bind' path='{root}/{number}.console'/></serial>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/><qemu:arg value='unix:{root}/{number}.qmp,server=on,wait=off'/>
  </qemu:commandline>
</domain>
"""


@frozen
class Lab:
    """The domains, and what qsnap makes of them. Their files are in `root`."""

    root: Path
    libvirt: Libvirt

    async def run(self) -> None:
        """All of it, once for each engine."""
        for engine in ENGINES:
            await self.start()
            saved = await self.save(engine)
            killed = await self.destroy()
            await self.bring_back(saved, killed)

    async def start(self) -> None:
        """Both domains, until they talk to each other."""
        for number in NUMBERS:
            append = kernel_append(number, len(NUMBERS), **OPTIONS)
            xml = DOMAIN.format(number=number, guest=GUEST, append=append, group=GROUP, root=self.root)
            path = self.root / f"{number}.xml"
            path.write_text(xml)
            await self.libvirt.virsh("create", str(path))
        async with self.consoles() as consoles:
            await together(partial(each.wait_ready, trio.current_time() + READY_S) for each in consoles)
        await trio.sleep(TRAFFIC_S)

    async def save(self, engine: qsnap.Engine) -> qsnap.Snapshot:
        """A snapshot under traffic, between two writes to the disks."""
        await self.write(BEFORE)
        names = [f"vm{number}" for number in NUMBERS]
        await qsnap.attach(await qsnap.load_domains(NAME, names, connect=self.libvirt.uri))
        await check_vhost()
        saved = await qsnap.snapshot(NAME, engine.value, engine=engine)
        await self.write(AFTER)
        kept = {disk.engine for vm in saved.vms for disk in vm.disks}
        require(kept == {qsnap.DiskEngine.LVM}, f"disks were kept by {kept}")
        require(all(vm.engine is engine for vm in saved.vms), f"another engine: {[vm.reason for vm in saved.vms]}")
        require(all(vm.accelerator is qsnap.Accelerator.KVM for vm in saved.vms), "a domain does not run with KVM")
        for number, vm in zip(NUMBERS, saved.vms, strict=True):
            (disk,) = vm.disks
            require(disk.base is not None, "a layer lies on no volume")
            await check_pattern(f"/dev/{GROUP}/disk{number}", "raw", AFTER)
        downtimes = ", ".join(f"{vm.measurements.downtime_ms:.0f} ms" for vm in saved.vms)
        say(f"Two domains of libvirt saved by the engine {engine.value}, disks by thin snapshots: down for {downtimes}")
        return saved

    async def destroy(self) -> list[GuestState]:
        """End the domains, as a power failure would. Returns how far they had come."""
        async with self.consoles() as consoles:
            states = await together(each.status for each in consoles)
        for number in NUMBERS:
            await self.libvirt.virsh("destroy", f"vm{number}")
        return states

    async def bring_back(self, saved: qsnap.Snapshot, killed: Sequence[GuestState]) -> None:
        """Restore as qsnap's own VMs, with what the disks held; and remove all of it."""
        await qsnap.restore(NAME, saved.name)
        live = qsnap.Place().runtime().load(NAME)
        for vm in live.vms:
            await check_pattern(vm.disks[0].files[0].path, "qcow2", BEFORE)
        await check_vhost()
        async with own_consoles() as consoles:
            restored = await together(each.status for each in consoles)
            with trio.fail_after(DEADLINE_S):
                end = await together(each.finish for each in consoles)
        await qsnap.down(NAME)
        await qsnap.verify(NAME, saved.name)
        directory = qsnap.Place().store / NAME
        cuts = [await trio.to_thread.run_sync(read_cut, vm, directory) for vm in saved.vms]
        for proof in prove_all(cuts, killed, restored, end):
            say(proof.claim)
        volumes = [disk.base.file for vm in saved.vms for disk in vm.disks if disk.base]
        require(all(Path(volume).exists() for volume in volumes), f"a volume is gone: {volumes}")
        await qsnap.remove(NAME, saved.name)
        require(not any(Path(volume).exists() for volume in volumes), f"a volume was left: {volumes}")
        say("Restored with KVM and vhost-net, disks as they were at the cut; no volume left when it is removed")

    async def write(self, pattern: int) -> None:
        """Have the beginning of each disk hold a pattern, written by QEMU as a guest's request would be."""
        for number in NUMBERS:
            async with open_loop(), open_qmp(f"{self.root}/{number}.qmp", vm=f"vm{number}") as qmp:
                line = f'qemu-io -d {DISK} "write -P {pattern:#x} 0 64k"'
                await qmp.execute("human-monitor-command", {"command-line": line})

    @asynccontextmanager
    async def consoles(self) -> AsyncIterator[list[GuestConsole]]:
        """The consoles of the domains."""
        async with GuestConsole(f"{self.root}/1.console") as one, GuestConsole(f"{self.root}/2.console") as two:
            yield [one, two]


@asynccontextmanager
async def own_consoles() -> AsyncIterator[list[GuestConsole]]:
    """The consoles of the restored VMs."""
    paths = [str(qsnap.console_path(NAME, f"vm{number}")) for number in NUMBERS]
    async with GuestConsole(paths[0]) as one, GuestConsole(paths[1]) as two:
        yield [one, two]


async def check_pattern(image: str, image_format: str, pattern: int) -> None:
    """Raise DisprovedError unless an image, which may be in use, begins with the pattern."""
    read = f"read -P {pattern:#x} 0 64k"
    told = await run("qemu-io", "-r", "-U", "-f", image_format, "-c", read, image)
    require("read 65536/65536" in told and "failed" not in told, f"{image} does not hold {pattern:#x}: {told}")


async def check_vhost() -> None:
    """Raise DisprovedError unless the kernel moves the packets of each QEMU."""
    (status,) = [each for each in await qsnap.statuses() if each.name == NAME]
    tasks = {path.read_text().strip() for path in Path("/proc").glob("[0-9]*/task/*/comm")}
    for vm in status.vms:
        require(f"vhost-{vm.pid}" in tasks, f"VM {vm.name} has no vhost-net")


async def run(*command: str) -> str:
    """Run a command; what it prints. Raises RuntimeError with that if it fails."""
    done = await trio.run_process(
        command, stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command}: {(done.stdout + done.stderr).decode(errors='replace')}")
    return done.stdout.decode(errors="replace")


def say(text: str) -> None:
    """Something that held."""
    print(text, flush=True)


async def main() -> None:
    """All of it."""
    root = Path(tempfile.mkdtemp(prefix="attached-", dir="/var/tmp"))
    await run("sh", "-ec", PREPARE.format(root=root))
    async with open_libvirtd(root / "libvirt", OWN_NETNS) as libvirt:
        await Lab(root, libvirt).run()


if __name__ == "__main__":
    trio.run(main)
