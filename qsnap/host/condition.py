"""The condition that a VM is in: whether its guest goes on, and what QEMU can do with it now. Nothing is paused."""

from __future__ import annotations

from contextlib import suppress

from qsnap.errors import QemuError, StateError
from qsnap.host.migration import probe_background, probe_migration, query_ram
from qsnap.host.qemu import Process, command_line
from qsnap.host.qmp import Qmp
from qsnap.host.runtime import LiveVM
from qsnap.rules.command import TOLD_TO_HOLD
from qsnap.rules.engine import Facts, can_hold

ENDED = ("guest-panicked", "shutdown", "internal-error")  #: run states of a VM whose guest cannot go on


async def gather_facts(qmp: Qmp, vm: LiveVM, *, running: bool) -> Facts:
    """Ask QEMU what it can do with this VM, which is `running` or paused, now."""
    refusal = await probe_migration(qmp)
    return Facts(
        vm=vm.vm.name,
        qemu_version=vm.qemu_version,
        accelerator=vm.accelerator,
        hugetlb=vm.hugetlb,
        running=running,
        background_refusal=await probe_background(qmp) or refusal,
        precopy_refusal=refusal,
        ram_blocks=len(await query_ram(qmp)),
        holds=not vm.vm.keeper and can_hold(vm.qemu_version, vm.machine_type, told=_is_told_to_hold(vm.process)),
    )


def _is_told_to_hold(process: Process) -> bool:
    with suppress(OSError):  # it is gone, as it will be found
        return TOLD_TO_HOLD in command_line(process)
    return False


async def refuse_ended(qmp: Qmp) -> None:
    """Raise StateError where the guest has ended and QEMU has not: a restore could not let it run on."""
    state = (await qmp.execute("query-status"))["status"]
    if state in ENDED:
        advice = "Reset it (system_reset and cont in QEMU's monitor), or take the VNE down."
        raise StateError(f"its guest has ended: it is {state}", where=f"VM {qmp.vm}", advice=advice)


async def raise_if_it_ends(qmp: Qmp) -> None:
    """Watch over the guest: one that ends by itself must not be let run again as if it had been paused for a cut."""
    event = await qmp.wait_event(lambda event: event.name in ("GUEST_PANICKED", "SHUTDOWN"))
    what = "panicked" if event.name == "GUEST_PANICKED" else f"ended ({event.data.get('reason')})"
    advice = "Its console.log may tell why. See `qsnap ps`."
    raise QemuError(f"the guest {what} while it was saved", where=f"VM {qmp.vm}", advice=advice)


async def is_running(qmp: Qmp) -> bool:
    """Whether the VM is not paused."""
    return bool((await qmp.execute("query-status"))["status"] == "running")
