"""Domains of a real libvirtd: found, attached to, saved, and restored as qsnap's own.

The daemon is the test's: in a network namespace and a mount namespace of its own, where the directories that libvirt
has compiled in, and the table of users, are the test's too.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import libvirt
import pytest
import trio

import qsnap
from testbed.guests import GuestConsole, kernel_append
from tests.live.lab import GUEST, check_continues, judge, open_consoles, statuses

NETNS = f"qsnap-libvirt-{os.getpid()}"
BOOT_S = 300.0
CONFIG = {
    "libvirtd.conf": 'unix_sock_dir = "/run/libvirt"\nauth_unix_ro = "none"\nauth_unix_rw = "none"\n',
    "qemu.conf": (
        'user = "root"\ngroup = "root"\nsecurity_driver = "none"\ncgroup_controllers = []\nnamespaces = []\n'
        'stdio_handler = "file"\n'
    ),
}
DIRECTORIES = {
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
    "run": "/run/libvirt",
}
DOMAIN = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm{number}</name>
  <memory unit='MiB'>96</memory>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{guest}/vmlinuz</kernel>
    <initrd>{guest}/initrd</initrd>
    <cmdline>{append}</cmdline>
  </os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <interface type='bridge'>
      <source bridge='virt0'/>
      <mac address='52:54:00:00:00:0{number}'/>
      <model type='virtio'/>
      <rom enabled='no'/>
    </interface>
    <serial type='unix'><source mode='bind' path='{root}/{number}.console'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
  {qmp}
</domain>
"""
QMP = """\
<qemu:commandline>
  <qemu:arg value='-qmp'/><qemu:arg value='unix:{root}/{number}.qmp,server=on,wait=off'/>
</qemu:commandline>
"""


@pytest.fixture
def daemon(place: qsnap.Place) -> Iterator[str]:
    """The URI of a libvirtd, in a namespace that has a bridge called virt0."""
    root = place.run.parent / "libvirt"
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True)
    for name, text in CONFIG.items():
        (root / "etc" / name).write_text(text)
    (root / "passwd").write_text(f"{Path('/etc/passwd').read_text()}libvirt-qemu:x:64055:64055::/:/bin/false\n")
    (root / "group").write_text(f"{Path('/etc/group').read_text()}libvirt-qemu:x:64055:\n")
    binds = {**DIRECTORIES, "passwd": "/etc/passwd", "group": "/etc/group"}
    made = [path for path in DIRECTORIES.values() if not os.path.isdir(path)]
    for path in made:
        os.mkdir(path)
    script = " && ".join([*(f"mount --bind {root}/{ours} {theirs}" for ours, theirs in binds.items()), "exec libvirtd"])
    uri = f"qemu+unix:///system?socket={root}/run/libvirt-sock"
    subprocess.run(["ip", "netns", "add", NETNS], check=True)
    try:
        subprocess.run(["ip", "-n", NETNS, "link", "add", "virt0", "up", "type", "bridge"], check=True)
        with serving(["ip", "netns", "exec", NETNS, "unshare", "-m", "sh", "-c", script], uri, root / "libvirtd.log"):
            yield uri
    finally:
        subprocess.run(["ip", "netns", "del", NETNS], check=True)
        for path in made:
            os.rmdir(path)


@contextmanager
def serving(command: list[str], uri: str, log: Path) -> Iterator[None]:
    """The daemon, while the block runs; its domains are ended with it."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        wait_for_daemon(uri, process, log)
        yield
        connection = libvirt.open(uri)
        for domain in connection.listAllDomains():
            domain.destroy()
        connection.close()
    finally:
        process.terminate()
        process.wait()


def wait_for_daemon(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    libvirt.registerErrorHandler(lambda context, error: None, None)
    deadline = time.monotonic() + 60
    while True:
        try:
            libvirt.open(uri).close()
            return
        except libvirt.libvirtError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


def start_domain(uri: str, root: Path, number: int, *, machine: str = "pc", qmp: bool = True) -> Any:
    """Start the domain vm1 or vm2, and return the connection to libvirt."""
    connection = libvirt.open(uri)
    values = {
        "number": number,
        "machine": machine,
        "guest": GUEST,
        "root": root,
        "append": kernel_append(number, 2, dirty_mb=8, rate_mb=20, udp=100, tcp=1),
    }
    xml = DOMAIN.format(**values, qmp=QMP.format(root=root, number=number) if qmp else "")
    connection.createXML(xml)
    return connection


async def test_domains_are_saved_and_restored(daemon: str, place: qsnap.Place) -> None:
    root = place.run.parent
    for number, machine in ((1, "pc"), (2, "q35")):
        connection = await trio.to_thread.run_sync(partial(start_domain, daemon, root, number, machine=machine))
    async with GuestConsole(f"{root}/1.console") as one, GuestConsole(f"{root}/2.console") as two:
        for console in (one, two):
            await console.wait_ready(trio.current_time() + BOOT_S)
        vne = await qsnap.load_domains("virt", ["vm1", "vm2"], connect=daemon)
        report = await qsnap.attach(vne, place=place)
        assert report.barrier_only == ""
        saved = await qsnap.snapshot("virt", "cut", place=place)
        before = await statuses([one, two])
        await trio.sleep(1)
        assert all(a.ticks > b.ticks for a, b in zip(await statuses([one, two]), before, strict=True))
    for name in ("vm1", "vm2"):
        assert connection.lookupByName(name).state()[0] == libvirt.VIR_DOMAIN_RUNNING
        connection.lookupByName(name).destroy()
    verdict = judge(saved, place)
    assert (verdict.orphans, verdict.wrong_stamps) == (0, 0)
    await qsnap.restore("virt", "cut", place=place)
    async with open_consoles("virt", place, 2) as consoles:
        await check_continues(consoles, verdict.states)


async def test_a_domain_that_cannot_be_attached_to(daemon: str, place: qsnap.Place) -> None:
    start_domain(daemon, place.run.parent, 1, qmp=False)
    with pytest.raises(qsnap.AttachRefusedError, match="no QMP socket but libvirt's own"):
        await qsnap.load_domains("virt", ["vm1"], connect=daemon)
    with pytest.raises(qsnap.StateError, match="vm9"):
        await qsnap.load_domains("virt", ["vm9"], connect=daemon)
