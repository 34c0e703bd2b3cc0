"""python -m testbed.endtoend: qsnap on machines with kernels of their own, from its installation to a restore.

The machines are testbed/vagrant.py's; docs/testbed.md tells what can be tested there alone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import cattrs
import trio
from attrs import frozen

import qsnap
from qsnap.fleet.pki import init_ca, issue
from testbed.fleet import INITIATOR, Fleet
from testbed.guests import GuestConsole, kernel_append
from testbed.proofs import Cut, prove_all, require
from testbed.screen import Screen
from testbed.state import GuestState
from testbed.tasks import together
from testbed.vagrant import ROOT, Machine, Machines, open_machines

QSNAP = "/opt/qsnap"  #: the virtual environment in each machine
QEMU = "/opt/qemu-11.1/bin/qemu-system-x86_64"  #: beside the system's, which libvirt uses
FILES = "/opt/testbed"
GUEST_FILES = ("vmlinuz", "initrd")
ENGINES = (qsnap.Engine.BACKGROUND, qsnap.Engine.PRECOPY)
NAME = "lab"
READY_S = 300.0
TRAFFIC_S = 10.0
RUN_ON_S = 10.0  #: between the snapshot and the kill
DEADLINE_S = 180.0
ATTACHED_S = 1800.0


def make_vne() -> qsnap.VNE:
    """Two guests on one network, with as little work as tells of a fault: their processors may be emulated twice."""
    options = {"dirty_mb": 8, "rate_mb": 2, "udp": 20, "tcp": 1, "tcp_kbps": 500}
    vms = tuple(
        qsnap.VM(
            f"vm{number}",
            96 << 20,
            kernel=f"{FILES}/guest/vmlinuz",
            initrd=f"{FILES}/guest/initrd",
            append=kernel_append(number, 2, **options),
            nics=(qsnap.Nic("lan", f"52:54:00:00:00:{number:02x}"),),
            accelerator=qsnap.Accelerator.KVM,
            qemu=QEMU,
        )
        for number in (1, 2)
    )
    return qsnap.VNE(NAME, vms, (qsnap.Network("lan"),))


@frozen
class Run:
    """The whole of it, on machines that are up. `files` are what they are given."""

    machines: Machines
    fleet: Fleet
    vne: qsnap.VNE
    screen: Screen
    root: Path

    @property
    def hosts(self) -> Sequence[Machine]:
        """The machines."""
        return tuple(self.machines.hosts.values())

    async def run(self) -> None:
        """All of it, in order."""
        with self.screen.step("qsnap installed in each machine: a wheel of this checkout, into a virtual environment"):
            await self.install()
        with self.screen.step("Agents up, under systemd"):
            await together(partial(self.start_agent, machine) for machine in self.hosts)
        with self.screen.step("VNE up: a guest in each machine, with KVM"):
            await self.fleet.call(qsnap.up, self.vne)
        with self.screen.step("Guests talk to each other"):
            async with self.consoles() as consoles:
                await together(partial(each.wait_ready, trio.current_time() + READY_S) for each in consoles)
            await trio.sleep(TRAFFIC_S)
        saved = [await self.save(engine) for engine in ENGINES]
        killed = await self.kill()
        for snapshot in saved:
            await self.bring_back(snapshot, killed)
        await self.attach()

    @staticmethod
    def python(module: str) -> tuple[str, ...]:
        """The command that runs a module of the test bed in a machine."""
        return "env", f"PYTHONPATH={FILES}", f"{QSNAP}/bin/python", "-m", module

    async def install(self) -> None:
        """The package, and what its guests and their judge are made of."""
        files = self.root / "files"
        shutil.copytree(ROOT / "testbed", files / "testbed", ignore=shutil.ignore_patterns("__pycache__"))
        (files / "guest").mkdir()
        for name in GUEST_FILES:
            shutil.copy(ROOT / "build/guest" / name, files / "guest" / name)
        await trio.to_thread.run_sync(build_wheel, self.root / "source", files / "wheel")
        (self.root / INITIATOR).mkdir()
        init_ca(self.root / "ca")
        for name in (*self.machines.hosts, INITIATOR):
            issue(self.root / "ca", name)
        await together(partial(self.install_in, machine, files) for machine in self.hosts)

    async def install_in(self, machine: Machine, files: Path) -> None:
        """As a user would: into a virtual environment, which is there with all that qsnap depends on."""
        await machine.put(files, FILES)
        (wheel,) = (path.name for path in (files / "wheel").iterdir())
        await machine.run(f"{QSNAP}/bin/pip", "-q", "install", "--no-index", f"{FILES}/wheel/{wheel}")

    async def start_agent(self, machine: Machine) -> None:
        """By the unit that qsnap prints."""
        identity = (self.root / f"ca/{machine.name}.pem").read_bytes()
        await machine.run("install", "-D", "-m", "600", "/dev/stdin", "/etc/qsnap/identity.pem", given=identity)
        unit = json.loads(await machine.run(f"{QSNAP}/bin/qsnap", "agent", "--unit", "--json"))["unit"]
        await machine.run(
            "install", "-D", "-m", "644", "/dev/stdin", "/etc/systemd/system/qsnap-agent.service", given=unit.encode()
        )
        await machine.run("systemctl", "enable", "--now", "qsnap-agent")
        listening = "until journalctl -u qsnap-agent | grep -q Listening; do sleep 1; done"
        await machine.run("sh", "-c", listening)

    async def save(self, engine: qsnap.Engine) -> qsnap.Snapshot:
        """A snapshot under traffic."""
        with self.screen.step("") as done:
            wish = qsnap.Engine.AUTO if engine is qsnap.Engine.PRECOPY else engine  # which takes what can be held
            saved = await self.fleet.call(qsnap.snapshot, NAME, engine.value, engine=wish)
            downtimes = ", ".join(f"{vm.measurements.downtime_ms:.1f} ms" for vm in saved.vms)
            done.append(f"Saved by the engine {engine.value}: VMs down for {downtimes}")
        reasons = [vm.reason for vm in saved.vms]
        require(all(vm.engine is engine for vm in saved.vms), f"another engine: {reasons}")
        held = all("before the cut" in reason for reason in reasons)
        require(held or wish is engine, f"it was not held until the cut: {reasons}")
        kvm = all(vm.accelerator is qsnap.Accelerator.KVM for vm in saved.vms)
        require(kvm, "a guest does not run with KVM")
        return saved

    async def kill(self) -> list[GuestState]:
        """Let the VMs run on, and end them as a power failure would. Returns how far they had come."""
        with self.screen.step("VMs ran on, and were destroyed: kill -9"):
            await trio.sleep(RUN_ON_S)
            killed = await self.states()
            for vm in (await self.fleet.call(qsnap.status, NAME)).vms:
                await self.machines.hosts[vm.host].run("kill", "-9", str(vm.pid))
            with trio.fail_after(DEADLINE_S):
                while any(vm.state != "dead" for vm in (await self.fleet.call(qsnap.status, NAME)).vms):
                    await trio.sleep(0.2)
        return killed

    async def bring_back(self, saved: qsnap.Snapshot, killed: list[GuestState]) -> None:
        """Restore a snapshot and have its guests finish; then end it, and judge it all."""
        with self.screen.step("") as done:
            report = await self.fleet.call(qsnap.restore, NAME, saved.name)
            restored = await self.states()
            done.append(f"Restored {saved.name}: all VMs run after {report.ready_ms:.0f} ms")
        with self.screen.step("Guests talked on, ended their TCP streams and compared checksums"):
            with trio.fail_after(DEADLINE_S):
                async with self.consoles() as consoles:
                    end = await together(each.finish for each in consoles)
        await self.fleet.call(qsnap.down, NAME)
        with self.screen.step("What was stored read again, where it lies: digests right, RAM judged page by page"):
            await self.fleet.call(qsnap.verify, NAME, saved.name)
            cuts = await together(partial(self.judge, vm) for vm in saved.vms)
        for proof in prove_all(cuts, killed, restored, end):
            self.screen.mark(proof.claim)
            for line in proof.evidence:
                self.screen.say(f"   {line}", "dim")

    async def attach(self) -> None:
        """What can be seen in one machine alone, of VMs that libvirt has started."""
        with self.screen.step("Domains of libvirt's, with KVM, vhost-net and thin volumes, attached to in one machine"):
            told = await self.hosts[0].run(*self.python("testbed.attached"), timeout_s=ATTACHED_S)
        for line in told.splitlines():
            self.screen.mark(line)

    async def judge(self, vm: qsnap.VMSnapshot) -> Cut:
        """What the stored RAM image of one VM says of its guest."""
        files = [f"{qsnap.Place().store}/{NAME}/{block.file.path}" for block in vm.ram]
        told = await self.machines.hosts[vm.vm.host].run(*self.python("testbed.judge"), *files)
        return cattrs.structure(json.loads(told), Cut)

    async def states(self) -> list[GuestState]:
        """What the guests say of themselves now."""
        with trio.fail_after(DEADLINE_S):
            async with self.consoles() as consoles:
                return await together(each.status for each in consoles)

    @asynccontextmanager
    async def consoles(self) -> AsyncIterator[list[GuestConsole]]:
        """The guests' consoles, passed on by ssh."""
        runtime = qsnap.Place().runtime()
        async with AsyncExitStack() as stack:
            consoles = []
            for vm in self.vne.vms:
                here = self.root / f"{vm.name}.sock"
                machine = self.machines.hosts[vm.host]
                await stack.enter_async_context(machine.forwarded(runtime.console_path(NAME, vm.name), here))
                consoles.append(await stack.enter_async_context(GuestConsole(str(here))))
            yield consoles


def build_wheel(source: Path, target: Path) -> None:
    """A wheel of this checkout; setuptools works on a copy, beside which it leaves what it makes on the way."""
    shutil.copytree(ROOT / "qsnap", source / "qsnap", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(target), str(source)], check=True)


async def main() -> None:
    """Build the box where that is needed, start the machines, and run it all."""
    screen = Screen()
    began_s = time.monotonic()
    with screen.step("Box of the machines built, or there"):
        await trio.run_process([ROOT / "testbed/box"])
    with tempfile.TemporaryDirectory(prefix="qsnap-", dir="/var/tmp") as directory:
        root = Path(directory)
        async with AsyncExitStack() as stack:
            with screen.step("") as done:
                machines = await stack.enter_async_context(open_machines(root))
                how = "KVM" if machines.driver == "kvm" else "no KVM here: TCG, with an emulated KVM inside"
                done.append(f"{len(machines.hosts)} machines up ({how})")
            fleet = Fleet(root, machines.hosts, machines.initiator)
            vne = fleet.spread(make_vne())
            await Run(machines, fleet, vne, screen, root).run()
        screen.mark("Machines destroyed", f"{time.monotonic() - began_s:.0f} s in all")


if __name__ == "__main__":
    trio.run(main)
